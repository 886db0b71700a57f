"""The Transformer encoder-decoder.

This file contains the whole model, from its layers to its decode step. `transformer_config.py` has its settings.

Legend: B batch, S source length, T target length, D model dim, N heads, H head dim, K beams, L layers.

References:
    Vaswani et al. 2017, "Attention Is All You Need", section 3 and figure 1.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from flax_transformer.models.encoder_decoder import EncoderDecoder
from flax_transformer.models.seq2seq import (
    AttentionWeights,
    DecodeState,
    EncoderOutput,
    ParameterRoles,
    StepOutput,
    shift_right,
)
from flax_transformer.models.transformer_config import TransformerConfig
from flax_transformer.nn.attention import (
    AttentionFunction,
    MultiHeadAttention,
    over_history,
    over_source,
    over_tokens,
    over_tokens_with_weights,
)
from flax_transformer.nn.embedding import Embedding, InputEmbedding
from flax_transformer.nn.feed_forward import FeedForward
from flax_transformer.nn.layer_stack import LayerStack
from flax_transformer.nn.normalization import LayerNorm, ResidualNorm
from flax_transformer.ops.attention_mask import AttentionMask
from flax_transformer.ops.cached_attention import CrossAttentionCache, SelfAttentionCache, write_ancestors
from flax_transformer.ops.dropout import split_key
from flax_transformer.shapes import Batch


def _input(config: TransformerConfig, max_length: int, rngs: nnx.Rngs, zero_token: int | None = None) -> InputEmbedding:
    return InputEmbedding(
        config.positions,
        max_length,
        config.model_dim,
        dropout_rate=config.dropout if config.embedding_dropout is None else config.embedding_dropout,
        zero_token=zero_token,
        **config.dtypes,
        rngs=rngs,
    )


def _attention(config: TransformerConfig, rngs: nnx.Rngs) -> MultiHeadAttention:
    return MultiHeadAttention(
        config.model_dim, config.num_heads, dropout_rate=config.attention_dropout, **config.dtypes, rngs=rngs
    )


def _feed_forward(config: TransformerConfig, rngs: nnx.Rngs) -> FeedForward:
    return FeedForward(
        config.model_dim,
        config.feed_forward_dim,
        activation=config.activation,
        dropout_rate=config.activation_dropout,
        **config.dtypes,
        rngs=rngs,
    )


def _residual(config: TransformerConfig) -> ResidualNorm:
    dtype, epsilon = config.dtypes["param_dtype"], config.norm_epsilon
    return ResidualNorm(
        config.model_dim, config.norm_order, dropout_rate=config.dropout, epsilon=epsilon, param_dtype=dtype
    )


def _final_norm(config: TransformerConfig) -> LayerNorm | None:
    """Returns the norm at the end of a stack. Pre-norm needs it, because its layers do not normalise their output."""
    if config.norm_order == "post":
        return None
    return LayerNorm(config.model_dim, epsilon=config.norm_epsilon, param_dtype=config.dtypes["param_dtype"])


class EncoderLayer(nnx.Module):
    """Self-attention and a feed-forward network, each with its residual and norm."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.self_attention = _attention(config, rngs)
        self.self_attention_residual = _residual(config)
        self.feed_forward = _feed_forward(config, rngs)
        self.feed_forward_residual = _residual(config)

    def __call__(
        self, x: Float[Array, "B S D"], attend: AttentionFunction, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "B S D"], Any]:
        """Returns the layer's output, and the auxiliary result of its attention function."""
        keys = split_key(key, 4)
        inner = self.self_attention_residual.enter(x)
        attended, auxiliary = attend(self.self_attention, inner, keys[0])
        x = self.self_attention_residual.leave(x, self.self_attention.output.unbiased(attended), keys[1])
        inner = self.feed_forward_residual.enter(x)
        update = self.feed_forward.down.unbiased(self.feed_forward.hidden(inner, keys[2]))
        return self.feed_forward_residual.leave(x, update, keys[3]), auxiliary


