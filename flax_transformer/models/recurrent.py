"""The recurrent encoder-decoder, without attention and with it: the Transformer's two ancestors.

Without attention the decoder sees only the encoder's last state. With attention the decoder scores every encoder state
at each step. The states are summed with the softmax of their scores as weights. This context is joined to the decoder's
input or output.

This file contains the whole model, from its layers to its decode step. `recurrent_config.py` has its settings.

Legend: B batch, S source length, T target length, D model dim (embeddings and readout), U recurrent units, K beams.

References:
    Sutskever et al. 2014 and Cho et al. 2014 (no attention); Bahdanau et al. 2015; Luong et al. 2015.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from flax_transformer.models.encoder_decoder import EncoderDecoder
from flax_transformer.models.recurrent_config import RecurrentConfig
from flax_transformer.models.seq2seq import (
    AttentionWeights,
    DecodeState,
    EncoderOutput,
    ParameterRoles,
    StepOutput,
    shift_right,
)
from flax_transformer.nn.additive_attention import attend, make_attention
from flax_transformer.nn.linear import Linear
from flax_transformer.nn.recurrent import CELLS, State, run_over_time
from flax_transformer.ops.dropout import dropout, split_key
from flax_transformer.shapes import Batch, array_tree


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
            in_dim = config.model_dim if layer == 0 else config.hidden_dim
            for direction in directions:
                cells[f"{direction}_{layer:02d}"] = CELLS[config.cell](in_dim, units, **config.dtypes, rngs=rngs)
        self.cells = nnx.Dict(cells)

    def __call__(
        self, x: Float[Array, "B S D"], segments: Int[Array, "B S"], key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "B S U"], list[State]]:
        """Returns the top layer's hidden vectors, and each layer's last state with both directions concatenated."""
        last_states = []
        for layer, layer_key in enumerate(split_key(key, self.num_layers)):
            if layer:
                x = dropout(x, self.dropout_rate, layer_key)
            runs = [
                run_over_time(self.cells[f"{direction}_{layer:02d}"], x, segments > 0, reverse=direction == "backward")
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
                    maps[f"{layer:02d}_{state}"] = Linear(units, units, axes, **config.dtypes, rngs=rngs)
        self.maps = nnx.Dict(maps) if maps else None

    def __call__(self, encoder_states: list[State]) -> list[State]:
        """Returns one state for each decoder layer, [B, U] each."""
        states = [encoder_states[min(layer, len(encoder_states) - 1)] for layer in range(self.num_layers)]
        if self.maps is None:
            return states
        mapped = []
        for layer, state in enumerate(states):
            parts = [self.maps[f"{layer:02d}_{i}"](part) for i, part in enumerate(state)]
            mapped.append((jnp.tanh(parts[0]), *parts[1:]))
        return mapped


@array_tree
@dataclasses.dataclass(frozen=True)
class AttendedEncoderOutput:
    """Arrays of a source sentence that the decoder reads at every step. The first axis of each leaf is B.

    Attributes:
        states: [B, S, U], states of the encoder.
        keys: [B, S, A], the encoder's part of the scores; None without attention.
        mask: [B, S], True for tokens.
    """

    states: Any
    keys: Any
    mask: Any


@array_tree
@dataclasses.dataclass(frozen=True)
class RecurrentState:
    """The state of a decoder between steps. The first axes of each leaf are B and K.

    Attributes:
        layers: state of each layer, [B, K, U] each.
        attentional: [B, K, D], the attentional vector of the step before; None without input feeding.
    """

    layers: Any
    attentional: Any


class RecurrentDecoder(nnx.Module):
    """A stack of recurrent layers with a readout, and attention at the configured place.

    One step reads the embedding e of the last token and the states s of the layers. In attend and readout, s is the top
    layer's hidden vector before the step. s' is that vector after the step:

        no attention   s' = cells(e);            readout = tanh(W s')
        input          c = attend(s);            s' = cells([e; c]);     readout = tanh(W [s'; c; e])
        output         s' = cells(e or [e; a]);  c = attend(s');         readout = a' = tanh(W [s'; c])

    Here a is the attentional vector of the step before (input feeding). Bahdanau et al. 2015 read out through a maxout
    layer (appendix A.2.2). This readout is one tanh layer of the embeddings' width, so it can share their table. A
    context that joins the input is added to every gate through its own kernel, as in the GRU of Bahdanau et al.
    """

    def __init__(self, config: RecurrentConfig, *, rngs: nnx.Rngs):
        self.dropout_rate = config.dropout
        self.join = config.join
        self.input_feeding = config.input_feeding
        self.num_layers = config.num_decoder_layers
        self.model_dim = config.model_dim
        self.compute_dtype = jnp.dtype(config.compute_dtype)
        units, dim = config.hidden_dim, config.model_dim
        context_dim = {"none": 0, "input": units, "output": dim if config.input_feeding else 0}[config.join]
        cells = {}
        for layer in range(config.num_decoder_layers):
            sizes = (dim, units, context_dim) if layer == 0 else (units, units)
            cells[f"{layer:02d}"] = CELLS[config.cell](*sizes, **config.dtypes, rngs=rngs)
        self.cells = nnx.Dict(cells)
        kind = config.attention
        self.alignment = None if kind == "none" else make_attention(kind, units, **config.dtypes, rngs=rngs)
        width = {"none": units, "input": 2 * units + dim, "output": 2 * units}[config.join]
        self.readout = Linear((width,), (dim,), ("recurrent", "embed"), **config.dtypes, rngs=rngs)

    def read(self, encoded: EncoderOutput) -> AttendedEncoderOutput:
        """Returns the arrays of the source that every step reads."""
        keys = None if self.alignment is None else self.alignment.keys(encoded.states)
        return AttendedEncoderOutput(encoded.states, keys, encoded.segments > 0)

    def start(self, layers: list[State], num_beams: int) -> RecurrentState:
        """Returns the state before the first token, [B, U] -> [B, K, U]."""
        rows = layers[0][0].shape[0]

        def over_beams(part):
            return jnp.broadcast_to(part[:, None, :], (rows, num_beams, part.shape[-1]))

        attentional = None
        if self.input_feeding:
            attentional = jnp.zeros((rows, num_beams, self.model_dim), self.compute_dtype)
        return RecurrentState(tuple(tuple(over_beams(p) for p in state) for state in layers), attentional)

    def attend(self, query: Float[Array, "B K U"], encoded: AttendedEncoderOutput) -> tuple[jax.Array, jax.Array]:
        """Returns context vectors [B, K, U] and weights [B, K, S] for decoder states."""
        assert self.alignment is not None, "only a decoder with attention attends"
        return attend(self.alignment.scores(query, encoded.keys), encoded.states, encoded.mask)

    def read_input(self, embedded: Float[Array, "B T D"]) -> Float[Array, "B T GU"]:
        """Returns the tokens' part of the first layer's gates, for any number of time steps or beams at once."""
        return self.cells["00"].project(embedded)

    def advance(
        self,
        gates: Float[Array, "B K GU"],
        state: RecurrentState,
        encoded: AttendedEncoderOutput,
        key: PRNGKeyArray | None,
    ) -> tuple[tuple[State, ...], Float[Array, "B K U"] | None, Float[Array, "B K S"] | None]:
        """Returns the layers' states after one more token, and the context and its weights if it joins the input.

        Args:
            gates: the token's part of the first layer's gates.
            state: state before the token.
            encoded: the source, from `read`.
            key: random key of dropout between layers; None means evaluation.
        """
        keys = split_key(key, self.num_layers)
        context = weights = None
        if self.join == "input":
            context, weights = self.attend(state.layers[-1][0], encoded)
            gates = gates + self.cells["00"].project_context(context)
        elif self.input_feeding:
            gates = gates + self.cells["00"].project_context(state.attentional)
        layers = [self.cells["00"].step(state.layers[0], gates)]
        for layer in range(1, self.num_layers):
            cell = self.cells[f"{layer:02d}"]
            x = dropout(layers[-1][0], self.dropout_rate, keys[layer])
            layers.append(cell.step(state.layers[layer], cell.project(x)))
        return tuple(layers), context, weights

    def read_out(
        self,
        top: Float[Array, "B T U"],
        context: Float[Array, "B T U"] | None,
        embedded: Float[Array, "B T D"],
        encoded: AttendedEncoderOutput,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T S"] | None]:
        """Returns readouts, and the weights if the context joins the output, for any number of steps or beams at once.

        Args:
            top: hidden vectors of the top layer after the tokens.
            context: the context from `advance`.
            embedded: embeddings of the tokens.
            encoded: the source, from `read`.
        """
        weights = None
        parts = [top]
        if self.join == "input":
            assert context is not None, "the context joined the input, so it was made before"
            parts += [context, embedded]
        elif self.join == "output":
            context, weights = self.attend(top, encoded)
            parts.append(context)
        return jnp.tanh(self.readout(jnp.concatenate(parts, axis=-1))), weights

    def step(
        self, embedded: Float[Array, "B K D"], state: RecurrentState, encoded: AttendedEncoderOutput
    ) -> tuple[Float[Array, "B K D"], Float[Array, "B K S"] | None, RecurrentState]:
        """Returns the readout, the attention weights (None without attention) and the state after one more token."""
        layers, context, input_weights = self.advance(self.read_input(embedded), state, encoded, None)
        readout, output_weights = self.read_out(layers[-1][0], context, embedded, encoded)
        weights = input_weights if output_weights is None else output_weights
        return readout, weights, RecurrentState(layers, readout if self.input_feeding else None)

    def __call__(
        self,
        embedded: Float[Array, "B T D"],
        start: RecurrentState,
        encoded: AttendedEncoderOutput,
        key: PRNGKeyArray | None,
    ) -> Float[Array, "B T D"]:
        """Returns the readouts of a whole target, whose tokens are known.

        Only the parts that the state depends on run step by step. These are the layers, a context that joins their
        input, and a readout that is fed back. The rest is computed for all steps at once, in large products.
        """
        layer_key, readout_key = split_key(key, 2)
        keys = None if layer_key is None else jax.random.split(layer_key, embedded.shape[1])

        def body(state: RecurrentState, at_time: Any) -> tuple[RecurrentState, Any]:
            gates, x, step_key = at_time
            layers, context, _ = self.advance(gates[:, None], state, encoded, step_key)
            if not self.input_feeding:
                return RecurrentState(layers, None), (layers[-1][0], context)
            readout, _ = self.read_out(layers[-1][0], context, x[:, None], encoded)
            return RecurrentState(layers, readout), readout

        over_time = (jnp.moveaxis(self.read_input(embedded), 1, 0), jnp.moveaxis(embedded, 1, 0), keys)
        _, made = jax.lax.scan(body, start, over_time)
        made = jax.tree.map(lambda a: jnp.moveaxis(a[:, :, 0], 0, 1), made)  # [T, B, 1, ...] -> [B, T, ...]
        if not self.input_feeding:
            top, context = made
            made, _ = self.read_out(top, context, embedded, encoded)
        return dropout(made, self.dropout_rate, readout_key)


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
        self.compute_dtype = jnp.dtype(config.compute_dtype)
        self.encoder = RecurrentEncoder(config, rngs=rngs)
        self.bridge = Bridge(config, rngs=rngs)
        self.decoder = RecurrentDecoder(config, rngs=rngs)

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
