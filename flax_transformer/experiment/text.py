"""The text of a run, tokenised and planned as batches."""

from collections.abc import Sequence
from dataclasses import dataclass

from jax.sharding import Mesh

from flax_transformer.config.recipe import Config
from flax_transformer.data.batching import DataFingerprint, Plan, TokenizedPairs
from flax_transformer.data.loader import evaluation_plan, training_plan
from flax_transformer.data.parallel_text import Corpus
from flax_transformer.data.preparation import held_out_pairs, prepare_training_pairs
from flax_transformer.data.tokenizer_pair import TokenizerPair
from flax_transformer.parallel.mesh import check_rows


@dataclass(frozen=True)
class PreparedText:
    """A corpus, its tokens and its batches.

    Attributes:
        corpus: the text.
        tokenizers: tokenizers of both sides.
        train: training pairs, once for each segmentation. The epochs take turns.
        validation: pairs of the validation part.
        plan: batches of the training pairs.
        validation_plan: batches of the validation pairs.
        fingerprint: text of the `DataFingerprint`. A position in `plan` is valid only for the same training pairs.
    """

    corpus: Corpus
    tokenizers: TokenizerPair
    train: Sequence[TokenizedPairs]
    validation: TokenizedPairs
    plan: Plan
    validation_plan: Plan
    fingerprint: str


def prepare_text(config: Config, corpus: Corpus, tokenizers: TokenizerPair, mesh: Mesh) -> PreparedText:
    """Returns a tokenised corpus, from the user's cache if it is there, with batches that fit the mesh.

    Raises:
        InputError: the text is bad, batches are too small, or the mesh does not divide their rows.
    """
    limits = config.model.max_source_length, config.model.max_target_length
    train = prepare_training_pairs(corpus.train, tokenizers, config.filters, *limits, config.subword_sampling)
    drawn = config.subword_sampling.alpha > 0
    fingerprint = str(DataFingerprint.of(train, drawn, (corpus.validation, corpus.test)))
    validation = held_out_pairs(corpus.validation, tokenizers, *limits)
    plan = training_plan(train, config.batching, config.training.seed)
    validation_plan = evaluation_plan(validation.lengths, config.batching, mesh.shape["data"] * mesh.shape["fsdp"])
    for shape in plan.shapes:
        check_rows(
            shape.rows // config.batching.gradient_accumulation_steps,
            mesh,
            ("data", "fsdp"),
            "a batch, or a micro-batch of it",
            f" Set batching.row_multiple: {mesh.shape['data'] * mesh.shape['fsdp']}.",
        )
    return PreparedText(corpus, tokenizers, train, validation, plan, validation_plan, fingerprint)
