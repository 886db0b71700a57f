"""The kernel of a decoding step, run as plain operations, against the plain form: values, cache, sharding."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer.ops.attention import scale_query
from flax_transformer.ops.cached_attention import SelfAttentionCache, cached_self_attention, write_ancestors
from flax_transformer.ops.decode_attention import decode_attention, serves
from flax_transformer.parallel.mesh import MeshConfig, make_mesh


def example(heads=4, key_heads=2, length=40, beams=3, dtype=jnp.float32):
    """Two sentences at different places, and an idle slot behind the end of the cache."""
    rng = np.random.default_rng(0)
    batch, dim = 4, 16

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    query = draw(batch, beams, heads, dim)
    key, value = draw(batch, beams, key_heads, dim), draw(batch, beams, key_heads, dim)
    keys, values = draw(batch, key_heads, dim, beams, length), draw(batch, key_heads, beams, length, dim)
    positions = jnp.asarray([0, 5, length - 1, length], jnp.int32)
    ancestors = jnp.asarray(rng.integers(0, beams, (batch, beams, length)), jnp.int32)
    return SelfAttentionCache((keys,), (values,)), query, key, value, positions, write_ancestors(ancestors, positions)


def by_kernel(cache, query, key, value, positions, ancestors):
    new = scale_query(query), key, value
    attended, keys, values = decode_attention(
        *new, cache.keys[0], cache.values[0], positions, ancestors, interpret=True
    )
    return attended, SelfAttentionCache((keys,), (values,))


@pytest.mark.parametrize("sizes", [{}, {"heads": 2, "length": 20, "beams": 1}])
def test_values_and_cache_equal_those_of_the_plain_form(sizes):
    arguments = example(**sizes)
    expected, expected_cache = cached_self_attention(*arguments)
    found, cache = by_kernel(*arguments)
    np.testing.assert_allclose(found[:3], expected[:3], rtol=1e-5, atol=1e-6)
    assert bool(jnp.isfinite(found).all())
    chex.assert_trees_all_equal(cache, expected_cache)


def test_bfloat16_differs_by_rounding():
    arguments = example(dtype=jnp.bfloat16)
    expected, _ = cached_self_attention(*arguments)
    found, _ = by_kernel(*arguments)
    found, expected = (x[:3].astype(jnp.float32) for x in (found, expected))
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=0.02)


def test_only_the_history_of_a_beam_is_read():
    """Slots that a sentence has not reached, and those of other beams, may hold anything."""
    cache, query, key, value, positions, ancestors = example(beams=2)
    own = jnp.broadcast_to(jnp.arange(2, dtype=jnp.int32)[None, :, None], ancestors.shape)
    expected, _ = by_kernel(cache, query, key, value, positions, own)
    filled = jnp.arange(40)[None, :] < positions[:, None]
    keys = jnp.where(filled[:, None, None, None], cache.keys[0], jnp.nan).at[:, :, :, 1].set(jnp.nan)
    values = jnp.where(filled[:, None, None, :, None], cache.values[0], jnp.nan).at[:, :, 1].set(jnp.nan)
    found, _ = by_kernel(SelfAttentionCache((keys,), (values,)), query, key, value, positions, own)
    np.testing.assert_array_equal(found[:, 0], expected[:, 0])


def test_devices_compute_their_own_sentences_and_heads():
    arguments = example()
    expected = jax.device_get(jax.jit(by_kernel)(*arguments))
    with jax.set_mesh(make_mesh(MeshConfig(2, 1, 2), jax.devices()[:4])):
        assert "shard_map" in str(jax.make_jaxpr(by_kernel)(*arguments))
        found = jax.device_get(jax.jit(by_kernel)(*arguments))
    chex.assert_trees_all_close(found, expected, rtol=1e-6)


def test_an_ensemble_runs_the_kernel_for_all_models():
    cache, query, key, value, positions, ancestors = example()
    one = cache, query, key, value
    models = jax.tree.map(lambda x: jnp.stack([x, x[:, ::-1]]), one)
    run = functools.partial(by_kernel, positions=positions, ancestors=ancestors)
    together, _ = jax.vmap(lambda model: run(*model))(models)
    for number in range(2):
        of_one = jax.tree.map(lambda x, n=number: x[n], models)
        np.testing.assert_allclose(together[number], run(*of_one)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("head_dim, served", [(64, True), (48, False), (8, False)])
def test_sizes(head_dim, served):
    assert serves((4, 3, 8, head_dim), 8) == served
    with jax.set_mesh(make_mesh(MeshConfig(8, 1, 1), jax.devices())):
        assert not serves((4, 3, 8, head_dim), 8)  # eight shards of four rows
