"""The text of a run as its training reads it: cut into tokens, with batches planned."""

from collections.abc import Sequence
from dataclasses import dataclass

from jax.sharding import Mesh

from flax_transformer.config.recipe import Config
from flax_transformer.data.batching import Plan, TokenizedPairs, data_fingerprint
from flax_transformer.data.loader import evaluation_plan, training_plan
from flax_transformer.data.parallel_text import Corpus
from flax_transformer.data.preparation import held_out_pairs, prepare_training_pairs
from flax_transformer.data.tokenizer_pair import TokenizerPair
from flax_transformer.parallel.mesh import check_rows


@dataclass(frozen=True)
class PreparedText:
    """A corpus, and what has been made of it.

    Attributes:
        corpus: the text.
        tokenizers: of both sides.
        train: variants of the training pairs, that epochs take turns through.
        validation: pairs of the validation part.
        plan: batches of the training pairs.
        validation_plan: batches of the validation pairs.
        fingerprint: of the training pairs; positions in `plan` mean something only with the same.
    """

    corpus: Corpus
    tokenizers: TokenizerPair
    train: Sequence[TokenizedPairs]
    validation: TokenizedPairs
    plan: Plan
    validation_plan: Plan
    fingerprint: str


def prepare_text(config: Config, corpus: Corpus, tokenizers: TokenizerPair, mesh: Mesh) -> PreparedText:
    """Returns a corpus cut into tokens, from the user's cache where it lies there, with batches that fit the mesh.

    Raises:
        InputError: bad text, sizes of batches that do not suffice, or rows that the mesh does not divide.
    """
    limits = config.model.max_source_length, config.model.max_target_length
    train = prepare_training_pairs(corpus.train, tokenizers, config.filters, *limits, config.subword_sampling)
    fingerprint = data_fingerprint(train, drawn=config.subword_sampling.alpha > 0)
    validation = held_out_pairs(corpus.validation, tokenizers, *limits)
    plan = training_plan(train, config.batching, config.training.seed)
    validation_plan = evaluation_plan(validation.lengths, config.batching, mesh.shape["data"] * mesh.shape["fsdp"])
    for shape in plan.shapes:
        check_rows(
            shape.rows // config.batching.gradient_accumulation_steps,
            mesh,
            ("data", "fsdp"),
            "a batch, or a piece of it if it is cut",
            f" Set batching.row_multiple: {mesh.shape['data'] * mesh.shape['fsdp']}.",
        )
    return PreparedText(corpus, tokenizers, train, validation, plan, validation_plan, fingerprint)
