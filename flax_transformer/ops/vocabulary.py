"""Tables of tokens: rows that are read, logits that are made, and the best of a vocabulary.

On a CPU logits lie in memory as [V, ...], vocabulary first. With the table as its left side their product is faster
where the table stays in the cache: XLA's library packs the right side anew in each call. What is done along the
vocabulary takes neighbouring rows into one instruction (docs/lab_book.md, 2026-11-26). This file alone knows of it. It
exchanges the axes where logits are made and again where they are read, and nothing of that is left in the program.

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
    """Returns whether logits [..., V] are made, and searched, as [V, ...]."""
    return backend.platform() == "cpu"


# --- rows of a table


@jax.custom_vjp
def _float_rows(table: Float[Array, "V D"], rows: Int[Array, "*rows"]) -> Float[Array, "*rows D"]:
    """Returns the `rows` of a table; its gradient is summed in float32, whatever the table's type."""
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
    """Returns the `rows` of a table, in its type, or in float32 where it holds integers; indices are clipped."""
    return int8_rows(table, rows) if isinstance(table, Int8Weights) else _float_rows(table, rows)


def without_row(table: Float[Array, "V D"] | Int8Weights, row: int) -> Float[Array, "V D"] | Int8Weights:
    """Returns a table with zeros in one of its rows."""
    if isinstance(table, Int8Weights):
        return dataclasses.replace(table, values=table.values.at[row].set(0))
    return table.at[row].set(0.0)


# --- logits


@array_tree
@dataclasses.dataclass(frozen=True)
class OutputProjection:
    """The map from a decoder's hidden vector to logits, given as arrays so that the loss may fuse it.

        logits = hidden @ kernel.T + bias,   padding rows of the vocabulary masked

    Attributes:
        kernel: [V, D], rows as in an embedding table, and often that very table. With `bias_in_kernel` it is
            [V, D + 1]. For inference it may hold integers.
        bias: [V], or None.
        num_real_rows: rows from here on pad the table and never get probability.
        bias_in_kernel: whether the last column of the kernel holds what is added to the products.
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
        # Not before all is done: XLA for CPU would write the exponentials anew in the other order.
        return jnp.moveaxis(logits, 0, -1) if first else logits


def _offset(projection: OutputProjection) -> Float[Array, "V"] | None:
    """Returns what is added to the products: the bias, and for padding MASKED, in which rounding swallows them."""
    num_rows = jax.tree.leaves(projection.kernel)[0].shape[0]
    bias = None if projection.bias is None else projection.bias.astype(jnp.float32)
    if projection.num_real_rows == num_rows:
        return bias
    bias = jnp.zeros(num_rows, jnp.float32) if bias is None else bias
    return jnp.where(jnp.arange(num_rows) < projection.num_real_rows, bias, MASKED)


def fold_bias_into_kernel(projection: OutputProjection) -> OutputProjection:
    """Returns the projection with what is added to the products in a column of the kernel, if that is faster.

    XLA for CPU adds it in passes of its own over all logits (docs/lab_book.md, 2026-11-26). The projection stays as it
    is on other platforms, where nothing is added, and where the kernel holds integers or other types than float32. In
    fewer bits the column would be rounded, which the bias is not.
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
    """Returns what `jax.nn.log_softmax` does, read in the order in which logits lie in memory."""
    if vocab_major():
        highest = jnp.max(jnp.moveaxis(logits, -1, 0), axis=0)[..., None]
    else:
        highest = jnp.max(logits, axis=-1, keepdims=True)
    return (logits - highest) - jnp.log(sum_of_exponentials(logits, highest))


def best_of_vocabulary(x: Float[Array, "B K V"], num: int) -> tuple[Float[Array, "B K M"], Int[Array, "B K M"]]:
    """Returns what `jax.lax.top_k` does, with less to sort: the best lie in the blocks with the highest maxima.

    Blocks are in a row, and those chosen stay in order. So ties go to the lower index here, too. Without a platform
    `jax.lax.top_k` itself is the reference.
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
