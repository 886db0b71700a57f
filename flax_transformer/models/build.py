"""The list of all model classes."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from flax import nnx

from flax_transformer.data.tokenizer import Tokenizer
from flax_transformer.errors import ConfigError
from flax_transformer.models.recurrent import RecurrentSeq2Seq
from flax_transformer.models.recurrent_config import RecurrentConfig
from flax_transformer.models.seq2seq import Seq2Seq
from flax_transformer.models.transformer import Transformer
from flax_transformer.models.transformer_config import TransformerConfig

ModelConfig = TransformerConfig | RecurrentConfig


@dataclass(frozen=True)
class VocabularyInfo:
    """Facts about the tokenizers that a model needs.

    Attributes:
        source_size: number of source ids.
        target_size: number of target ids.
        start_token: target id that the decoder reads first.
        end_token: target id that closes an output; None if only shapes matter.

    Example:
        >>> VocabularyInfo(source_size=8_000, target_size=8_000, start_token=1).target_size
        8000
    """

    source_size: int
    target_size: int
    start_token: int
    end_token: int | None = None


@runtime_checkable
class Tokenizers(Protocol):
    """What `vocabulary_info` reads of a `TokenizerPair`. So models do not depend on the libraries of tokenizers."""

    @property
    def source(self) -> Tokenizer:
        """The tokenizer of the source language."""
        ...

    @property
    def target(self) -> Tokenizer:
        """The tokenizer of the target language."""
        ...


def vocabulary_info(tokenizers: Tokenizers) -> VocabularyInfo:
    """Returns the vocabulary sizes and the special tokens of the tokenizers."""
    target = tokenizers.target
    return VocabularyInfo(tokenizers.source.vocab_size, target.vocab_size, target.special.start, target.special.end)


def _check_zero_start(config: TransformerConfig, vocabulary: VocabularyInfo) -> None:
    """Raises a ConfigError if the row of zeros of the start token would also be the output row of the end token."""
    if config.zero_start and config.share_embeddings != "none" and vocabulary.start_token == vocabulary.end_token:
        raise ConfigError(
            f"model.zero_start fixes the vector of the start token at zero. Here token {vocabulary.start_token} starts "
            "and ends an output, so no training could make an end more or less likely. Set model.zero_start: false, or "
            "model.share_embeddings: none, or give the target's tokenizer a start token of its own."
        )


def build_model(config: ModelConfig, vocabulary: VocabularyInfo, *, rngs: nnx.Rngs) -> Seq2Seq:
    """Returns a new model of the kind that `config` names.

    Args:
        config: sizes and options.
        vocabulary: sizes of the vocabularies, and special tokens.
        rngs: stream "params" initialises the parameters.

    Raises:
        ConfigError: `zero_start` would also zero the output row of the end token.
        TypeError: no model belongs to the class of `config`.

    Example:
        >>> config = TransformerConfig(model_dim=8, num_heads=2, feed_forward_dim=8)
        >>> vocabulary = VocabularyInfo(source_size=20, target_size=20, start_token=1)
        >>> shapes = nnx.eval_shape(lambda: build_model(config, vocabulary, rngs=nnx.Rngs(0)))
        >>> shapes.target_embedding.table.shape
        (24, 8)
    """
    sizes = {"source_vocab_size": vocabulary.source_size, "target_vocab_size": vocabulary.target_size}
    if isinstance(config, TransformerConfig):
        _check_zero_start(config, vocabulary)
        return Transformer(config, **sizes, start_token=vocabulary.start_token, rngs=rngs)
    if isinstance(config, RecurrentConfig):
        return RecurrentSeq2Seq(config, **sizes, start_token=vocabulary.start_token, rngs=rngs)
    raise TypeError(
        f"{type(config).__name__} has no model here. Add one to build_model (flax_transformer/models/build.py), "
        "as docs/how_to/add_a_model.md shows."
    )
