"""Recurrent cells, and a function that runs one over time.

Legend: B batch, T length, I input dim, C context dim, G gates, U recurrent units, GU = G * U. The state of a cell is a
tuple of arrays. Its first array is the hidden vector that other layers read.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from flax_transformer.nn.linear import xavier_uniform
from flax_transformer.ops.product import product

CellKind = Literal["lstm", "gru"]
State = tuple[Any, ...]

# The tensor axis does not split units: each time step would have to gather the state.
INPUT_AXES = ("embed", "gates", "recurrent")
RECURRENT_AXES = ("recurrent", "gates", "recurrent")
CONTEXT_AXES = ("recurrent", "gates", "recurrent")
BIAS_AXES = ("gates", "recurrent")


def _kernel(key: jax.Array, in_dim: int, num_gates: int, units: int, dtype: jnp.dtype, orthogonal: bool) -> jax.Array:
    """Returns [in_dim, num_gates, units]; each gate is drawn from its own key."""
    keys = jax.random.split(key, num_gates)
    if orthogonal:
        orthogonal_of = jax.nn.initializers.orthogonal()  # its decomposition needs float32
        gates = [orthogonal_of(k, (in_dim, units), jnp.float32).astype(dtype) for k in keys]
    else:
        gates = [xavier_uniform(k, (in_dim,), (units,), dtype) for k in keys]
    return jnp.stack(gates, axis=1)


# The backward pass computes the gates again from the products. Writing them out at each time step and reading them back
# costs more (docs/lab_book.md, "Gates computed again in the backward pass").
@jax.checkpoint
def _lstm_gates(state: State, gates: Float[Array, "*rows GU"]) -> State:
    input_gate, forget_gate, candidate, output_gate = jnp.split(gates, 4, axis=-1)
    cell = jax.nn.sigmoid(forget_gate) * state[1] + jax.nn.sigmoid(input_gate) * jnp.tanh(candidate)
    return jax.nn.sigmoid(output_gate) * jnp.tanh(cell), cell


@jax.checkpoint
def _gru_gates(
    state: State,
    projected: Float[Array, "*rows GU"],
    recurrent: Float[Array, "*rows GU"],
    candidate_bias: Float[Array, "*rows U"],
) -> State:
    (hidden,) = state
    projected_reset, projected_update, projected_candidate = jnp.split(projected, 3, axis=-1)
    recurrent_reset, recurrent_update, recurrent_candidate = jnp.split(recurrent, 3, axis=-1)
    reset = jax.nn.sigmoid(projected_reset + recurrent_reset)
    update = jax.nn.sigmoid(projected_update + recurrent_update)
    candidate = jnp.tanh(projected_candidate + reset * (recurrent_candidate + candidate_bias))
    return ((1 - update) * candidate + update * hidden,)


class RecurrentCell(nnx.Module):
    """Base of the two cells: kernels [I, G, U], [C, G, U] and [U, G, U] for G gates.

    A decoder's cell may read a context beside its input, through its own kernel (C in Bahdanau et al. 2015, appendix
    A.2.2). The input's part of the gates can then be computed for all time steps at once, although the context depends
    on the state. Input and context kernels are Xavier-uniform. Recurrent kernels are orthogonal (Saxe et al. 2014), so
    that repeated products neither grow nor vanish at the start.

    These kernels have no `int8_axes`, so they stay floats in a quantised model.
    """

    num_gates: int
    num_states: int

    def __init__(
        self,
        in_dim: int,
        units: int,
        context_dim: int = 0,
        *,
        param_dtype: jnp.dtype,
        compute_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.units = units
        self.compute_dtype = compute_dtype
        gates = self.num_gates
        input_kernel = _kernel(rngs.params(), in_dim, gates, units, param_dtype, orthogonal=False)
        recurrent_kernel = _kernel(rngs.params(), units, gates, units, param_dtype, orthogonal=True)
        self.input_kernel = nnx.Param(input_kernel, logical_axes=INPUT_AXES, num_in_dims=1)
        self.recurrent_kernel = nnx.Param(recurrent_kernel, logical_axes=RECURRENT_AXES, num_in_dims=1)
        self.bias = nnx.Param(jnp.zeros((gates, units), param_dtype), logical_axes=BIAS_AXES)
        if context_dim:
            context_kernel = _kernel(rngs.params(), context_dim, gates, units, param_dtype, orthogonal=False)
            self.context_kernel = nnx.Param(context_kernel, logical_axes=CONTEXT_AXES, num_in_dims=1)
        else:
            self.context_kernel = None

    def zero_state(self, rows: tuple[int, ...]) -> State:
        """Returns the state before the first token, [*rows, U] each."""
        return (jnp.zeros((*rows, self.units), self.compute_dtype),) * self.num_states

    def project(self, x: Float[Array, "*rows I"]) -> Float[Array, "*rows GU"]:
        """Returns W x + b for all gates. It needs no state, so it is computed for all time steps at once."""
        gates = self._product(x, self.input_kernel)
        bias = jnp.broadcast_to(self.bias[...].astype(jnp.float32).ravel(), gates.shape)  # as in `Linear`
        return gates + bias.astype(self.compute_dtype)

    def project_context(self, context: Float[Array, "*rows C"]) -> Float[Array, "*rows GU"]:
        """Returns C c for all gates, to be added to `project`."""
        assert self.context_kernel is not None, "only a cell with a context_dim reads a context"
        return self._product(context, self.context_kernel)

    def recur(self, hidden: Float[Array, "*rows U"]) -> Float[Array, "*rows GU"]:
        """Returns U h for all gates."""
        return self._product(hidden, self.recurrent_kernel)

    def _product(self, x: jax.Array, kernel: Any) -> jax.Array:
        """Returns the gates side by side in the last axis, where it is cheap to split them."""
        return product(x, kernel[...].reshape(kernel.shape[0], -1), 1, self.compute_dtype)

    def step(self, state: State, projected: Float[Array, "*rows GU"]) -> State:
        """Returns the state after one more token, given the result of `project` for that token."""
        raise TypeError("RecurrentCell is abstract: use LSTMCell or GRUCell")


class LSTMCell(RecurrentCell):
    """Long short-term memory, with a forget gate and without peepholes.

        i, f, o = sigmoid(W x + U h + b);   g = tanh(W x + U h + b)
        c' = f * c + i * g;                 h' = o * tanh(c')

    Gates are stored in PyTorch's order i, f, g, o, with one bias where PyTorch adds two. The forget gate's bias starts
    at 1 (Jozefowicz et al. 2015, section 2).

    Example:
        >>> float32 = jnp.dtype("float32")
        >>> cell = LSTMCell(3, 4, param_dtype=float32, compute_dtype=float32, rngs=nnx.Rngs(0))
        >>> state = cell.step(cell.zero_state((2,)), cell.project(jnp.ones((2, 3))))
        >>> [part.shape for part in state]
        [(2, 4), (2, 4)]

    References:
        Hochreiter and Schmidhuber 1997; Gers et al. 2000 for the forget gate.
    """

    num_gates = 4
    num_states = 2

    def __init__(self, in_dim: int, units: int, context_dim: int = 0, *, param_dtype: jnp.dtype, **others: Any):
        super().__init__(in_dim, units, context_dim, param_dtype=param_dtype, **others)
        self.bias[...] = self.bias[...].at[1].set(1.0)

    def step(self, state: State, projected: Float[Array, "*rows GU"]) -> State:
        """Returns (hidden, cell) after one more token."""
        return _lstm_gates(state, projected + self.recur(state[0]))


class GRUCell(RecurrentCell):
    """Gated recurrent unit.

        r, z = sigmoid(W x + U h + b);   n = tanh(W x + b + r * (U h + b_n))
        h' = (1 - z) * n + z * h

    Gates are stored in PyTorch's order r, z, n. The paper (equations 5 to 8) multiplies h by the reset gate before the
    product with U. That needs a second product after the gates. As in the paper, z multiplies the old state; other
    papers exchange z and 1 - z.

    Example:
        >>> float32 = jnp.dtype("float32")
        >>> cell = GRUCell(3, 4, param_dtype=float32, compute_dtype=float32, rngs=nnx.Rngs(0))
        >>> state = cell.step(cell.zero_state((2,)), cell.project(jnp.ones((2, 3))))
        >>> [part.shape for part in state]
        [(2, 4)]

    References:
        Cho et al. 2014, section 2.3. cuDNN and PyTorch reset after the product.
    """

    num_gates = 3
    num_states = 1

    def __init__(self, in_dim: int, units: int, context_dim: int = 0, *, param_dtype: jnp.dtype, **others: Any):
        super().__init__(in_dim, units, context_dim, param_dtype=param_dtype, **others)
        self.candidate_bias = nnx.Param(jnp.zeros((units,), param_dtype), logical_axes=("recurrent",))

    def step(self, state: State, projected: Float[Array, "*rows GU"]) -> State:
        """Returns (hidden,) after one more token."""
        bias = jnp.broadcast_to(self.candidate_bias[...].astype(jnp.float32), state[0].shape)  # as in `Linear`
        return _gru_gates(state, projected, self.recur(state[0]), bias.astype(self.compute_dtype))


CELLS: dict[str, type[RecurrentCell]] = {"lstm": LSTMCell, "gru": GRUCell}


def layer_name(layer: int) -> str:
    """Returns the name of a layer among parameters: two digits, so that the order of names is that of layers."""
    return f"{layer:02d}"


def run_over_time(
    cell: RecurrentCell, x: Float[Array, "B T I"], mask: Bool[Array, "B T"], *, reverse: bool = False
) -> tuple[Float[Array, "B T U"], State]:
    """Runs a cell over a padded batch. Returns the hidden vector at each position, and the last state.

    The state does not change where `mask` is False. So padding does not affect a sentence's last state, in either
    direction.

    Args:
        cell: LSTM or GRU.
        x: inputs.
        mask: True for tokens, False for padding.
        reverse: whether to read from the last position to the first.

    Example:
        >>> float32 = jnp.dtype("float32")
        >>> cell = GRUCell(3, 4, param_dtype=float32, compute_dtype=float32, rngs=nnx.Rngs(0))
        >>> hidden, last = run_over_time(cell, jnp.ones((1, 5, 3)), jnp.array([[True, True, True, False, False]]))
        >>> hidden.shape, bool(jnp.all(last[0] == hidden[:, 2]))
        ((1, 5, 4), True)
    """
    projected = jnp.moveaxis(cell.project(x), 1, 0)  # [B, T, GU] -> [T, B, GU]

    def step(state: State, at_time: tuple[jax.Array, jax.Array]) -> tuple[State, jax.Array]:
        gates, real = at_time
        new = cell.step(state, gates)
        state = tuple(jnp.where(real[:, None], after, before) for after, before in zip(new, state, strict=True))
        return state, state[0]

    last, hidden = jax.lax.scan(step, cell.zero_state((x.shape[0],)), (projected, mask.T), reverse=reverse)
    return jnp.moveaxis(hidden, 0, 1), last