class DecoderLayer(nnx.Module):
    """Causal self-attention, attention over the encoder's output, and a feed-forward network.

    Training, attention weights and decoding differ in their attention functions alone.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.self_attention = _attention(config, rngs)
        self.self_attention_residual = _residual(config)
        self.cross_attention = _attention(config, rngs)
        self.cross_attention_residual = _residual(config)
        self.feed_forward = _feed_forward(config, rngs)
        self.feed_forward_residual = _residual(config)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        attend_self: AttentionFunction,
        attend_source: AttentionFunction,
        key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "B T D"], Any, Any]:
        """Returns the layer's output, and the auxiliary results of its two attention functions.

        Args:
            x: target positions, or in a decoding step one token of each beam (T is then K).
            attend_self: self-attention.
            attend_source: attention over the encoder's output.
            key: random key of dropout; None means evaluation.
        """
        keys = split_key(key, 6)
        inner = self.self_attention_residual.enter(x)
        attended, of_self = attend_self(self.self_attention, inner, keys[0])
        x = self.self_attention_residual.leave(x, self.self_attention.output.unbiased(attended), keys[1])
        inner = self.cross_attention_residual.enter(x)
        attended, of_source = attend_source(self.cross_attention, inner, keys[2])
        x = self.cross_attention_residual.leave(x, self.cross_attention.output.unbiased(attended), keys[3])
        inner = self.feed_forward_residual.enter(x)
        update = self.feed_forward.down.unbiased(self.feed_forward.hidden(inner, keys[4]))
        return self.feed_forward_residual.leave(x, update, keys[5]), of_self, of_source


class Encoder(LayerStack):
    """Input embedding with positions, then a stack of encoder layers."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.input = _input(config, config.max_source_length, rngs)
        super().__init__(
            lambda r: EncoderLayer(config, rngs=r),
            config.num_encoder_layers,
            scan=config.scan_layers,
            rematerialize=config.rematerialize,
            rngs=rngs,
        )
        self.norm = _final_norm(config)

    def __call__(
        self,
        embedding: Embedding,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        segments: Int[Array, "B S"],
        key: PRNGKeyArray | None,
    ) -> Float[Array, "B S D"]:
        """Returns one vector for each source token."""
        input_key, *layer_keys = split_key(key, 1 + self.num_layers)
        attend = over_tokens(self.mask(segments))
        x = self.input(embedding, tokens, positions, input_key)
        x = self.run(lambda layer, x, key: layer(x, attend, key)[0], x, layer_keys)
        return x if self.norm is None else self.norm(x)

    def mask(self, segments: Int[Array, "B S"]) -> AttentionMask:
        """Returns the mask of the self-attention, which all layers share."""
        length = segments.shape[1]
        return AttentionMask(key_segments=segments, query_segments=segments).shared(length, length)

    def with_weights(
        self,
        embedding: Embedding,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        segments: Int[Array, "B S"],
    ) -> tuple[Float[Array, "B S D"], Float[Array, "B L N S S"]]:
        """Returns one vector for each source token, without dropout, and the attention weights of all layers."""
        attend, found = over_tokens_with_weights(self.mask(segments)), []
        x = self.input(embedding, tokens, positions)
        for layer in self.unstacked():
            x, weights = layer(x, attend, None)
            found.append(weights)
        return x if self.norm is None else self.norm(x), jnp.stack(found, axis=1)


