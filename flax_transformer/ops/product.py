"""The product of rows with a kernel, and the type in which it is summed.

Legend: rows are any leading axes; `in` axes are summed over; `out` axes are what a kernel maps to.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flax_transformer import backend
from flax_transformer.ops.int8_product import Int8Weights, int8_product

# --- the reference


def reference_product(x: Float[Array, "..."], kernel: Float[Array, "..."], num_in_dims: int) -> Float[Array, "..."]:
    """Returns x W: [*rows, *in] and [*in, *out] -> [*rows, *out], in the type of `x`."""
    return jnp.tensordot(x, kernel.astype(x.dtype), axes=num_in_dims)


# --- with a gradient that is summed in float32


def accumulation_dtype(compute_dtype: jnp.dtype) -> jnp.dtype:
    """Returns the type that a product of `compute_dtype` is asked for, before it is rounded to `compute_dtype`.

    On a CPU it is float32. The processor's matrix instructions (AMX) multiply bfloat16 into float32 alone. XLA makes
    both sides float32 first when a product is asked for in bfloat16 (docs/lab_book.md, 2026-11-26). Elsewhere it is
    `compute_dtype`: sums inside a product are float32 all the same, and devices exchange half as many bytes.
    """
    return jnp.dtype(jnp.float32) if backend.platform() == "cpu" else jnp.dtype(compute_dtype)


def _rounded_product(left: jax.Array, right: jax.Array, contract: tuple[tuple[int, ...], tuple[int, ...]]) -> jax.Array:
    """Returns the product of two arrays of one type, in that type: [*left, *right] without the axes of `contract`."""
    wide = jax.lax.dot_general(left, right, (contract, ((), ())), preferred_element_type=accumulation_dtype(left.dtype))
    return wide.astype(left.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def float_product(x: Float[Array, "..."], kernel: Float[Array, "..."], num_in_dims: int) -> Float[Array, "..."]:
    """Returns what `reference_product` does, with a gradient by the kernel that is summed in float32.

    The gradient is x^T g, of the two as matrices. JAX's own rule makes g^T x and turns it round. For that XLA for CPU
    writes g transposed first, and computes it anew in that order (docs/lab_book.md, 2026-11-24).

    The kernel is cast to the type of `x` in here, so its gradient never has that type. Rows, and devices, are summed
    in float32.
    """
    contract = tuple(range(x.ndim - num_in_dims, x.ndim)), tuple(range(num_in_dims))
    return _rounded_product(x, kernel.astype(x.dtype), contract)


def _forward(x, kernel, num_in_dims):
    like_kernel = jnp.zeros((), kernel.dtype)
    kernel = kernel.astype(x.dtype)  # kept as it is multiplied: what is split over devices is then gathered once
    return float_product(x, kernel, num_in_dims), (x, kernel, like_kernel)


def _backward(num_in_dims, kept, cotangent):
    x, kernel, like_kernel = kept
    out_axes = tuple(range(num_in_dims, kernel.ndim))
    contract = tuple(range(cotangent.ndim - len(out_axes), cotangent.ndim)), out_axes
    by_x = _rounded_product(cotangent, kernel, contract)
    rows = x.reshape(-1, math.prod(kernel.shape[:num_in_dims]))
    by_kernel = jax.lax.dot_general(
        rows, cotangent.reshape(len(rows), -1), (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
    return by_x, by_kernel.reshape(kernel.shape).astype(like_kernel.dtype)


float_product.defvjp(_forward, _backward)


# --- the choice


def product(
    x: Float[Array, "..."], kernel: Float[Array, "..."] | Int8Weights, num_in_dims: int, compute_dtype: jnp.dtype
) -> Float[Array, "..."]:
    """Returns x W: [*rows, *in] and [*in, *out] -> [*rows, *out], in `compute_dtype`.

    Args:
        x: rows, of any type.
        kernel: floats or 8-bit integers; its first `num_in_dims` axes are summed with the last ones of `x`.
        num_in_dims: number of axes that are summed over.
        compute_dtype: type of the result, and of both sides where the kernel holds floats.
    """
    if isinstance(kernel, Int8Weights):
        return int8_product(x, kernel, tuple(range(num_in_dims))).astype(compute_dtype)
    if backend.platform() is None:
        return reference_product(x.astype(compute_dtype), kernel, num_in_dims)
    return float_product(x.astype(compute_dtype), kernel, num_in_dims)
