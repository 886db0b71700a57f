"""Layer normalisation, and its two places around a sub-layer."""

from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from flax_transformer.nn.linear import Unbiased
from flax_transformer.ops.residual_norm import layer_norm, residual, residual_norm

NormOrder = Literal["post", "pre"]


class LayerNorm(nnx.Module):
    """Layer normalisation over the last dimension: (x - mean) / sqrt(variance + epsilon) * scale + bias.

    Statistics are float32 whatever the compute type.

    Example:
        >>> norm = LayerNorm(2, epsilon=1e-5, param_dtype=jnp.dtype("float32"))
        >>> norm(jnp.array([[1.0, 3.0]])).round(3).tolist()
        [[-1.0, 1.0]]

    References:
        Ba, Kiros and Hinton 2016, equation 4 (biased variance). PyTorch, Marian and CTranslate2 use an epsilon of 1e-5.
    """

    def __init__(self, dim: int, *, epsilon: float, param_dtype: jnp.dtype):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones((dim,), param_dtype), logical_axes=("norm",))
        self.bias = nnx.Param(jnp.zeros((dim,), param_dtype), logical_axes=("norm",))

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """Returns `x` normalised, in the type of `x`."""
        return layer_norm(x, self.scale[...], self.bias[...], self.epsilon)


class ResidualNorm(nnx.Module):
    """The residual connection around a sub-layer, with its layer norm ("Add & Norm" in figure 1 of the paper).

        post (the paper's):  y = norm(x + dropout(sublayer(x)))
        pre:                 y = x + dropout(sublayer(norm(x)))

    The caller applies the sub-layer between `enter` and `leave`, so the sub-layer may return more than one array.

    Example:
        >>> residual = ResidualNorm(8, "pre", dropout_rate=0.1, epsilon=1e-5, param_dtype=jnp.dtype("float32"))
        >>> x = jnp.ones((1, 2, 8))
        >>> y = residual.leave(x, 3 * residual.enter(x), key=None)

    References:
        Vaswani et al. 2017, sections 3.1 and 5.4 (dropout on the sub-layer's output, before it is added);
        Xiong et al. 2020 for the pre-norm form.
    """

    def __init__(
        self,
        dim: int,
        order: NormOrder,
        *,
        dropout_rate: float,
        epsilon: float,
        param_dtype: jnp.dtype,
    ):
        self.order = order
        self.dropout_rate = dropout_rate
        self.norm = LayerNorm(dim, epsilon=epsilon, param_dtype=param_dtype)

    def enter(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """Returns the input of the sub-layer."""
        return self.norm(x) if self.order == "pre" else x

    def leave(
        self, x: Float[Array, "*rows D"], update: Float[Array, "*rows D"] | Unbiased, key: PRNGKeyArray | None
    ) -> Float[Array, "*rows D"]:
        """Returns the block's output from its input `x` and the sub-layer's output `update`."""
        update, bias = update if isinstance(update, Unbiased) else (update, None)
        if self.order == "pre":
            return residual(x, update, bias, self.dropout_rate, key)
        return residual_norm(
            x,
            update,
            bias,
            self.norm.scale[...],
            self.norm.bias[...],
            epsilon=self.norm.epsilon,
            dropout_rate=self.dropout_rate,
            key=key,
        )
