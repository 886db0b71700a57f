"""The recurrent encoder-decoder, without attention and with it: the Transformer's two ancestors.

This file contains the encoder, the bridge from it to the decoder, and the whole model. `recurrent_decoder.py` has the
decoders, and `recurrent_config.py` the settings.

Legend: B batch, S source length, T target length, D model dim (embeddings and readout), U recurrent units, K beams.

References:
    Sutskever et al. 2014 and Cho et al. 2014 (no attention); Bahdanau et al. 2015; Luong et al. 2015.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from flax_transformer.models.encoder_decoder import EncoderDecoder
from flax_transformer.models.recurrent_config import RecurrentConfig
from flax_transformer.models.recurrent_decoder import make_decoder
from flax_transformer.models.seq2seq import (
    AttentionWeights,
    DecodeState,
    EncoderOutput,
    ParameterRoles,
    StepOutput,
    shift_right,
)
from flax_transformer.nn.linear import Linear
from flax_transformer.nn.recurrent import CELLS, State, layer_name, run_over_time
from flax_transformer.ops.dropout import dropout, split_key
from flax_transformer.shapes import Batch


class RecurrentEncoder(nnx.Module):
    """A stack of recurrent layers. Each reads the output of the layer below in one or both directions."""

    def __init__(self, config: RecurrentConfig, *, rngs: nnx.Rngs):
        self.dropout_rate = config.dropout
        self.num_layers = config.num_encoder_layers
        directions = ("forward", "backward") if config.encoder_bidirectional else ("forward",)
        self.directions = directions
        units = config.hidden_dim // len(directions)
        cells = {}
        for layer in range(config.num_encoder_layers):
            in_dim, name = config.model_dim if layer == 0 else config.hidden_dim, layer_name(layer)
            for direction in directions:
                cells[f"{direction}_{name}"] = CELLS[config.cell](in_dim, units, **config.dtypes, rngs=rngs)
        self.cells = nnx.Dict(cells)

    def __call__(
        self, x: Float[Array, "B S D"], segments: Int[Array, "B S"], key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "B S U"], list[State]]:
        """Returns the top layer's hidden vectors, and each layer's last state with both directions concatenated."""
        last_states = []
        for layer, layer_key in enumerate(split_key(key, self.num_layers)):
            if layer:
                x = dropout(x, self.dropout_rate, layer_key)
            name = layer_name(layer)
            runs = [
                run_over_time(self.cells[f"{direction}_{name}"], x, segments > 0, reverse=direction == "backward")
                for direction in self.directions
            ]
            x = jnp.concatenate([hidden for hidden, _ in runs], axis=-1)
            last_states.append(
                tuple(jnp.concatenate(parts, axis=-1) for parts in zip(*(s for _, s in runs), strict=True))
            )
        return x, last_states


class Bridge(nnx.Module):
    """Maps the encoder's last states to the decoder's first states.

    Decoder layer l starts from encoder layer l, or from the deepest encoder layer. A unidirectional encoder's state is
    used unchanged (Sutskever et al. 2014). The two states of a bidirectional encoder are concatenated. Each layer and
    state then has its own affine map, followed by tanh for hidden vectors. Bahdanau et al. 2015 (appendix A.2.2) map
    only the backward state; here both are mapped.
    """

    def __init__(self, config: RecurrentConfig, *, rngs: nnx.Rngs):
        self.num_layers = config.num_decoder_layers
        maps = {}
        if config.encoder_bidirectional:
            units, axes = (config.hidden_dim,), ("recurrent", "recurrent")
            for layer in range(config.num_decoder_layers):
                for state in range(CELLS[config.cell].num_states):
                    maps[f"{layer_name(layer)}_{state}"] = Linear(units, units, axes, **config.dtypes, rngs=rngs)
        self.maps = nnx.Dict(maps) if maps else None

    def __call__(self, encoder_states: list[State]) -> list[State]:
        """Returns one state for each decoder layer, [B, U] each."""
        states = [encoder_states[min(layer, len(encoder_states) - 1)] for layer in range(self.num_layers)]
        if self.maps is None:
            return states
        mapped = []
        for layer, state in enumerate(states):
            parts = [self.maps[f"{layer_name(layer)}_{i}"](part) for i, part in enumerate(state)]
            mapped.append((jnp.tanh(parts[0]), *parts[1:]))
        return mapped


class RecurrentSeq2Seq(EncoderDecoder):
    """A recurrent encoder and decoder; satisfies `Seq2Seq`.

    Example:
        >>> config = RecurrentConfig(model_dim=8, hidden_dim=16, attention="dot")
        >>> sizes = {"source_vocab_size": 50, "target_vocab_size": 50}
        >>> model = RecurrentSeq2Seq(config, **sizes, start_token=1, rngs=nnx.Rngs(0))
        >>> tokens = jnp.ones((2, 5), jnp.int32)
        >>> positions = jnp.broadcast_to(jnp.arange(5), (2, 5))
        >>> model(Batch(tokens, positions, tokens, tokens, positions, tokens)).shape
        (2, 5, 8)
    """

    def __init__(
        self,
        config: RecurrentConfig,
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
            rngs=rngs,
        )
        self.encoder = RecurrentEncoder(config, rngs=rngs)
        self.bridge = Bridge(config, rngs=rngs)
        self.decoder = make_decoder(config, rngs=rngs)

    def encode(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        segments: Int[Array, "B S"],
        key: PRNGKeyArray | None = None,
    ) -> EncoderOutput:
        """Returns the encoder's output. Positions are not used, since recurrence follows the order of the tokens."""
        input_key, encoder_key = split_key(key, 2)
        x = dropout(self.encoder_embedding(tokens).astype(self.compute_dtype), self.config.dropout, input_key)
        states, last = self.encoder(x, segments, encoder_key)
        return EncoderOutput(states, segments, self.bridge(last))

    def __call__(self, batch: Batch, key: PRNGKeyArray | None = None) -> Float[Array, "B T D"]:
        """Returns the decoder's readouts under teacher forcing; `key` None means evaluation."""
        encoder_key, input_key, decoder_key = split_key(key, 3)
        encoded = self.encode(batch.source_tokens, batch.source_positions, batch.source_segments, encoder_key)
        inputs = shift_right(batch.target_tokens, batch.target_positions, self.start_token)
        embedded = self.target_embedding(inputs).astype(self.compute_dtype)
        embedded = dropout(embedded, self.config.dropout, input_key)
        start = self.decoder.start(encoded.decoder_start, 1)
        return self.decoder(embedded, start, self.decoder.read(encoded), decoder_key)

    def attention_weights(self, batch: Batch) -> AttentionWeights:
        """Returns the weights over the source, of one layer with one head; None without attention."""
        if self.decoder.alignment is None:
            return AttentionWeights(None, None, None)
        encoded = self.encode(batch.source_tokens, batch.source_positions, batch.source_segments)
        inputs = shift_right(batch.target_tokens, batch.target_positions, self.start_token)

        def step(state: DecodeState, tokens: Int[Array, "B"]) -> tuple[DecodeState, Float[Array, "B S"]]:
            output, state = self.decode_step(tokens[:, None], state)
            assert output.attention is not None, "a decoder with attention returns its weights"
            return state, output.attention[:, 0, 0, 0]

        _, weights = jax.lax.scan(step, self.init_decode_state(encoded, 1, inputs.shape[1]), inputs.T)
        return AttentionWeights(None, None, jnp.swapaxes(weights, 0, 1)[:, None, None])  # [T, B, S] -> [B, 1, 1, T, S]

    def init_decode_state(
        self, encoded: EncoderOutput, num_beams: int, max_length: int, reordered: bool = True
    ) -> DecodeState:
        """Returns the state before the first token. Its size depends on neither `max_length` nor `reordered`."""
        del max_length, reordered
        positions = jnp.zeros((encoded.states.shape[0],), jnp.int32)
        start = self.decoder.start(encoded.decoder_start, num_beams)
        return DecodeState(self.decoder.read(encoded), start, None, positions)

    def decode_step(self, tokens: Int[Array, "B K"], state: DecodeState) -> tuple[StepOutput, DecodeState]:
        """Returns scores for the token after `tokens`, and the state after reading `tokens`."""
        embedded = self.target_embedding(tokens).astype(self.compute_dtype)
        readout, weights, new = self.decoder.step(embedded, state.per_beam, state.per_sentence)
        attention = None if weights is None else weights[:, :, None, None, :]  # one layer, one head
        output = StepOutput(self.output_projection().logits(readout), attention)
        return output, dataclasses.replace(state, per_beam=new, positions=state.positions + 1)

    def parameter_roles(self) -> ParameterRoles:
        """Returns how often each kernel is applied. Attention computes its keys from source tokens."""
        alignment = self.decoder.alignment
        keys = () if alignment is None or alignment.key is None else (alignment.key,)
        return ParameterRoles(
            per_source_token=(self.encoder, *keys),
            per_target_token=(self.decoder,),
            output_table=self.decoder_output_embedding.table,
            per_sentence=(self.bridge,),
        )
