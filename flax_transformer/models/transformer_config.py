"""The settings of a Transformer."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax.numpy as jnp

from flax_transformer.errors import ConfigError, check_fields
from flax_transformer.nn.embedding import ShareKind
from flax_transformer.nn.feed_forward import Activation
from flax_transformer.nn.normalization import NormOrder
from flax_transformer.nn.positions import PositionKind
from flax_transformer.ops.dropout import check_dropout_rate


@dataclass(frozen=True)
class TransformerConfig:
    """Settings of a Transformer.

    Attributes:
        model_dim: width of every layer's input and output; an even number.
        num_heads: number of attention heads; it divides model_dim.
        feed_forward_dim: hidden width of the feed-forward network.
        num_encoder_layers: number of encoder layers.
        num_decoder_layers: number of decoder layers.
        max_source_length: maximum number of source tokens of a sentence, end token included.
        max_target_length: maximum number of target tokens of a sentence, end token included.
        positions: "sinusoidal" (fixed) or "learned" position encodings.
        norm_order: place of the layer norm: "post" (as in the paper) or "pre". Pre-norm adds a norm at the end of each
            stack.
        norm_epsilon: number that a layer norm adds to the variance.
        activation: activation of the feed-forward network.
        share_embeddings: "all" uses one table for source, target and output, and needs a joint vocabulary. With
            "target_output" the source has its own table. With "none" there are three tables.
        dropout: rate of dropout on each sub-layer's output.
        embedding_dropout: rate of dropout on the sum of embeddings and positions; None means that of dropout.
        attention_dropout: rate of dropout on attention weights.
        activation_dropout: rate of dropout after the activation of the feed-forward network.
        vocab_multiple: number that divides the rows of each token table; padding rows fill it up.
        output_bias: whether one learnt number is added to each token's logit, as in MarianMT models.
        zero_start: whether the start token's vector is fixed at zero, as in MarianMT models.
        scan_layers: whether training runs the layers of a stack in a loop, which is compiled once. Deep models then
            compile sooner and run a little slower.
        rematerialize: whether training keeps only each layer's input for the backward pass, and computes the rest
            again. This needs less memory and more arithmetic. On a CPU it saves memory only with scan_layers.
        param_dtype: type of the parameters; training needs float32.
        compute_dtype: type of products and activations. Softmax, statistics of norms and the loss stay float32.

    Raises:
        ConfigError: a value is out of range, or fields contradict each other.

    Example:
        >>> TransformerConfig(model_dim=512, num_heads=8, feed_forward_dim=2_048).num_encoder_layers
        2
    """

    kind: ClassVar[str] = "transformer"
    supports_packing: ClassVar[bool] = True  # attention keeps the segments of a row apart
    has_attention: ClassVar[bool] = True

    model_dim: int = 128
    num_heads: int = 4
    feed_forward_dim: int = 512
    num_encoder_layers: int = 2
    num_decoder_layers: int = 2
    max_source_length: int = 256
    max_target_length: int = 256
    positions: PositionKind = "sinusoidal"
    norm_order: NormOrder = "post"
    norm_epsilon: float = 1e-5
    activation: Activation = "relu"
    share_embeddings: ShareKind = "all"
    dropout: float = 0.1
    embedding_dropout: float | None = None
    attention_dropout: float = 0.0
    activation_dropout: float = 0.1
    vocab_multiple: int = 8
    output_bias: bool = False
    zero_start: bool = False
    scan_layers: bool = False
    rematerialize: bool = False
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        check_fields("model", self)
        if self.norm_epsilon <= 0:
            raise ConfigError(f"model.norm_epsilon must be positive, got {self.norm_epsilon}.")
        for name in ("model_dim", "num_heads", "feed_forward_dim", "num_encoder_layers", "num_decoder_layers",
                     "max_source_length", "max_target_length", "vocab_multiple"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} must be at least 1, got {getattr(self, name)}.")
        if self.model_dim % self.num_heads:
            small = [n for n in range(1, math.isqrt(self.model_dim) + 1) if self.model_dim % n == 0]
            divisors = [*small, *(self.model_dim // n for n in small)]
            below = max(n for n in divisors if n < self.num_heads)
            above = min((n for n in divisors if n > self.num_heads), default=self.model_dim)
            raise ConfigError(
                f"model.num_heads ({self.num_heads}) must divide model.model_dim ({self.model_dim}); "
                f"nearest: {below}, {above}."
            )
        if self.model_dim % 2:
            raise ConfigError(
                f"model.model_dim ({self.model_dim}) must be even: half of the channels of a position are sines, half "
                "are cosines."
            )
        for name in ("dropout", "embedding_dropout", "attention_dropout", "activation_dropout"):
            if getattr(self, name) is not None:
                check_dropout_rate(f"model.{name}", getattr(self, name))

    @property
    def description(self) -> str:
        """The model in a few words."""
        depth = f"{self.num_encoder_layers}+{self.num_decoder_layers}"
        return f"Transformer {depth} of {self.model_dim}, {self.norm_order}-norm"

    @property
    def dtypes(self) -> dict[str, Any]:
        """The two types, as arguments of layers."""
        return {"param_dtype": jnp.dtype(self.param_dtype), "compute_dtype": jnp.dtype(self.compute_dtype)}
