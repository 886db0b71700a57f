"""What all encoder-decoders here share: tables of tokens, the map to logits, lengths.

Legend: V vocabulary, D model dim.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from flax_transformer.nn.embedding import Embedding, make_embeddings, round_up
from flax_transformer.ops.vocabulary import OutputProjection, without_row


class EncoderDecoder(nnx.Module):
    """The tables of an encoder-decoder, shared or separate; a model adds its encoder and its decoder.

    Attributes:
        target_embedding: of the decoder's input; the one table where a table is shared.
        source_embedding: of the encoder's input; None where it is the target's.
        output_embedding: rows of the map to logits; None where it is the target's.
        output_bias: [V], added to the logits, or None.
        prepared_projection: holds the map to logits as a search reads it; None unless the model was prepared for that.
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
            config: of the model; its sizes, `share_embeddings`, `vocab_multiple` and `param_dtype` are read.
            source_vocab_size: number of real source ids.
            target_vocab_size: number of real target ids.
            start_token: target id that the decoder reads first.
            output_bias: whether one learnt number is added to each token's logit.
            zero_start: whether the start token's row is zeros where the target's table makes logits.
            rngs: random numbers.
        """
        self.config = config
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
        """The table that the encoder reads."""
        return self.target_embedding if self.source_embedding is None else self.source_embedding

    @property
    def decoder_output_embedding(self) -> Embedding:
        """The table whose rows make logits."""
        return self.target_embedding if self.output_embedding is None else self.output_embedding

    @property
    def zeroes_output_row(self) -> bool:
        """Whether the start token's row makes logits as zeros: its vector is zero in both uses of a shared table."""
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
