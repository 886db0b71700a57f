"""Recurrent cells, and a layer that runs one over time.

Legend: B batch, T length, I input dim, U recurrent units. A cell's state is a tuple of arrays whose first is the hidden
vector that others see.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from flax_transformer.nn.linear import xavier_uniform

CellKind = Literal["lstm", "gru"]
State = tuple[Any, ...]

INPUT_AXES = ("embed", "gates", "mlp")
RECURRENT_AXES = ("recurrent", "gates", "mlp")
BIAS_AXES = ("gates", "mlp")


def _kernel(key: jax.Array, in_dim: int, num_gates: int, units: int, dtype: jnp.dtype, orthogonal: bool) -> jax.Array:
    """Returns [in_dim, num_gates, units], each gate drawn on its own."""
    keys = jax.random.split(key, num_gates)
    if orthogonal:
        gates = [jax.nn.initializers.orthogonal()(k, (in_dim, units), dtype) for k in keys]
    else:
        gates = [xavier_uniform(k, (in_dim,), (units,), dtype) for k in keys]
    return jnp.stack(gates, axis=1)


class RecurrentCell(nnx.Module):
    """What the two cells share: kernels [I, G, U] and [U, G, U] for G gates, and the input's share of all gates.

    Input kernels are Xavier-uniform, recurrent kernels orthogonal (Saxe et al. 2014): a repeated product then neither
    grows nor fades at the start.
    """

    num_gates: int
    num_states: int

    def __init__(self, in_dim: int, units: int, *, param_dtype: jnp.dtype, compute_dtype: jnp.dtype, rngs: nnx.Rngs):
        self.units = units
        self.compute_dtype = compute_dtype
        gates = self.num_gates
        input_kernel = _kernel(rngs.params(), in_dim, gates, units, param_dtype, orthogonal=False)
        recurrent_kernel = _kernel(rngs.params(), units, gates, units, param_dtype, orthogonal=True)
        self.input_kernel = nnx.Param(input_kernel, logical_axes=INPUT_AXES)
        self.recurrent_kernel = nnx.Param(recurrent_kernel, logical_axes=RECURRENT_AXES)
        self.bias = nnx.Param(jnp.zeros((gates, units), param_dtype), logical_axes=BIAS_AXES)

    def zero_state(self, rows: tuple[int, ...]) -> State:
        """Returns the state before the first token, [*rows, U] each."""
        return (jnp.zeros((*rows, self.units), self.compute_dtype),) * self.num_states

    def project(self, x: Float[Array, "*rows I"]) -> Float[Array, "*rows G U"]:
        """Returns W x + b for all gates; it needs no state, so a layer does it for all time steps at once."""
        kernel = self.input_kernel[...].astype(self.compute_dtype)
        gates = jnp.tensordot(x.astype(self.compute_dtype), kernel, axes=1)
        return gates + jnp.broadcast_to(self.bias[...].astype(self.compute_dtype), gates.shape)

    def recur(self, hidden: Float[Array, "*rows U"]) -> Float[Array, "*rows G U"]:
        """Returns U h for all gates."""
        return jnp.tensordot(hidden, self.recurrent_kernel[...].astype(self.compute_dtype), axes=1)

    def step(self, state: State, projected: Float[Array, "*rows G U"]) -> State:
        """Returns the state after one more token, from `project` of that token."""
        raise TypeError("RecurrentCell is abstract: use LSTMCell or GRUCell")


class LSTMCell(RecurrentCell):
    """Long short-term memory, with a forget gate and without peepholes.

        i, f, o = sigmoid(W x + U h + b);   g = tanh(W x + U h + b)
        c' = f * c + i * g;                 h' = o * tanh(c')

    Gates are stored in the order i, f, g, o, as PyTorch stores them, with one bias where PyTorch adds up two. The
    forget gate's bias starts at 1 (Jozefowicz et al. 2015, section 2).

    References:
        Hochreiter and Schmidhuber 1997; Gers et al. 2000 for the forget gate.
    """

    num_gates = 4
    num_states = 2

    def __init__(self, in_dim: int, units: int, *, param_dtype: jnp.dtype, compute_dtype: jnp.dtype, rngs: nnx.Rngs):
        super().__init__(in_dim, units, param_dtype=param_dtype, compute_dtype=compute_dtype, rngs=rngs)
        self.bias[...] = self.bias[...].at[1].set(1.0)

    def step(self, state: State, projected: Float[Array, "*rows G U"]) -> State:
        """Returns (hidden, cell) after one more token."""
        hidden, memory = state
        gates = projected + self.recur(hidden)
        read, forget, candidate, write = (gates[..., gate, :] for gate in range(4))
        memory = jax.nn.sigmoid(forget) * memory + jax.nn.sigmoid(read) * jnp.tanh(candidate)
        return jax.nn.sigmoid(write) * jnp.tanh(memory), memory


class GRUCell(RecurrentCell):
    """Gated recurrent unit.

        r, z = sigmoid(W x + U h + b);   n = tanh(W x + b + r * (U h + b_n))
        h' = (1 - z) * n + z * h

    Gates are stored in the order r, z, n, as PyTorch stores them. Two differences from the paper (equations 5 to 8):
    there the reset gate multiplies h before the product with U, which needs a second product after the gates; and there
    z multiplies the old state, as here, but the names of z and 1 - z differ between papers.

    References:
        Cho et al. 2014, section 2.3; the form with the reset after the product is that of cuDNN and PyTorch.
    """

    num_gates = 3
    num_states = 1

    def __init__(self, in_dim: int, units: int, *, param_dtype: jnp.dtype, compute_dtype: jnp.dtype, rngs: nnx.Rngs):
        super().__init__(in_dim, units, param_dtype=param_dtype, compute_dtype=compute_dtype, rngs=rngs)
        self.candidate_bias = nnx.Param(jnp.zeros((units,), param_dtype), logical_axes=("mlp",))

    def step(self, state: State, projected: Float[Array, "*rows G U"]) -> State:
        """Returns (hidden,) after one more token."""
        (hidden,) = state
        recurrent = self.recur(hidden)
        reset = jax.nn.sigmoid(projected[..., 0, :] + recurrent[..., 0, :])
        update = jax.nn.sigmoid(projected[..., 1, :] + recurrent[..., 1, :])
        bias = self.candidate_bias[...].astype(self.compute_dtype)
        inner = recurrent[..., 2, :] + jnp.broadcast_to(bias, hidden.shape)
        candidate = jnp.tanh(projected[..., 2, :] + reset * inner)
        return ((1 - update) * candidate + update * hidden,)


CELLS: dict[str, type[RecurrentCell]] = {"lstm": LSTMCell, "gru": GRUCell}


def run_over_time(
    cell: RecurrentCell, x: Float[Array, "B T I"], mask: Bool[Array, "B T"], *, reverse: bool = False
) -> tuple[Float[Array, "B T U"], State]:
    """Runs a cell over a padded batch, and returns the hidden vector at each position and the last state.

    Where `mask` is False the state stays as it is, so the last state of a padded sentence is that of the sentence
    alone, in either direction.

    Args:
        cell: LSTM or GRU.
        x: inputs.
        mask: True for tokens, False for padding.
        reverse: read from the last position to the first.
    """
    projected = jnp.moveaxis(cell.project(x), 1, 0)  # [B, T, G, U] -> [T, B, G, U]

    def step(state: State, at_time: tuple[jax.Array, jax.Array]) -> tuple[State, jax.Array]:
        gates, real = at_time
        new = cell.step(state, gates)
        state = tuple(jnp.where(real[:, None], after, before) for after, before in zip(new, state, strict=True))
        return state, state[0]

    last, hidden = jax.lax.scan(step, cell.zero_state((x.shape[0],)), (projected, mask.T), reverse=reverse)
    return jnp.moveaxis(hidden, 0, 1), last
