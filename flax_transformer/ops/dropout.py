"""Dropout from one random byte for each element.

A keep decision needs 8 random bits, so each 32-bit word of threefry decides four elements. Threefry is then about as
fast on a CPU as `rbg`. Unlike `rbg`, it gives the same bits on every mesh. Each device draws only its share.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from flax_transformer import backend
from flax_transformer.errors import ConfigError

LANES = 128  # of a TPU's vectors


def check_dropout_rate(name: str, rate: float) -> None:
    """Raises a `ConfigError` unless `dropout` can draw the rate; `name` is the configuration field."""
    if not 0.0 <= rate < 1.0:
        raise ConfigError(f"{name} must be at least 0 and below 1, got {rate}.")
    if rate and keep_threshold(rate) == 256:
        raise ConfigError(
            f"{name}: rates are drawn in steps of 1/256, and {rate} rounds to 0. Give 0, or at least 0.002."
        )


def keep_threshold(rate: float) -> int:
    """Returns the number of the 256 values of a byte that keep an element."""
    return max(1, round((1.0 - rate) * 256))


def random_words(key: PRNGKeyArray, shape: tuple[int, ...]) -> jax.Array:
    """Returns uint32 random words. The bytes of each, lowest first, are for four neighbours of the last axis."""
    return jax.random.bits(key, (*shape[:-1], -(-shape[-1] // 4)), jnp.uint32)


def random_bytes(key: PRNGKeyArray, shape: tuple[int, ...]) -> jax.Array:
    """Returns uint8 random bytes, those of `random_words`."""
    words = random_words(key, shape)
    as_bytes = jax.lax.bitcast_convert_type(words, jnp.uint8)  # [..., W] -> [..., W, 4]
    return as_bytes.reshape(*words.shape[:-1], words.shape[-1] * 4)[..., : shape[-1]]


def kept(key: PRNGKeyArray, shape: tuple[int, ...], threshold: int) -> Bool[Array, "*shape"]:
    """Returns which elements are kept: those whose random byte is below `threshold`.

    A TPU is slow to spread the bytes of a word over neighbouring lanes. There the decisions for first bytes, for second
    bytes and so on are made side by side. A product with a permutation then puts them in order, exactly
    (docs/lab_book.md, "Bytes of random words on a TPU").
    """
    if backend.platform() != "tpu" or shape[-1] < 4:
        return random_bytes(key, shape) < jnp.uint8(threshold)
    words = random_words(key, shape)
    # [..., W] -> [..., G, W / G]: groups fill the lanes of a TPU. A shard of whole groups is not moved.
    width = math.gcd(words.shape[-1], LANES)
    words = words.reshape(*words.shape[:-1], -1, width)
    shifts = range(0, 32, 8)
    decided = [((words >> jnp.uint32(shift)) & jnp.uint32(255)) < jnp.uint32(threshold) for shift in shifts]
    row = jnp.arange(4 * width)
    permutation = ((row % width * 4 + row // width)[:, None] == row[None, :]).astype(jnp.bfloat16)
    side_by_side = jnp.concatenate(decided, axis=-1).astype(jnp.bfloat16)
    in_order = jnp.einsum("...gi,io->...go", side_by_side, permutation, preferred_element_type=jnp.bfloat16)
    return in_order.reshape(*shape[:-1], -1)[..., : shape[-1]] > jnp.bfloat16(0.5)


def dropout(x: Float[Array, "*shape"], rate: float, key: PRNGKeyArray | None) -> Float[Array, "*shape"]:
    """Returns `x` with each element kept with probability `1 - rate` and scaled, or set to zero.

    The keep probability is rounded to n/256. The scale uses the rounded value, so the expectation is `x` up to
    rounding.

    Args:
        x: any shape.
        rate: probability that an element is set to zero, in [0, 1).
        key: random key; None (evaluation) returns `x` unchanged.

    References:
        Srivastava et al. 2014, "Dropout", section 4 (here in the inverted form, scaled when training).
    """
    if key is None or rate == 0.0:
        return x
    threshold = keep_threshold(rate)
    if threshold == 256:
        return x
    keep = kept(key, x.shape, threshold)
    return jnp.where(keep, x * jnp.asarray(256 / threshold, x.dtype), jnp.zeros((), x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _relu_kept(x: Float[Array, "*shape"], threshold: int, key: PRNGKeyArray) -> Float[Array, "*shape"]:
    # Not x > 0, so that NaN stays NaN.
    keep = kept(key, x.shape, threshold)
    return jnp.where(keep & ~(x <= 0), x * jnp.asarray(256 / threshold, x.dtype), jnp.zeros((), x.dtype))


def _relu_kept_forward(x, threshold, key):
    y = _relu_kept(x, threshold, key)
    return y, y


def _relu_kept_backward(threshold, y, cotangent):
    scale = jnp.asarray(256 / threshold, cotangent.dtype)
    return jnp.where(y > 0, cotangent * scale, jnp.zeros((), cotangent.dtype)), None


_relu_kept.defvjp(_relu_kept_forward, _relu_kept_backward)


def relu_dropout(x: Float[Array, "*shape"], rate: float, key: PRNGKeyArray | None) -> Float[Array, "*shape"]:
    """Returns `dropout` of the positive part of `x`.

    An element of the result is positive exactly where the gradient passes. So on an accelerator the backward pass reads
    the result alone, neither `x` nor random bits (docs/lab_book.md, "Dropout after a rectifier"). See `dropout` for the
    arguments.
    """
    plain = key is None or rate == 0.0 or keep_threshold(rate) == 256
    if plain or backend.platform() in (None, "cpu"):
        return dropout(jax.nn.relu(x), rate, key)
    return _relu_kept(x, keep_threshold(rate), key)


def split_key(key: PRNGKeyArray | None, num: int) -> list[PRNGKeyArray | None]:
    """Returns `num` independent keys, or `num` times None without a key (evaluation)."""
    if key is None:
        return [None] * num
    return list(jax.random.split(key, num))
