"""Products with weights that are 8-bit integers, for inference.

    sum_i x[i] W[i, o]  ~  s * S[o] * sum_i q[i] Q[i, o],   q = round(x / s), Q = round(W / S)

Weights are rounded once, with a scale S[o] for each output channel. Activations are rounded at each use, with a scale
s for each vector, so nothing needs to be calibrated. The sum of products is exact, in int32.

References:
    Dettmers et al. 2022, "LLM.int8()", section 2.1 (scales for vectors of both sides).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

from flax_transformer.shapes import array_tree

STEPS = 127  # on either side of zero; -128 is not used


@array_tree
@dataclasses.dataclass(frozen=True)
class Int8Weights:
    """Weights as integers and a scale for each output channel.

    Attributes:
        values: integers in the shape of the weights.
        scales: one for each output channel: the shape of the weights without the axes that products sum over. A
            rounded weight is value * scale.
    """

    values: Int8[Array, "..."]
    scales: Float[Array, "..."]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weights."""
        return self.values.shape


def quantize(weights: Float[Array, "..."], in_axes: tuple[int, ...]) -> Int8Weights:
    """Returns `weights` rounded to 127 steps on either side of zero.

    Args:
        weights: array of any shape.
        in_axes: axes that products sum over. Each entry of the other axes has its own scale.
    """
    weights = weights.astype(jnp.float32)
    scales = _scales(weights, in_axes)
    return Int8Weights(_rounded(weights, scales), jnp.squeeze(scales, in_axes))


def int8_product(
    x: Float[Array, "..."], weights: Int8Weights, in_axes: tuple[int, ...], weights_left: bool = False
) -> Float[Array, "..."]:
    """Returns the float32 product of `x`, whose last axes are summed with the axes `in_axes` of the weights.

    `x` is [*rows, *in], and the result is [*rows, *out]. With `weights_left` the weights are the left side of the
    product, and the result is [*out, *rows].
    """
    x_axes = tuple(range(x.ndim - len(in_axes), x.ndim))
    x = x.astype(jnp.float32)
    scales = _scales(x, x_axes)
    left = _rounded(x, scales), jnp.squeeze(scales, x_axes), x_axes
    right = weights.values, weights.scales, in_axes
    if weights_left:
        left, right = right, left
    total = jax.lax.dot_general(
        left[0], right[0], ((left[2], right[2]), ((), ())), preferred_element_type=jnp.int32
    ).astype(jnp.float32)
    return total * jnp.expand_dims(left[1], range(left[1].ndim, total.ndim)) * right[1][(None,) * left[1].ndim]


def int8_rows(table: Int8Weights, rows: Int[Array, "*rows"]) -> Float[Array, "*rows D"]:
    """Returns the float32 `rows` of a table [V, D] with a scale for each row."""
    values = jnp.take(table.values, rows, axis=0, mode="clip").astype(jnp.float32)
    return values * jnp.take(table.scales, rows, axis=0, mode="clip")[..., None]


def _scales(x: Float[Array, "..."], axes: tuple[int, ...]) -> Float[Array, "..."]:
    """Returns the step size, with `axes` kept as 1. It is never 0, so zeros stay zeros."""
    return jnp.maximum(jnp.max(jnp.abs(x), axis=axes, keepdims=True), STEPS * jnp.finfo(jnp.float32).tiny) / STEPS


def _rounded(x: Float[Array, "..."], scales: Float[Array, "..."]) -> Int8[Array, "..."]:
    return jnp.round(x / scales).astype(jnp.int8)
