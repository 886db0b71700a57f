"""The settings of a recurrent encoder-decoder."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax.numpy as jnp

from flax_transformer.errors import ConfigError, check_fields
from flax_transformer.nn.embedding import ShareKind
from flax_transformer.nn.recurrent import CellKind
from flax_transformer.ops.dropout import check_dropout_rate


@dataclass(frozen=True)
class RecurrentConfig:
    """Settings of a recurrent encoder-decoder.

    The decoder reads from left to right only.

    Attributes:
        model_dim: width of the embeddings and of the readout.
        hidden_dim: number of units of each layer. The directions of a bidirectional encoder have half of them each.
        cell: "lstm" or "gru".
        num_encoder_layers: number of encoder layers.
        num_decoder_layers: number of decoder layers.
        encoder_bidirectional: whether the encoder reads the source in both directions.
        attention: "none", "additive" (Bahdanau), or Luong's "dot", "general" and "concat".
        context_join: place where the context joins the decoder. "input" (Bahdanau) attends before the token and joins
            the decoder's input. "output" (Luong) attends after the token and joins the decoder's output. None means
            "input" for additive attention, "output" for Luong's.
        input_feeding: whether the decoder's input includes the last attentional vector (Luong et al. 2015, section
            3.3). This needs context_join "output".
        max_source_length: maximum number of source tokens of a sentence, end token included.
        max_target_length: maximum number of target tokens of a sentence, end token included.
        share_embeddings: "all" uses one table for source, target and output, and needs a joint vocabulary. With
            "target_output" the source has its own table. With "none" there are three tables.
        dropout: rate of dropout on embeddings, between layers, and on the readout.
        vocab_multiple: number that divides the rows of each token table; padding rows fill it up.
        param_dtype: type of the parameters; training needs float32.
        compute_dtype: type of products and activations.

    Raises:
        ConfigError: a value is out of range, or fields contradict each other.

    Example:
        >>> RecurrentConfig(cell="gru", attention="general", input_feeding=True).join
        'output'
    """

    kind: ClassVar[str] = "rnn"
    supports_packing: ClassVar[bool] = False  # the state of one pair would run on into the next pair of the row

    model_dim: int = 128
    hidden_dim: int = 256
    cell: CellKind = "lstm"
    num_encoder_layers: int = 1
    num_decoder_layers: int = 1
    encoder_bidirectional: bool = True
    attention: Literal["none", "additive", "dot", "general", "concat"] = "additive"
    context_join: Literal["input", "output"] | None = None
    input_feeding: bool = False
    max_source_length: int = 256
    max_target_length: int = 256
    share_embeddings: ShareKind = "all"
    dropout: float = 0.1
    vocab_multiple: int = 8
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        check_fields("model", self)
        for name in ("model_dim", "hidden_dim", "num_encoder_layers", "num_decoder_layers", "max_source_length",
                     "max_target_length", "vocab_multiple"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} must be at least 1, got {getattr(self, name)}.")
        if self.encoder_bidirectional and self.hidden_dim % 2:
            raise ConfigError(
                f"model.hidden_dim ({self.hidden_dim}) must be even: each direction of a bidirectional encoder has "
                "half of it."
            )
        if self.attention == "none" and (self.context_join is not None or self.input_feeding):
            option = "input_feeding" if self.input_feeding else "context_join"
            raise ConfigError(
                f"model.{option} is an option of attention, but model.attention is none. Leave it out, or choose an "
                "attention: additive, dot, general or concat."
            )
        if self.input_feeding and self.join != "output":
            raise ConfigError(
                "model.input_feeding feeds back the attentional vector, which needs a context that joins the output. "
                "Here the context joins the input. Set model.context_join: output, or input_feeding: false."
            )
        check_dropout_rate("model.dropout", self.dropout)

    @property
    def description(self) -> str:
        """The model in a few words."""
        attention = "no attention" if self.attention == "none" else f"{self.attention} attention"
        depth = f"{self.num_encoder_layers}+{self.num_decoder_layers}"
        return f"{self.cell.upper()} {depth} of {self.hidden_dim}, {attention}"

    @property
    def has_attention(self) -> bool:
        """Whether the decoder looks at the source."""
        return self.attention != "none"

    @property
    def join(self) -> Literal["none", "input", "output"]:
        """Where the context goes. It is the default of the attention if `context_join` is None."""
        if self.attention == "none":
            return "none"
        return self.context_join or ("input" if self.attention == "additive" else "output")

    @property
    def dtypes(self) -> dict[str, Any]:
        """The two types, as arguments of layers."""
        return {"param_dtype": jnp.dtype(self.param_dtype), "compute_dtype": jnp.dtype(self.compute_dtype)}
