"""The residual connection with dropout and layer norm: the reference, a kernel for a GPU, and the choice.

The plain form makes several passes over arrays of [B, T, D] in each direction. XLA sums over rows and over columns in
kernels of their own. The kernels here read each array once. The backward kernel also sums the gradients by scale and
biases over its rows (docs/lab_book.md, "Residual and norm as one kernel").

Random bits are drawn outside, in the order of `dropout`, so the results equal those of the reference with the same key.

Legend: B batch, T length, D model dim, R rows of all sentences.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from flax_transformer import backend
from flax_transformer.ops.dropout import dropout, keep_threshold, random_words
from flax_transformer.ops.product import add_bias
from flax_transformer.parallel.sharding_rules import num_shards

# --- the reference


def layer_norm(
    x: Float[Array, "*rows D"], scale: Float[Array, "D"], bias: Float[Array, "D"], epsilon: float
) -> Float[Array, "*rows D"]:
    """Returns (x - mean) / sqrt(variance + epsilon) * scale + bias, in the type of `x`. Statistics are float32.

    References:
        Ba, Kiros and Hinton 2016, equation 4 (biased variance).
    """
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    centred = wide - mean
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    normalised = centred * jax.lax.rsqrt(variance + epsilon)
    scale = jnp.broadcast_to(scale.astype(jnp.float32), normalised.shape)
    bias = jnp.broadcast_to(bias.astype(jnp.float32), normalised.shape)
    return (normalised * scale + bias).astype(x.dtype)


def residual(
    x: Float[Array, "*rows D"],
    update: Float[Array, "*rows D"],
    update_bias: Float[Array, "D"] | None,
    dropout_rate: float,
    key: PRNGKeyArray | None,
) -> Float[Array, "*rows D"]:
    """Returns x + dropout(update + update_bias)."""
    update = update if update_bias is None else add_bias(update, update_bias)
    return x + dropout(update, dropout_rate, key)


# --- the choice


def residual_norm(
    x: Float[Array, "*rows D"],
    update: Float[Array, "*rows D"],
    update_bias: Float[Array, "D"] | None,
    scale: Float[Array, "D"],
    bias: Float[Array, "D"],
    *,
    epsilon: float,
    dropout_rate: float,
    key: PRNGKeyArray | None,
) -> Float[Array, "*rows D"]:
    """Returns layer_norm(x + dropout(update + update_bias)), in the type of `x`.

    Args:
        x: input of the block.
        update: output of the sub-layer, without `update_bias`.
        update_bias: bias of the sub-layer's last affine map; None adds nothing.
        scale, bias: parameters of the norm.
        epsilon: number that is added to the variance.
        dropout_rate: probability that an element of the update is dropped.
        key: random key; None means evaluation.
    """

    def plain(x, update, update_bias, scale, bias, key):
        return layer_norm(residual(x, update, update_bias, dropout_rate, key), scale, bias, epsilon)

    def fused(x, update, update_bias, scale, bias, key):
        dim = x.shape[-1]
        threshold = 256 if dropout_rate == 0.0 else keep_threshold(dropout_rate)
        words = jnp.zeros((*x.shape[:-1], 1), jnp.uint32) if threshold == 256 else random_words(key, x.shape)
        update_bias = jnp.zeros((dim,), jnp.float32) if update_bias is None else update_bias
        return residual_kernels.residual_norm(
            residual_kernels.Settings(epsilon, threshold), x, update, update_bias, scale, bias, words
        )

    arguments = (x, update, update_bias, scale, bias, key)
    # Without a key nothing is differentiated. Few rows, as in a search, would only start more kernels.
    if not backend.uses_kernels("gpu") or key is None or x.ndim != 3 or x.shape[0] % num_shards("batch"):
        return plain(*arguments)
    from flax_transformer.ops import residual_kernels  # Pallas takes time to import; only a GPU needs it

    if not residual_kernels.serves(x.shape[-1]):
        return plain(*arguments)
    # The program of a GPU may also be run elsewhere, in tests.
    return jax.lax.platform_dependent(*arguments, cuda=fused, default=plain)
