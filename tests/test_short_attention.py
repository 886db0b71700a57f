"""The kernel for short rows, run as plain operations, against the reference: values, gradients, dropout, sharding."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer.ops.attention import reference_attention
from flax_transformer.ops.attention_mask import AttentionMask
from flax_transformer.ops.dropout import keep_threshold, random_words
from flax_transformer.ops.product import add_bias
from flax_transformer.ops.short_attention import Settings, serves, short_attention
from flax_transformer.parallel.mesh import MeshConfig, make_mesh


def example(batch=3, length=24, key_length=40, heads=2, head_dim=16, dtype=jnp.float32):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    query, keys_values = draw(batch, length, 1, heads, head_dim), draw(batch, key_length, 2, heads, head_dim)
    if length == key_length:  # as self-attention
        projections = (jnp.concatenate([query, keys_values], axis=2),)
    else:
        projections = (query, keys_values)
    biases = tuple(draw(x.shape[2], heads, head_dim).astype(jnp.float32) for x in projections)
    segments = jnp.asarray(rng.integers(0, 3, (batch, key_length)), jnp.int32).at[0].set(0)  # a row of padding
    query_segments = segments if length == key_length else jnp.ones((batch, length), jnp.int32)
    return projections, biases, query_segments, segments, draw(batch, length, heads, head_dim)


def separate(projections, biases):
    """Query, key and value with their biases."""
    added = [add_bias(x, b) for x, b in zip(projections, biases, strict=True)]
    return [part[:, :, 0] for x in added for part in jnp.split(x, x.shape[2], axis=2)]


def both_forms(causal, rate, dtype=jnp.float32, **sizes):
    projections, biases, query_segments, segments, cotangent = example(dtype=dtype, **sizes)
    batch, length, heads, head_dim = cotangent.shape
    key = jax.random.key(3)
    words = random_words(key, (batch, heads, length, segments.shape[1]))
    settings = Settings(causal, head_dim**-0.5, keep_threshold(rate), interpret=True)
    mask = AttentionMask(segments, query_segments, causal=causal)

    def fused(projections, biases):
        made = short_attention(settings, projections, biases, query_segments, segments, words)
        return jnp.sum((made * cotangent).astype(jnp.float32)), made

    def plain(projections, biases):
        query, key_, value = separate(projections, biases)
        made = reference_attention(query, key_, value, mask, dropout_rate=rate, dropout_key=key)
        return jnp.sum((made * cotangent).astype(jnp.float32)), made

    both = [jax.jit(jax.value_and_grad(form, (0, 1), has_aux=True)) for form in (fused, plain)]
    return [form(projections, biases) for form in both]


@pytest.mark.parametrize(
    "causal, rate, sizes",
    [(False, 0.5, {}), (True, 0.1, {"length": 40}), (False, 0.0, {"length": 16, "key_length": 16, "head_dim": 32})],
)
def test_values_and_gradients_equal_those_of_the_reference(causal, rate, sizes):
    """Weights are dropped by the same bits, so nothing is left to chance."""
    ours, reference = both_forms(causal, rate, **sizes)
    chex.assert_trees_all_close(ours, reference, rtol=1e-5, atol=2e-5)


def test_bfloat16_differs_by_rounding():
    """Gradients by the biases are sums over all tokens, in float32."""
    (_, ours), (_, reference) = both_forms(True, 0.1, dtype=jnp.bfloat16, length=32, key_length=32)
    assert all(by_bias.dtype == jnp.float32 for by_bias in ours[1])
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        assert jnp.linalg.norm(a - b) < 0.02 * jnp.linalg.norm(b)


def test_devices_compute_their_own_sentences_and_heads():
    """On four devices results and gradients, those by the biases too, are those of one."""
    projections, biases, query_segments, segments, cotangent = example(batch=4)
    words = random_words(jax.random.key(0), (4, 2, 24, 40))

    def loss(projections, biases):
        made = short_attention(Settings(False, 0.25, 230, True), projections, biases, query_segments, segments, words)
        return jnp.sum(made * cotangent)

    expected = jax.value_and_grad(loss, (0, 1))(projections, biases)
    with jax.set_mesh(make_mesh(MeshConfig(1, 2, 2), jax.devices()[:4])):
        program = jax.jit(jax.value_and_grad(loss, (0, 1)))
        assert "shard_map" in str(jax.make_jaxpr(program)(projections, biases))
        found = program(projections, biases)
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(expected), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    "length, head_dim, served", [(128, 64, True), (129, 64, False), (64, 48, False), (64, 8, False)]
)
def test_sizes(length, head_dim, served):
    assert serves(64, length, head_dim) == served and serves(length, 64, head_dim) == served
