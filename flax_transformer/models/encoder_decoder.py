"""The base class of all encoder-decoders: token tables, output projection, length limits.

Legend: V vocabulary, D model dim.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from flax_transformer.nn.embedding import Embedding, make_embeddings, round_up
from flax_transformer.ops.vocabulary import OutputProjection, without_row


class EncoderDecoder(nnx.Module):
    """The token tables of an encoder-decoder, shared or separate. A model adds its encoder and its decoder.

    Attributes:
        target_embedding: table of the decoder's input. Roles that share a table use this one.
        source_embedding: table of the encoder's input; None if it is `target_embedding`.
        output_embedding: table of the output projection; None if it is `target_embedding`.
        output_bias: [V], added to the logits, or None.
        prepared_projection: output projection in the form that a search reads; None unless the model is prepared for
            it.
        compute_dtype: type of products and activations.

    Example:
        >>> from flax_transformer import TransformerConfig
        >>> config = TransformerConfig(model_dim=8, num_heads=2)
        >>> tables = EncoderDecoder(config, source_vocab_size=20, target_vocab_size=20, start_token=1, rngs=nnx.Rngs(0))
        >>> tables.output_projection().kernel.shape, tables.output_projection().num_real_rows
        ((24, 8), 20)
    """

    def __init__(
        self,
        config: Any,
        *,
        source_vocab_size: int,
        target_vocab_size: int,
        start_token: int,
        output_bias: bool = False,
        zero_start: bool = False,
        rngs: nnx.Rngs,
    ):
        """Makes the tables.

        Args:
            config: configuration of the model. Its sizes, `share_embeddings`, `vocab_multiple`, `param_dtype` and
                `compute_dtype` are read.
            source_vocab_size: number of source ids.
            target_vocab_size: number of target ids.
            start_token: target id that the decoder reads first.
            output_bias: whether one learnt number is added to each token's logit.
            zero_start: whether the start token's row counts as zeros in an output projection that shares the target's
                table.
            rngs: random numbers for the parameters.
        """
        self.config = config
        self.compute_dtype = jnp.dtype(config.compute_dtype)
        self.target_vocab_size = target_vocab_size
        self.start_token = start_token
        self.zero_start = zero_start
        self.target_embedding, self.source_embedding, self.output_embedding = make_embeddings(
            config.share_embeddings,
            source_vocab_size,
            target_vocab_size,
            config.model_dim,
            vocab_multiple=config.vocab_multiple,
            param_dtype=jnp.dtype(config.param_dtype),
            rngs=rngs,
        )
        bias = jnp.zeros((round_up(target_vocab_size, config.vocab_multiple),), jnp.dtype(config.param_dtype))
        self.output_bias = nnx.Param(bias, logical_axes=("vocab",)) if output_bias else None
        self.prepared_projection: nnx.Param | None = None

    def set_prepared_projection(self, projection: OutputProjection) -> None:
        """Makes `output_projection` return `projection`, which has the form that a search reads."""
        self.prepared_projection = nnx.data(nnx.Param(projection, logical_axes=("vocab", "embed")))

    @property
    def max_source_length(self) -> int:
        """The most source tokens of one sentence."""
        return self.config.max_source_length

    @property
    def max_target_length(self) -> int:
        """The most target tokens of one sentence."""
        return self.config.max_target_length

    @property
    def encoder_embedding(self) -> Embedding:
        """The table of the encoder's input."""
        return self.target_embedding if self.source_embedding is None else self.source_embedding

    @property
    def decoder_output_embedding(self) -> Embedding:
        """The table of the output projection."""
        return self.target_embedding if self.output_embedding is None else self.output_embedding

    @property
    def zeroes_output_row(self) -> bool:
        """Whether the start token's row counts as zeros in the output projection."""
        return self.zero_start and self.output_embedding is None

    def output_projection(self) -> OutputProjection:
        """Returns the map from hidden vectors to logits."""
        if self.prepared_projection is not None:
            return self.prepared_projection.get_value()
        kernel = self.decoder_output_embedding.table.get_value()
        if self.zeroes_output_row:
            kernel = without_row(kernel, self.start_token)
        bias = None if self.output_bias is None else self.output_bias[...]
        return OutputProjection(kernel, bias, self.target_vocab_size)
