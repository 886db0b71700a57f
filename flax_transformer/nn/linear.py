"""The affine map, over any number of input and output dimensions."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from flax_transformer.nn.quantization import Int8Weights, int8_product
from flax_transformer.parallel.layout import product_type

xavier_uniform_2d = jax.nn.initializers.xavier_uniform()


def xavier_uniform(key: jax.Array, in_dims: tuple[int, ...], out_dims: tuple[int, ...], dtype) -> jax.Array:
    """Returns a kernel [*in_dims, *out_dims] drawn from U(-a, a), a = sqrt(6 / (prod(in_dims) + prod(out_dims))).

    References:
        Glorot and Bengio 2010, equation 16; applied to the matrix that the kernel is when its input and its output
        dimensions are flattened.
    """
    flat = xavier_uniform_2d(key, (math.prod(in_dims), math.prod(out_dims)), dtype)
    return flat.reshape(*in_dims, *out_dims)


def _rounded_product(left: jax.Array, right: jax.Array, contract: tuple[tuple[int, ...], tuple[int, ...]]) -> jax.Array:
    """Returns the product of two arrays of one type, in that type: [*left, *right] without the axes of `contract`."""
    wide = jax.lax.dot_general(left, right, (contract, ((), ())), preferred_element_type=product_type(left.dtype))
    return wide.astype(left.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: Float[Array, "..."], kernel: Float[Array, "..."], num_in_dims: int) -> Float[Array, "..."]:
    """Returns x W: [*rows, *in] and [*in, *out] -> [*rows, *out], where `in` has `num_in_dims` dimensions.

    The gradient by the kernel is x^T g, of the two as matrices. JAX's own rule makes g^T x and turns it round, for
    which XLA for CPU first writes g transposed, and computes it anew in that order (docs/lab_book.md, 2026-11-24).

    The kernel is cast to the type of `x`, which the product has, in here. So its gradient never has that type: it is
    summed over rows, and over devices, in float32.
    """
    contract = tuple(range(x.ndim - num_in_dims, x.ndim)), tuple(range(num_in_dims))
    return _rounded_product(x, kernel.astype(x.dtype), contract)


def _product_forward(x, kernel, num_in_dims):
    like_kernel = jnp.zeros((), kernel.dtype)
    kernel = kernel.astype(x.dtype)  # kept as it is multiplied: what is split over devices is then gathered once
    return product(x, kernel, num_in_dims), (x, kernel, like_kernel)


def _product_backward(num_in_dims, kept, cotangent):
    x, kernel, like_kernel = kept
    out_axes = tuple(range(num_in_dims, kernel.ndim))
    contract = tuple(range(cotangent.ndim - len(out_axes), cotangent.ndim)), out_axes
    by_x = _rounded_product(cotangent, kernel, contract)
    rows = x.reshape(-1, math.prod(kernel.shape[:num_in_dims]))
    by_kernel = jax.lax.dot_general(
        rows, cotangent.reshape(len(rows), -1), (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
    return by_x, by_kernel.reshape(kernel.shape).astype(like_kernel.dtype)


product.defvjp(_product_forward, _product_backward)


class Linear(nnx.Module):
    """Affine map y = x W + b that contracts the last `len(in_dims)` dimensions of its input; linear without a bias.

    Kernels are Xavier-uniform, biases zero. The paper does not say how it initialises; its code (tensor2tensor) uses
    uniform unit scaling averaged over fan in and fan out, which is the same distribution.

    Example:
        >>> float32 = jnp.dtype("float32")
        >>> to_heads = Linear((512,), (8, 64), ("embed", "heads", "head_dim"),
        ...                   param_dtype=float32, compute_dtype=float32, rngs=nnx.Rngs(0))
        >>> to_heads(jnp.ones((2, 7, 512))).shape
        (2, 7, 8, 64)
    """

    def __init__(
        self,
        in_dims: tuple[int, ...],
        out_dims: tuple[int, ...],
        logical_axes: tuple[str, ...],
        *,
        param_dtype: jnp.dtype,
        compute_dtype: jnp.dtype,
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        self.num_in_dims = len(in_dims)
        self.compute_dtype = compute_dtype
        kernel = xavier_uniform(rngs.params(), in_dims, out_dims, param_dtype)
        self.kernel = nnx.Param(kernel, logical_axes=logical_axes, num_in_dims=len(in_dims))
        bias_axes = tuple("norm" if axis == "embed" else axis for axis in logical_axes[len(in_dims) :])
        self.bias = nnx.Param(jnp.zeros(out_dims, param_dtype), logical_axes=bias_axes) if use_bias else None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the map of `x`: [..., *in_dims] -> [..., *out_dims], in `compute_dtype`."""
        kernel, in_axes = self.kernel.get_value(), tuple(range(self.num_in_dims))
        if isinstance(kernel, Int8Weights):
            y = int8_product(x, kernel, in_axes).astype(self.compute_dtype)
        else:
            y = product(x.astype(self.compute_dtype), kernel, self.num_in_dims)
        if self.bias is None:
            return y
        bias = jnp.broadcast_to(self.bias[...].astype(jnp.float32), y.shape)  # float32, in which its gradient is summed
        return y + bias.astype(self.compute_dtype)


def cast_kernels(model: nnx.Module, dtype: jnp.dtype) -> None:
    """Gives the kernels of every `Linear` in `model` the type `dtype`, but for those that are integers, in place.

    With the type that a layer computes in, no result changes: its kernel is cast to it in each call otherwise.
    """
    for _, module in list(nnx.iter_modules(model)):
        if isinstance(module, Linear) and not isinstance(module.kernel.get_value(), Int8Weights):
            module.kernel.set_value(module.kernel[...].astype(dtype))
