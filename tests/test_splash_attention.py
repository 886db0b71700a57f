"""JAX's attention kernels for a TPU, run as plain operations, against the reference: values, gradients, sharding."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer.ops import attention as attention_module
from flax_transformer.ops.attention import reference_attention, scale_query
from flax_transformer.ops.attention_mask import AttentionMask
from flax_transformer.ops.splash_attention import splash_attention, splash_serves
from flax_transformer.parallel.mesh import MeshConfig, make_mesh


def example(length=128, key_length=128, heads=2, key_heads=2, batch=2, head_dim=64):
    rng = np.random.default_rng(0)

    def draw(length, heads):
        return jnp.asarray(rng.normal(size=(batch, length, heads, head_dim)), jnp.float32)

    query, key, value, cotangent = (
        draw(length, heads), draw(key_length, key_heads), draw(key_length, key_heads), draw(length, heads)
    )  # fmt: skip
    lengths = np.linspace(key_length // 3, key_length, batch, dtype=int)
    segments = np.where(np.arange(key_length) < lengths[:, None], 1 + np.arange(key_length) // 40, 0)
    return (query, key, value), jnp.asarray(segments), cotangent


def value_and_gradients(form, arrays, cotangent):
    def loss(*arrays):
        made = form(*arrays)
        return jnp.sum(made * cotangent), made

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*arrays)


@pytest.mark.parametrize(
    "causal, packed, sizes",
    [
        (False, False, {"length": 128, "key_length": 256, "heads": 4}),
        (True, True, {"length": 256, "key_length": 256}),
    ],
)
def test_values_and_gradients_equal_those_of_the_reference(causal, packed, sizes):
    """A packed row has padding at its end, so some queries have no key; their results are read by nobody."""
    arrays, segments, cotangent = example(**sizes)
    mask = AttentionMask(segments, segments if packed else None, causal=causal)
    read = (segments > 0)[:, :, None, None].astype(jnp.float32) if packed else jnp.ones((2, 1, 1, 1))
    cotangent = cotangent * read
    of_kernels = attention_module._segments(mask, arrays[0], arrays[1])

    def fused(query, key, value):
        return splash_attention(scale_query(query), key, value, *of_kernels, causal=causal, interpret=True)

    (_, ours), gradients = value_and_gradients(fused, arrays, cotangent)
    (_, expected), expected_gradients = value_and_gradients(
        lambda query, key, value: reference_attention(query, key, value, mask), arrays, cotangent
    )
    chex.assert_trees_all_close(ours * read, expected * read, rtol=1e-5, atol=2e-5)
    chex.assert_trees_all_close(gradients, expected_gradients, rtol=1e-5, atol=5e-5)


def test_a_query_without_a_key_gets_finite_numbers():
    arrays, segments, cotangent = example()
    foreign = segments + 100

    def fused(query, key, value):
        return splash_attention(query, key, value, foreign, segments, causal=True, interpret=True)

    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(value_and_gradients(fused, arrays, cotangent)))


def test_devices_compute_their_own_sentences_and_heads():
    arrays, segments, cotangent = example()

    def fused(query, key, value):
        return splash_attention(query, key, value, segments, segments, causal=True, interpret=True)

    expected = value_and_gradients(fused, arrays, cotangent)
    with jax.set_mesh(make_mesh(MeshConfig(1, 2, 2), jax.devices()[:4])):
        assert "shard_map" in str(jax.make_jaxpr(fused)(*arrays))
        found = value_and_gradients(fused, arrays, cotangent)
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(expected), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    "length, head_dim, served", [(512, 64, True), (640, 128, True), (520, 64, False), (512, 32, False)]
)
def test_sizes(length, head_dim, served):
    short, long = (2, 512, 8, head_dim), (2, length, 4, head_dim)
    assert (
        splash_serves(short, long) == served
        and splash_serves((2, length, 8, head_dim), (2, 512, 4, head_dim)) == served
    )
    with jax.set_mesh(make_mesh(MeshConfig(1, 4, 2), jax.devices())):
        assert not splash_serves(short, long)  # four shards of two rows
