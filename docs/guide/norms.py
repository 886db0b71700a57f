"""Changes of the package's norm and residual connection, for the time of an experiment.

The package has no batch normalisation, and no model without residual connections. Here they take the place of the
package's functions while a program is traced.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from flax_transformer import Batch
from flax_transformer.nn import normalization
from flax_transformer.nn.attention import over_tokens
from flax_transformer.ops.attention_mask import AttentionMask
from flax_transformer.ops.residual_norm import layer_norm, residual


def batch_norm(x: Any, scale: Any, bias: Any, epsilon: float) -> Any:
    """Returns x with mean 0 and variance 1 of each channel over all rows, times scale plus bias."""
    mean, variance = jnp.mean(x, axis=(0, 1)), jnp.var(x, axis=(0, 1))
    return (x - mean) * jax.lax.rsqrt(variance + epsilon) * scale + bias


@contextlib.contextmanager
def batch_normalisation() -> Iterator[None]:
    """Programs that are traced inside normalise over the batch, as batch normalisation does in training."""

    def swapped(x, update, update_bias, scale, bias, *, epsilon, dropout_rate, key):
        return batch_norm(residual(x, update, update_bias, dropout_rate, key), scale, bias, epsilon)

    with mock.patch.object(normalization, "residual_norm", swapped):
        yield


@contextlib.contextmanager
def no_residuals() -> Iterator[None]:
    """Programs that are traced inside have no residual connections: a sub-layer's output replaces its input."""

    def only_update(x, update, update_bias, dropout_rate, key):
        return residual(jnp.zeros_like(x), update, update_bias, dropout_rate, key)

    def norm_of_update(x, update, update_bias, scale, bias, *, epsilon, dropout_rate, key):
        return layer_norm(only_update(x, update, update_bias, dropout_rate, key), scale, bias, epsilon)

    with (
        mock.patch.object(normalization, "residual", only_update),
        mock.patch.object(normalization, "residual_norm", norm_of_update),
    ):
        yield


def likeness_by_layer(model: Any, batch: Batch) -> np.ndarray:
    """Returns how alike the tokens of a sentence are after each encoder layer.

    Returns:
        [L], mean cosine of two tokens of the same sentence: 1 if all tokens have the same direction.
    """
    tokens, positions, segments = (jnp.asarray(side) for side in batch[:3])
    mask = AttentionMask(key_segments=segments, query_segments=segments)
    apply = jax.jit(lambda layer, x: layer(x, over_tokens(mask), None)[0])
    pairs = np.asarray(segments)[:, :, None] * np.asarray(segments)[:, None, :] * (1 - np.eye(tokens.shape[1]))
    x, likeness = model.encoder.input(model.encoder_embedding, tokens, positions), []
    for layer in model.encoder.unstacked():
        x = apply(layer, x)
        unit = np.asarray(x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-12))
        likeness.append(((unit @ unit.swapaxes(1, 2)) * pairs).sum() / pairs.sum())
    return np.array(likeness)
