"""The recurrent decoders: without attention, Bahdanau's, and Luong's without and with input feeding.

Without attention the decoder sees only the encoder's last state. With attention the decoder scores every encoder state
at each step. The states are summed with the softmax of their scores as weights. This context is joined to the decoder's
input or output.

Legend: B batch, S source length, T target length, D model dim (embeddings and readout), U recurrent units, K beams.

References:
    Sutskever et al. 2014 and Cho et al. 2014 (no attention); Bahdanau et al. 2015; Luong et al. 2015.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from flax_transformer.models.recurrent_config import RecurrentConfig
from flax_transformer.models.seq2seq import EncoderOutput
from flax_transformer.nn.linear import Linear
from flax_transformer.nn.recurrent import CELLS, RecurrentCell, State, layer_name
from flax_transformer.nn.recurrent_attention import attend, make_attention
from flax_transformer.ops.dropout import dropout, split_key
from flax_transformer.shapes import array_tree


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


# The state after a token, what `read_out` reads of this step, and the attention weights if they are known already.
Advanced = tuple[RecurrentState, tuple[jax.Array, ...], jax.Array | None]
# Readouts, and the attention weights if they were not known before.
ReadOut = tuple[jax.Array, jax.Array | None]


class RecurrentDecoder(nnx.Module):
    """A stack of recurrent layers with a readout; the base of all decoders, and itself the one without attention.

    One step reads the embedding e of the last token and the states s of the layers. In attend and readout, s is the top
    layer's hidden vector before the step. s' is that vector after the step. Without attention:

        s' = cells(e);   readout = tanh(W s')

    A decoder with attention replaces two functions. What the next state depends on is in `advance`, which runs step by
    step. The rest is in `read_out`. Training computes it for all steps at once, in large products.

    Bahdanau et al. 2015 read out through a maxout layer (appendix A.2.2). This readout is one tanh layer of the
    embeddings' width, so it can share their table.
    """

    def __init__(
        self, config: RecurrentConfig, *, context_dim: int = 0, readout_dim: int | None = None, rngs: nnx.Rngs
    ):
        """Makes the layers.

        Args:
            config: sizes and options.
            context_dim: width of the vector that the first layer reads beside e; 0 for none.
            readout_dim: width of what the readout reads; that of s' when None.
            rngs: random numbers for the parameters.
        """
        self.dropout_rate = config.dropout
        self.num_layers = config.num_decoder_layers
        self.compute_dtype = jnp.dtype(config.compute_dtype)
        units, dim = config.hidden_dim, config.model_dim
        self.model_dim = dim
        cells = {}
        for layer in range(config.num_decoder_layers):
            sizes = (dim, units, context_dim) if layer == 0 else (units, units)
            cells[layer_name(layer)] = CELLS[config.cell](*sizes, **config.dtypes, rngs=rngs)
        self.cells = nnx.Dict(cells)
        kind = config.attention
        self.alignment = None if kind == "none" else make_attention(kind, units, **config.dtypes, rngs=rngs)
        axes = ("recurrent", "embed")
        self.readout = Linear((readout_dim or units,), (dim,), axes, **config.dtypes, rngs=rngs)

    @property
    def first_cell(self) -> RecurrentCell:
        """The layer that reads the embedding, and a context if there is one."""
        return self.cells[layer_name(0)]

    def read(self, encoded: EncoderOutput) -> AttendedEncoderOutput:
        """Returns the arrays of the source that every step reads."""
        keys = None if self.alignment is None else self.alignment.keys(encoded.states)
        return AttendedEncoderOutput(encoded.states, keys, encoded.segments > 0)

    def start(self, layers: list[State], num_beams: int) -> RecurrentState:
        """Returns the state before the first token, [B, U] -> [B, K, U]."""
        rows = layers[0][0].shape[0]

        def over_beams(part):
            return jnp.broadcast_to(part[:, None, :], (rows, num_beams, part.shape[-1]))

        return RecurrentState(tuple(tuple(over_beams(p) for p in state) for state in layers), None)

    def advance(
        self,
        gates: Float[Array, "B K GU"],
        state: RecurrentState,
        encoded: AttendedEncoderOutput,
        keys: list[PRNGKeyArray | None],
    ) -> Advanced:
        """Returns the state after one more token, what `read_out` reads of this step, and the weights if made here.

        Args:
            gates: the token's part of the first layer's gates, from `read_input`.
            state: state before the token.
            encoded: the source, from `read`.
            keys: random keys of dropout between layers, one for each layer; None means evaluation.
        """
        layers = self.run_layers(gates, state.layers, keys)
        return RecurrentState(layers, None), (layers[-1][0],), None

    def read_out(
        self, parts: tuple[jax.Array, ...], embedded: Float[Array, "B T D"], encoded: AttendedEncoderOutput
    ) -> ReadOut:
        """Returns readouts [B, T, D], and the weights [B, T, S] if they are made here.

        Any number of steps or beams may be given at once.

        Args:
            parts: what `advance` returned for these steps.
            embedded: embeddings of the tokens.
            encoded: the source, from `read`.
        """
        return self.readout_of(*parts), None

    # --- what these functions are made of

    def read_input(self, embedded: Float[Array, "B T D"]) -> Float[Array, "B T GU"]:
        """Returns the tokens' part of the first layer's gates, for any number of time steps or beams at once."""
        return self.first_cell.project(embedded)

    def run_layers(
        self, gates: Float[Array, "B K GU"], states: tuple[State, ...], keys: list[PRNGKeyArray | None]
    ) -> tuple[State, ...]:
        """Returns the state of each layer after one more token, from all gates of the first layer."""
        new = [self.first_cell.step(states[0], gates)]
        for layer in range(1, self.num_layers):
            cell = self.cells[layer_name(layer)]
            x = dropout(new[-1][0], self.dropout_rate, keys[layer])
            new.append(cell.step(states[layer], cell.project(x)))
        return tuple(new)

    def attend(self, query: Float[Array, "B K U"], encoded: AttendedEncoderOutput) -> tuple[jax.Array, jax.Array]:
        """Returns context vectors [B, K, U] and weights [B, K, S] for decoder states."""
        assert self.alignment is not None, "only a decoder with attention attends"
        return attend(self.alignment.scores(query, encoded.keys), encoded.states, encoded.mask)

    def readout_of(self, *parts: Float[Array, "B T _"]) -> Float[Array, "B T D"]:
        """Returns tanh(W [parts])."""
        return jnp.tanh(self.readout(jnp.concatenate(parts, axis=-1)))

    # --- one step, and all steps of a target that is known

    def step(
        self, embedded: Float[Array, "B K D"], state: RecurrentState, encoded: AttendedEncoderOutput
    ) -> tuple[Float[Array, "B K D"], Float[Array, "B K S"] | None, RecurrentState]:
        """Returns the readout, the attention weights (None without attention) and the state after one more token."""
        state, parts, early_weights = self.advance(self.read_input(embedded), state, encoded, [None] * self.num_layers)
        readout, late_weights = self.read_out(parts, embedded, encoded)
        return readout, early_weights if late_weights is None else late_weights, state

    def __call__(
        self,
        embedded: Float[Array, "B T D"],
        start: RecurrentState,
        encoded: AttendedEncoderOutput,
        key: PRNGKeyArray | None,
    ) -> Float[Array, "B T D"]:
        """Returns the readouts of a whole target, whose tokens are known."""
        layer_key, readout_key = split_key(key, 2)
        keys = None if layer_key is None else jax.random.split(layer_key, embedded.shape[1])

        def body(state: RecurrentState, at_time: Any) -> tuple[RecurrentState, Any]:
            gates, step_key = at_time
            state, parts, _ = self.advance(gates[:, None], state, encoded, split_key(step_key, self.num_layers))
            return state, parts

        _, parts = jax.lax.scan(body, start, (jnp.moveaxis(self.read_input(embedded), 1, 0), keys))
        parts = jax.tree.map(lambda a: jnp.moveaxis(a[:, :, 0], 0, 1), parts)  # [T, B, 1, ...] -> [B, T, ...]
        readouts, _ = self.read_out(parts, embedded, encoded)
        return dropout(readouts, self.dropout_rate, readout_key)


class BahdanauDecoder(RecurrentDecoder):
    """A decoder whose context joins its input.

        c = attend(s);   s' = cells([e; c]);   readout = tanh(W [s'; c; e])

    The context is added to every gate through its own kernel, as in the GRU of the paper.

    References:
        Bahdanau et al. 2015, section 3.1 and appendix A.2.2.
    """

    def __init__(self, config: RecurrentConfig, *, rngs: nnx.Rngs):
        units = config.hidden_dim
        super().__init__(config, context_dim=units, readout_dim=2 * units + config.model_dim, rngs=rngs)

    def advance(
        self, gates: jax.Array, state: RecurrentState, encoded: AttendedEncoderOutput, keys: list[PRNGKeyArray | None]
    ) -> Advanced:
        """Returns the new state, s' and c for `read_out`, and the weights of the attention before the step."""
        context, weights = self.attend(state.layers[-1][0], encoded)
        layers = self.run_layers(gates + self.first_cell.project_context(context), state.layers, keys)
        return RecurrentState(layers, None), (layers[-1][0], context), weights

    def read_out(self, parts: tuple[jax.Array, ...], embedded: jax.Array, encoded: AttendedEncoderOutput) -> ReadOut:
        """Returns readouts. `advance` has made the weights."""
        return self.readout_of(*parts, embedded), None


