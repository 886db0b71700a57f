"""The position-wise feed-forward network."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from flax_transformer.nn.linear import Linear
from flax_transformer.ops.dropout import dropout, relu_dropout
from flax_transformer.parallel.sharding_rules import constrain

Activation = Literal["relu", "gelu", "swish"]
# The exact GELU (by the error function), as in PyTorch; JAX's default is an approximation by tanh.
ACTIVATIONS = {"relu": jax.nn.relu, "gelu": functools.partial(jax.nn.gelu, approximate=False), "swish": jax.nn.swish}


class FeedForward(nnx.Module):
    """Two affine maps with an activation between them, applied to each position alone.

    Example:
        >>> layer = FeedForward(4, 8, activation="relu", dropout_rate=0.1, param_dtype=jnp.dtype("float32"),
        ...                     compute_dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((1, 3, 4))).shape
        (1, 3, 4)

    References:
        Vaswani et al. 2017, section 3.3, equation 2. The paper has no dropout after the activation. Its code
        (`relu_dropout`) and PyTorch's layers have it.
    """

    def __init__(
        self,
        model_dim: int,
        hidden_dim: int,
        *,
        activation: Activation,
        dropout_rate: float,
        param_dtype: jnp.dtype,
        compute_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        self.dropout_rate = dropout_rate
        dtypes = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
        self.up = Linear((model_dim,), (hidden_dim,), ("embed", "mlp"), **dtypes, rngs=rngs)
        self.down = Linear((hidden_dim,), (model_dim,), ("mlp", "embed"), **dtypes, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], key: PRNGKeyArray | None = None) -> Float[Array, "B T D"]:
        """Returns the network's output; `key` None means evaluation."""
        return self.down(self.hidden(x, key))

    def hidden(self, x: Float[Array, "B T D"], key: PRNGKeyArray | None = None) -> Float[Array, "B T F"]:
        """Returns the hidden units, after dropout; `key` None means evaluation."""
        hidden = constrain(self.up(x), "batch", "length", "mlp")
        if self.activation == "relu":
            return relu_dropout(hidden, self.dropout_rate, key)
        return dropout(ACTIVATIONS[self.activation](hidden), self.dropout_rate, key)