class Decoder(LayerStack):
    """Input embedding with positions, then a stack of decoder layers.

    The vector of `zero_start_token` counts as zeros; None names no token.
    """

    def __init__(self, config: TransformerConfig, zero_start_token: int | None, *, rngs: nnx.Rngs):
        self.input = _input(config, config.max_target_length, rngs, zero_start_token)
        super().__init__(
            lambda r: DecoderLayer(config, rngs=r),
            config.num_decoder_layers,
            scan=config.scan_layers,
            rematerialize=config.rematerialize,
            rngs=rngs,
        )
        self.norm = _final_norm(config)

    def __call__(
        self,
        embedding: Embedding,
        inputs: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        encoded: EncoderOutput,
        key: PRNGKeyArray | None,
    ) -> Float[Array, "B T D"]:
        """Returns the hidden vectors of all positions. Each depends on the inputs up to its own position."""
        input_key, *layer_keys = split_key(key, 1 + self.num_layers)
        self_mask, cross_mask = self.masks(segments, encoded.segments)
        functions = over_tokens(self_mask), over_tokens(cross_mask, encoded.states)
        x = self.input(embedding, inputs, positions, input_key)
        x = self.run(lambda layer, x, key: layer(x, *functions, key)[0], x, layer_keys)
        return x if self.norm is None else self.norm(x)

    def masks(self, target: Int[Array, "B T"], source: Int[Array, "B S"]) -> tuple[AttentionMask, AttentionMask]:
        """Returns the masks of self-attention and cross-attention, which all layers share, from the segments."""
        length, source_length = target.shape[1], source.shape[1]
        own = AttentionMask(key_segments=target, query_segments=target, causal=True).shared(length, length)
        cross = AttentionMask(key_segments=source, query_segments=target).shared(length, source_length)
        return own, cross

    def weights(
        self,
        embedding: Embedding,
        inputs: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        encoded: EncoderOutput,
    ) -> tuple[Float[Array, "B L N T T"], Float[Array, "B L N T S"]]:
        """Returns the weights of the self-attention and of the cross-attention of all layers."""
        self_mask, cross_mask = self.masks(segments, encoded.segments)
        functions = over_tokens_with_weights(self_mask), over_tokens_with_weights(cross_mask, encoded.states)
        x, own, cross = self.input(embedding, inputs, positions), [], []
        for layer in self.unstacked():
            x, self_weights, cross_weights = layer(x, *functions, None)
            own.append(self_weights)
            cross.append(cross_weights)
        return jnp.stack(own, axis=1), jnp.stack(cross, axis=1)

    def init_caches(
        self, encoded: EncoderOutput, num_beams: int, max_length: int
    ) -> tuple[tuple[SelfAttentionCache, ...], tuple[CrossAttentionCache, ...]]:
        """Returns the empty self-attention caches and the filled cross-attention caches of all layers."""
        layers = self.unstacked()
        cross = tuple(layer.cross_attention.source_cache(encoded.states) for layer in layers)
        empty = layers[0].self_attention.empty_cache(encoded.states.shape[0], num_beams, max_length)
        return (empty,) * self.num_layers, cross

    def step(
        self,
        embedding: Embedding,
        tokens: Int[Array, "B K"],
        positions: Int[Array, "B"],
        self_caches: tuple[SelfAttentionCache, ...],
        cross_caches: tuple[CrossAttentionCache, ...],
        source_segments: Int[Array, "B S"],
        ancestors: Int[Array, "B K T"] | None,
    ) -> tuple[Float[Array, "B K D"], tuple[SelfAttentionCache, ...], Float[Array, "B K L N S"]]:
        """Returns hidden vectors for one more position, the caches with it, and the attention over the source."""
        cross_mask = AttentionMask(key_segments=source_segments).shared(1, source_segments.shape[1])
        x = self.input(embedding, tokens, jnp.broadcast_to(positions[:, None], tokens.shape))
        new_caches, attention = [], []
        for layer, self_cache, cross_cache in zip(self.unstacked(), self_caches, cross_caches, strict=True):
            functions = over_history(self_cache, positions, ancestors), over_source(cross_cache, cross_mask)
            x, new_cache, weights = layer(x, *functions, None)
            new_caches.append(new_cache)
            attention.append(jnp.swapaxes(weights, 1, 2))  # [B, N, K, S] -> [B, K, N, S]
        x = x if self.norm is None else self.norm(x)
        return x, tuple(new_caches), jnp.stack(attention, axis=2)


