"""Token tables: embedding rows, logits, and the best entries of a vocabulary.

On a CPU logits are stored as [V, ...]. The product is faster with a cached table on the left, because XLA repacks the
right side in each call. Reductions over V then work on neighbouring memory, so they vectorise (docs/lab_book.md,
"Logits with the vocabulary first"). The axes are swapped back where logits are read; XLA removes both swaps.
Only this file knows of it.

Legend: B batch, K beams, M candidates, V vocabulary rows (padded), D model dim.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flax_transformer import backend
from flax_transformer.ops.int8_product import Int8Weights, int8_product, int8_rows
from flax_transformer.shapes import MASKED, array_tree, static_field


def vocab_major() -> bool:
    """Returns whether logits [..., V] are computed and searched as [V, ...]."""
    return backend.platform() == "cpu"


# --- rows of a table


@jax.custom_vjp
def _float_rows(table: Float[Array, "V D"], rows: Int[Array, "*rows"]) -> Float[Array, "*rows D"]:
    """Returns the `rows` of a table. The table's gradient is summed in float32, whatever its type."""
    return jnp.take(table, rows, axis=0, mode="clip")


def _float_rows_forward(table, rows):
    return _float_rows(table, rows), (table, rows)


def _float_rows_backward(kept, cotangent):
    table, rows = kept
    wide = jax.ShapeDtypeStruct(table.shape, jnp.float32)
    back = jax.linear_transpose(lambda table: jnp.take(table, rows, axis=0, mode="clip"), wide)
    return back(cotangent.astype(jnp.float32))[0].astype(table.dtype), None


_float_rows.defvjp(_float_rows_forward, _float_rows_backward)


def take_rows(table: Float[Array, "V D"] | Int8Weights, rows: Int[Array, "*rows"]) -> Float[Array, "*rows D"]:
    """Returns the `rows` of a table, in its type, or in float32 if it holds integers. Indices are clipped."""
    return int8_rows(table, rows) if isinstance(table, Int8Weights) else _float_rows(table, rows)


def without_row(table: Float[Array, "V D"] | Int8Weights, row: int) -> Float[Array, "V D"] | Int8Weights:
    """Returns the table with one row set to zeros."""
    if isinstance(table, Int8Weights):
        return dataclasses.replace(table, values=table.values.at[row].set(0))
    return table.at[row].set(0.0)


# --- logits


