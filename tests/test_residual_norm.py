"""The kernels for residual and norm, run as plain operations, against the reference."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer import backend
from flax_transformer.ops import residual_kernels
from flax_transformer.ops.dropout import keep_threshold, random_words
from flax_transformer.ops.residual_norm import layer_norm, residual, residual_norm
from flax_transformer.parallel.mesh import MeshConfig, make_mesh

DIM = 64
EPSILON = 1e-3


def example(batch, length, dtype=jnp.float32):
    """Input, update, bias of the update, scale and bias of the norm; and a cotangent."""
    rng = np.random.default_rng(0)
    shapes = [(batch, length, DIM)] * 2 + [(DIM,)] * 3
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    return arrays, jnp.asarray(rng.normal(size=(batch, length, DIM)), dtype)


def fused(arrays, rate, key):
    words = random_words(key, arrays[0].shape)
    settings = residual_kernels.Settings(EPSILON, keep_threshold(rate), interpret=True)
    x, update, update_bias, scale, bias = arrays
    return residual_kernels.residual_norm(settings, x, update, update_bias, scale, bias, words)


def plain(arrays, rate, key):
    x, update, update_bias, scale, bias = arrays
    return layer_norm(residual(x, update, update_bias, rate, key), scale, bias, EPSILON)


def gradients(form, arrays, cotangent, rate, key):
    def loss(arrays):
        result = form(arrays, rate, key)
        return jnp.sum((result * cotangent).astype(jnp.float32)), result

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)


@pytest.mark.parametrize("batch, length, rate", [(3, 7, 0.1), (33, 32, 0.0), (20, 30, 0.5)])
def test_values_and_gradients_equal_those_of_the_reference(batch, length, rate):
    """Elements are dropped by the same bits. The rows fill no whole number of tiles."""
    arrays, cotangent = example(batch, length)
    ours, reference = (gradients(form, arrays, cotangent, rate, jax.random.key(1)) for form in (fused, plain))
    chex.assert_trees_all_close(ours, reference, rtol=1e-4, atol=1e-4)


def test_bfloat16_differs_by_rounding():
    arrays, cotangent = example(8, 16, jnp.bfloat16)
    ours, reference = (gradients(form, arrays, cotangent, 0.1, jax.random.key(1))[1] for form in (fused, plain))
    for a, b in zip(ours, reference, strict=True):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        assert jnp.linalg.norm(a - b) < 0.02 * jnp.linalg.norm(b)


def test_devices_compute_their_own_rows():
    arrays, cotangent = example(8, 5)
    expected = gradients(fused, arrays, cotangent, 0.1, jax.random.key(1))
    with jax.set_mesh(make_mesh(MeshConfig(2, 1, 2), jax.devices()[:4])):
        found = gradients(fused, arrays, cotangent, 0.1, jax.random.key(1))
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(expected), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    "platform, dim, key, chosen",
    [("gpu", 64, 0, True), ("gpu", 48, 0, False), ("gpu", 64, None, False), ("cpu", 64, 0, False)],
)
def test_the_kernels_are_chosen_on_a_gpu_in_training(platform, dim, key, chosen):
    key = None if key is None else jax.random.key(key)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, dim)), jnp.float32)
    ones = jnp.ones((dim,))

    def run(x):
        return residual_norm(x, 2 * x, ones, ones, ones, epsilon=EPSILON, dropout_rate=0.1, key=key)

    with backend.tracing_for(platform):
        assert ("pallas_call" in str(jax.make_jaxpr(run)(x))) == chosen
        np.testing.assert_allclose(jax.jit(run)(x), run(x), rtol=1e-5, atol=1e-5)  # on this machine: the reference
