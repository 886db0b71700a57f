"""The product of rows with a kernel, and the dtype in which it is summed.

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
    """Returns the dtype requested for a product's result before it is cast to `compute_dtype`.

    On a CPU it is float32, since its matrix instructions (AMX) multiply bfloat16 only into float32. For a bfloat16
    result XLA would first convert both sides to float32 (docs/lab_book.md, "Products of bfloat16 with
    float32 results"). Elsewhere it is `compute_dtype`. Sums inside a product are float32 there too, and devices
    exchange fewer bytes.
    """
    return jnp.dtype(jnp.float32) if backend.platform() == "cpu" else jnp.dtype(compute_dtype)


def _rounded_product(left: jax.Array, right: jax.Array, contract: tuple[tuple[int, ...], tuple[int, ...]]) -> jax.Array:
    """Returns the product of two arrays of one dtype, in that dtype: [*left, *right] without the axes of `contract`."""
    wide = jax.lax.dot_general(left, right, (contract, ((), ())), preferred_element_type=accumulation_dtype(left.dtype))
    return wide.astype(left.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def float_product(x: Float[Array, "..."], kernel: Float[Array, "..."], num_in_dims: int) -> Float[Array, "..."]:
    """Returns the result of `reference_product`; its gradient by the kernel is summed in float32.

    The kernel's gradient is computed as x^T g. JAX's rule computes (g^T x)^T, for which XLA for CPU transposes and
    recomputes g (docs/lab_book.md, "Gradient of a product by its kernel").

    The kernel is cast to the dtype of `x` here, so its gradient is summed in float32 over rows and devices.
    """
    contract = tuple(range(x.ndim - num_in_dims, x.ndim)), tuple(range(num_in_dims))
    return _rounded_product(x, kernel.astype(x.dtype), contract)


def _forward(x, kernel, num_in_dims):
    like_kernel = jnp.zeros((), kernel.dtype)  # carries only the dtype
    kernel = kernel.astype(x.dtype)  # keep the cast kernel: if it is sharded, it is gathered once
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
        x: rows, of any dtype.
        kernel: floats or 8-bit integers; its first `num_in_dims` axes are summed with the last ones of `x`.
        num_in_dims: number of axes that are summed over.
        compute_dtype: dtype of the result, and of both sides if the kernel holds floats.
    """
    if isinstance(kernel, Int8Weights):
        return int8_product(x, kernel, tuple(range(num_in_dims))).astype(compute_dtype)
    if backend.platform() is None:
        return reference_product(x.astype(compute_dtype), kernel, num_in_dims)
    return float_product(x.astype(compute_dtype), kernel, num_in_dims)


def add_bias(y: Float[Array, "..."], bias: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns y + bias in the type of `y`, with the bias's gradient summed in float32: [*rows, *out] and [*out]."""
    return y + jnp.broadcast_to(bias.astype(jnp.float32), y.shape).astype(y.dtype)