@array_tree
@dataclasses.dataclass(frozen=True)
class OutputProjection:
    """The map from a decoder's hidden vector to logits, as arrays, so that the loss can fuse it.

        logits = hidden @ kernel.T + bias,   padding rows of the vocabulary masked

    Attributes:
        kernel: [V, D], often the embedding table itself; [V, D + 1] with `bias_in_kernel`. For inference it may hold
            integers.
        bias: [V], or None.
        num_real_rows: rows from this index on are padding and never get probability.
        bias_in_kernel: whether the kernel's last column holds the vector that is added to the products.

    Example:
        >>> projection = OutputProjection(jnp.eye(3), bias=jnp.array([0.5, 0.0, 0.0]), num_real_rows=3)
        >>> projection.logits(jnp.array([[1.0, 2.0, 3.0]])).tolist()
        [[1.5, 2.0, 3.0]]
    """

    kernel: Float[Array, "V _"] | Int8Weights
    bias: Float[Array, "V"] | None
    num_real_rows: int = static_field()
    bias_in_kernel: bool = static_field(default=False)

    def logits(self, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Returns float32 logits of `hidden`."""
        first, offset = vocab_major(), None if self.bias_in_kernel else _offset(self)
        if self.bias_in_kernel:
            hidden = jnp.concatenate([hidden, jnp.ones((*hidden.shape[:-1], 1), hidden.dtype)], axis=-1)
        if isinstance(self.kernel, Int8Weights):
            logits = int8_product(hidden, self.kernel, (1,), weights_left=first)
        else:
            sides, contract = (hidden, self.kernel.astype(hidden.dtype)), ((hidden.ndim - 1,), (1,))
            if first:
                sides, contract = sides[::-1], contract[::-1]
            logits = jax.lax.dot_general(*sides, (contract, ((), ())), preferred_element_type=jnp.float32)
        if offset is not None:
            offset = offset.reshape(-1, *(1,) * (hidden.ndim - 1)) if first else offset
            logits = logits + jnp.broadcast_to(offset, logits.shape)
        # Transpose last: earlier, XLA for CPU would write the exponentials again.
        return jnp.moveaxis(logits, 0, -1) if first else logits


def _offset(projection: OutputProjection) -> Float[Array, "V"] | None:
    """Returns the vector added to logits: the bias, and MASKED for padding rows."""
    num_rows = projection.kernel.shape[0]
    bias = None if projection.bias is None else projection.bias.astype(jnp.float32)
    if projection.num_real_rows == num_rows:
        return bias
    bias = jnp.zeros(num_rows, jnp.float32) if bias is None else bias
    return jnp.where(jnp.arange(num_rows) < projection.num_real_rows, bias, MASKED)


def fold_bias_into_kernel(projection: OutputProjection) -> OutputProjection:
    """Returns the projection with bias and padding mask as a column of the kernel, where that is faster.

    XLA for CPU would add the vector in separate passes over all logits (docs/lab_book.md, "Output bias as a column of
    the kernel"). Nothing changes (1) on other platforms, (2) without an offset, (3) for kernels that are not
    float32, where the column would be rounded.
    """
    offset, kernel = _offset(projection), projection.kernel
    if offset is None or isinstance(kernel, Int8Weights) or kernel.dtype != jnp.float32 or not vocab_major():
        return projection
    folded = jnp.concatenate([kernel, offset[:, None].astype(kernel.dtype)], axis=1)
    return dataclasses.replace(projection, kernel=folded, bias_in_kernel=True)


# --- along the vocabulary


def sum_of_exponentials(logits: Float[Array, "B K V"], highest: Float[Array, "B K 1"]) -> Float[Array, "B K 1"]:
    """Returns the sum over V of exp(logits - highest)."""
    if vocab_major():
        return jnp.sum(jnp.exp(jnp.moveaxis(logits, -1, 0) - highest[None, ..., 0]), axis=0)[..., None]
    return jnp.sum(jnp.exp(logits - highest), axis=-1, keepdims=True)


def log_probabilities(logits: Float[Array, "B K V"]) -> Float[Array, "B K V"]:
    """Returns the log-softmax over V, reading logits in the order of their memory layout.

    Example:
        >>> jnp.exp(log_probabilities(jnp.zeros((1, 1, 2)))).tolist()
        [[[0.5, 0.5]]]
    """
    if vocab_major():
        highest = jnp.max(jnp.moveaxis(logits, -1, 0), axis=0)[..., None]
    else:
        highest = jnp.max(logits, axis=-1, keepdims=True)
    return (logits - highest) - jnp.log(sum_of_exponentials(logits, highest))


def best_of_vocabulary(x: Float[Array, "B K V"], num: int) -> tuple[Float[Array, "B K M"], Int[Array, "B K M"]]:
    """Returns the result of `jax.lax.top_k`, with less to sort.

    Only the blocks of the vocabulary with the highest maxima are searched. They are sorted by index, so ties go to the
    lower index, as in `top_k`. Without a platform `jax.lax.top_k` itself is the reference.

    Example:
        >>> values, ids = best_of_vocabulary(jnp.array([[[1.0, 5.0, 3.0]]]), 2)
        >>> values.tolist(), ids.tolist()
        ([[[5.0, 3.0]]], [[[1, 2]]])
    """
    if backend.platform() is None:
        best, place = jax.lax.top_k(x, num)
        return best, place
    size = x.shape[-1]
    divisors = [block for block in range(1, size // num + 1) if size % block == 0]
    block = min(divisors, key=lambda block: size // block + num * block)
    if block == 1:
        best, place = jax.lax.top_k(x, num)
        return best, place
    if vocab_major():
        blocks = jnp.moveaxis(x, -1, 0).reshape(size // block, block, *x.shape[:-1])
        highest = jnp.moveaxis(jnp.max(blocks, axis=1), 0, -1)
    else:
        blocks = x.reshape(*x.shape[:-1], size // block, block)
        highest = jnp.max(blocks, axis=-1)
    _, chosen = jax.lax.top_k(highest, num)  # [B, K, num]
    chosen = jnp.sort(chosen, axis=-1)
    if vocab_major():
        slots, beams = jnp.arange(x.shape[0])[:, None, None], jnp.arange(x.shape[1])[None, :, None]
        entries = blocks.at[chosen, :, slots, beams].get(mode="clip")  # [B, K, num, block]
    else:
        entries = jnp.take_along_axis(blocks, chosen[..., None], axis=2, mode="clip")  # [B, K, num, block]
    best, place = jax.lax.top_k(entries.reshape(*x.shape[:-1], num * block), num)
    return best, jnp.take_along_axis(chosen, place // block, axis=-1) * block + place % block
