"""The affine map, over any number of input and output dimensions."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from flax_transformer.ops.product import add_bias, product

xavier_uniform_2d = jax.nn.initializers.xavier_uniform()


def xavier_uniform(key: jax.Array, in_dims: tuple[int, ...], out_dims: tuple[int, ...], dtype) -> jax.Array:
    """Returns a kernel [*in_dims, *out_dims] drawn from U(-a, a), a = sqrt(6 / (prod(in_dims) + prod(out_dims))).

    References:
        Glorot and Bengio 2010, equation 16. It is applied to the kernel as a matrix, with its input and its output
        dimensions flattened.
    """
    flat = xavier_uniform_2d(key, (math.prod(in_dims), math.prod(out_dims)), dtype)
    return flat.reshape(*in_dims, *out_dims)


class Unbiased(NamedTuple):
    """The result of an affine map before its bias is added, for a kernel that adds it as it reads.

    Attributes:
        product: x W, [..., *out_dims].
        bias: [*out_dims], or None.
    """

    product: jax.Array
    bias: jax.Array | None


class Linear(nnx.Module):
    """Affine map y = x W + b over the last `len(in_dims)` dimensions of its input; linear without a bias.

    Kernels are Xavier-uniform, biases zero. The paper does not name its initialisation. Its code (tensor2tensor) uses
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
        in_axes = tuple(range(len(in_dims)))
        self.kernel = nnx.Param(kernel, logical_axes=logical_axes, num_in_dims=len(in_dims), int8_axes=in_axes)
        bias_axes = tuple("norm" if axis == "embed" else axis for axis in logical_axes[len(in_dims) :])
        self.bias = nnx.Param(jnp.zeros(out_dims, param_dtype), logical_axes=bias_axes) if use_bias else None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the map of `x`: `[..., *in_dims] -> [..., *out_dims]`, in `compute_dtype`."""
        y, bias = self.unbiased(x)
        return y if bias is None else add_bias(y, bias)

    def unbiased(self, x: Float[Array, "..."]) -> Unbiased:
        """Returns the product and the bias, not yet added."""
        y = product(x, self.kernel.get_value(), self.num_in_dims, self.compute_dtype)
        return Unbiased(y, None if self.bias is None else self.bias[...])