class LuongDecoder(RecurrentDecoder):
    """A decoder whose context joins its output.

        s' = cells(e);   c = attend(s');   readout = tanh(W [s'; c])

    Nothing but the layers runs step by step.

    References:
        Luong et al. 2015, section 3, equation 5.
    """

    def __init__(self, config: RecurrentConfig, *, context_dim: int = 0, rngs: nnx.Rngs):
        super().__init__(config, context_dim=context_dim, readout_dim=2 * config.hidden_dim, rngs=rngs)

    def read_out(self, parts: tuple[jax.Array, ...], embedded: jax.Array, encoded: AttendedEncoderOutput) -> ReadOut:
        """Returns readouts and weights."""
        return self.attentional_vectors(parts[0], encoded)

    def attentional_vectors(self, top: jax.Array, encoded: AttendedEncoderOutput) -> tuple[jax.Array, jax.Array]:
        """Returns the readouts of the top layer's hidden vectors, which the paper calls attentional, and weights."""
        context, weights = self.attend(top, encoded)
        return self.readout_of(top, context), weights


class InputFeedingDecoder(LuongDecoder):
    """Luong's decoder whose input includes the attentional vector a of the step before, which is its readout.

        s' = cells([e; a]);   c = attend(s');   readout = a' = tanh(W [s'; c])

    References:
        Luong et al. 2015, section 3.3.
    """

    def __init__(self, config: RecurrentConfig, *, rngs: nnx.Rngs):
        super().__init__(config, context_dim=config.model_dim, rngs=rngs)

    def start(self, layers: list[State], num_beams: int) -> RecurrentState:
        """Returns the state before the first token, whose attentional vector is zeros."""
        zeros = jnp.zeros((layers[0][0].shape[0], num_beams, self.model_dim), self.compute_dtype)
        return dataclasses.replace(super().start(layers, num_beams), attentional=zeros)

    def advance(
        self, gates: jax.Array, state: RecurrentState, encoded: AttendedEncoderOutput, keys: list[PRNGKeyArray | None]
    ) -> Advanced:
        """Returns the new state, and its attentional vector with weights, since the next step reads that vector."""
        gates = gates + self.first_cell.project_context(state.attentional)
        layers = self.run_layers(gates, state.layers, keys)
        attentional, weights = self.attentional_vectors(layers[-1][0], encoded)
        return RecurrentState(layers, attentional), (attentional,), weights

    def read_out(self, parts: tuple[jax.Array, ...], embedded: jax.Array, encoded: AttendedEncoderOutput) -> ReadOut:
        """Returns the readouts that `advance` has made."""
        return parts[0], None


def make_decoder(config: RecurrentConfig, *, rngs: nnx.Rngs) -> RecurrentDecoder:
    """Returns the decoder for the place where the configuration joins the context."""
    kinds = {"none": RecurrentDecoder, "input": BahdanauDecoder, "output": LuongDecoder}
    return InputFeedingDecoder(config, rngs=rngs) if config.input_feeding else kinds[config.join](config, rngs=rngs)