class Transformer(EncoderDecoder):
    """An encoder and a decoder of attention layers, with shared or separate embeddings; satisfies `Seq2Seq`.

    Example:
        >>> config = TransformerConfig(model_dim=16, num_heads=2, feed_forward_dim=32)
        >>> model = Transformer(config, source_vocab_size=50, target_vocab_size=50, start_token=1, rngs=nnx.Rngs(0))
        >>> tokens = jnp.ones((2, 5), jnp.int32)
        >>> positions = jnp.broadcast_to(jnp.arange(5), (2, 5))
        >>> model(Batch(tokens, positions, tokens, tokens, positions, tokens)).shape
        (2, 5, 16)

    References:
        Vaswani et al. 2017. This model differs in three points. Sines and cosines of positions are in separate halves
        (see `nn/positions.py`). Projections have biases (see `nn/attention.py`). The vocabulary is padded to a
        multiple.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        source_vocab_size: int,
        target_vocab_size: int,
        start_token: int,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            config,
            source_vocab_size=source_vocab_size,
            target_vocab_size=target_vocab_size,
            start_token=start_token,
            output_bias=config.output_bias,
            zero_start=config.zero_start,
            rngs=rngs,
        )
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, start_token if config.zero_start else None, rngs=rngs)

    def encode(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        segments: Int[Array, "B S"],
        key: PRNGKeyArray | None = None,
    ) -> EncoderOutput:
        """Returns the encoder's output."""
        return EncoderOutput(self.encoder(self.encoder_embedding, tokens, positions, segments, key), segments)

    def __call__(self, batch: Batch, key: PRNGKeyArray | None = None) -> Float[Array, "B T D"]:
        """Returns the decoder's hidden vectors under teacher forcing; `key` None means evaluation."""
        encoder_key, decoder_key = split_key(key, 2)
        encoded = self.encode(batch.source_tokens, batch.source_positions, batch.source_segments, encoder_key)
        inputs = shift_right(batch.target_tokens, batch.target_positions, self.start_token)
        return self.decoder(
            self.target_embedding, inputs, batch.target_positions, batch.target_segments, encoded, decoder_key
        )

    def attention_weights(self, batch: Batch) -> AttentionWeights:
        """Returns the weights of every layer and head under teacher forcing, without dropout."""
        states, of_encoder = self.encoder.with_weights(
            self.encoder_embedding, batch.source_tokens, batch.source_positions, batch.source_segments
        )
        encoded = EncoderOutput(states, batch.source_segments)
        inputs = shift_right(batch.target_tokens, batch.target_positions, self.start_token)
        of_decoder, cross = self.decoder.weights(
            self.target_embedding, inputs, batch.target_positions, batch.target_segments, encoded
        )
        return AttentionWeights(of_encoder, of_decoder, cross)

    def init_decode_state(
        self, encoded: EncoderOutput, num_beams: int, max_length: int, reordered: bool = True
    ) -> DecodeState:
        """Returns the state before the first token, with the cross-attention caches filled and the others empty."""
        self_caches, cross_caches = self.decoder.init_caches(encoded, num_beams, max_length)
        positions = jnp.zeros((encoded.states.shape[0],), jnp.int32)
        ancestors = jnp.zeros((encoded.states.shape[0], num_beams, max_length), jnp.int32) if reordered else None
        return DecodeState((cross_caches, encoded.segments), ancestors, self_caches, positions)

    def decode_step(self, tokens: Int[Array, "B K"], state: DecodeState) -> tuple[StepOutput, DecodeState]:
        """Returns scores for the token after `tokens`, and the state after reading `tokens`."""
        cross_caches, source_segments = state.per_sentence
        ancestors = None if state.per_beam is None else write_ancestors(state.per_beam, state.positions)
        hidden, caches, attention = self.decoder.step(
            self.target_embedding, tokens, state.positions, state.append_only, cross_caches, source_segments, ancestors
        )
        output = StepOutput(self.output_projection().logits(hidden), attention)
        return output, DecodeState(state.per_sentence, ancestors, caches, state.positions + 1)

    def parameter_roles(self) -> ParameterRoles:
        """Returns how often each kernel is applied. Cross-attention computes keys and values from source tokens."""
        cross_attention = self.decoder.layers.cross_attention
        return ParameterRoles(
            per_source_token=(self.encoder, cross_attention.key, cross_attention.value),
            per_target_token=(self.decoder,),
            output_table=self.decoder_output_embedding.table,
        )
