"""Attention: masks drawn by hand, the reference against its equation in float64, and what its interface promises."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_transformer.nn.attention import MultiHeadAttention, over_history, over_tokens
from flax_transformer.ops import attention as attention_module
from flax_transformer.ops.attention import attention, attention_weights, masked_softmax
from flax_transformer.ops.attention_mask import AttentionMask
from flax_transformer.ops.cached_attention import (
    cached_cross_attention,
    cached_self_attention,
    cross_attention_cache,
    empty_self_attention_cache,
    write_ancestors,
)
from flax_transformer.training.step import Objective, batch_loss
from tests import tiny
from tests.platforms import tracing_for
from tests.test_layers import DTYPES, FLOAT32, ONE_OP, float64, normal, randomised


def drawn(*rows: str) -> np.ndarray:
    return np.array([[c == "1" for c in row] for row in rows])


def softmax64(scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
    weights = np.where(mask, np.exp(scores), 0.0)
    return weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)


def attention64(q, k, v, mask):
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    weights = softmax64(scores, np.asarray(mask))
    return np.einsum("bnts,bsnh->btnh", weights, v), weights


# --- masks


def test_causal_mask():
    expected = drawn("1000", "1100", "1110", "1111")
    np.testing.assert_array_equal(AttentionMask(causal=True).materialize(4, 4), expected[None, None])


def test_segments_hide_padding_and_other_segments():
    mask = AttentionMask(key_segments=jnp.array([[1, 2, 2, 0, 0]]), query_segments=jnp.array([[1, 1, 2, 0]]))
    expected = drawn("10000", "10000", "01100", "00000")
    np.testing.assert_array_equal(mask.materialize(4, 5), expected[None, None])


def test_segments_and_order_together():
    segments = jnp.array([[1, 1, 2, 2, 0]])
    mask = AttentionMask(key_segments=segments, query_segments=segments, causal=True)
    expected = drawn("10000", "11000", "00100", "00110", "00000")
    np.testing.assert_array_equal(mask.materialize(5, 5), expected[None, None])


def test_padding_alone_is_told_from_the_rest():
    segments = jnp.array([[1, 1, 0], [3, 0, 0]])
    mask = AttentionMask(key_segments=segments)
    np.testing.assert_array_equal(mask.materialize(2, 3), drawn("110", "100")[:, None, None])
    assert mask.is_padding_only and AttentionMask().is_padding_only
    for other in (
        AttentionMask(key_segments=segments, query_segments=segments),
        AttentionMask(key_segments=segments, causal=True),
        AttentionMask(window=2),
    ):
        assert not other.is_padding_only


def test_a_window_and_offsets_of_the_queries():
    window = AttentionMask(window=1)
    np.testing.assert_array_equal(window.materialize(4, 4), drawn("1100", "1110", "0111", "0011")[None, None])
    causal = AttentionMask(causal=True, window=1)
    np.testing.assert_array_equal(causal.materialize(4, 4), drawn("1000", "1100", "0110", "0011")[None, None])
    later = AttentionMask(causal=True, query_offsets=jnp.array([2, 0]))
    expected = np.stack([drawn("1110", "1111"), drawn("1000", "1100")])[:, None]
    np.testing.assert_array_equal(later.materialize(2, 4), expected)


def test_a_shared_mask_is_made_once():
    mask = AttentionMask(key_segments=jnp.array([[1, 2, 0]]), query_segments=jnp.array([[1, 2, 2]]), causal=True)
    shared = mask.shared(3, 3)
    assert shared.array is not None and shared.materialize(3, 3) is shared.array
    np.testing.assert_array_equal(shared.array, mask.materialize(3, 3))
    assert not shared.is_padding_only and AttentionMask().shared(2, 2).is_padding_only
    one_row = AttentionMask(key_segments=jnp.array([[1, 2, 0]])).shared(1, 3)
    np.testing.assert_array_equal(one_row.materialize(5, 3), drawn("110")[None, None])  # of any number of queries


def test_the_array_of_a_mask_cannot_contradict_its_parts():
    """A fused form reads the parts, and the reference reads the array."""
    with pytest.raises(TypeError, match="array"):
        AttentionMask(array=jnp.ones((1, 1, 3, 3), bool))  # type: ignore[unexpected-keyword]
    shared = AttentionMask(key_segments=jnp.array([[1, 1, 0]]), causal=True).shared(3, 3)
    with pytest.raises((TypeError, ValueError), match="array"):  # Python 3.13 has another class
        dataclasses.replace(shared, array=jnp.ones((1, 1, 3, 3), bool))
    replaced = dataclasses.replace(shared, causal=False)
    assert replaced.array is None
    np.testing.assert_array_equal(replaced.materialize(3, 3), drawn("110")[None, None])
    twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), shared)  # rows of the array are rows of the parts
    np.testing.assert_array_equal(twice.materialize(3, 3), np.repeat(shared.materialize(3, 3), 2, axis=0))


def test_masks_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="made for 4 queries and 4 keys cannot serve 2 and 4"):
        AttentionMask(causal=True).shared(4, 4).materialize(2, 4)
    with pytest.raises(ValueError, match="made for 1 queries and 4 keys cannot serve 2 and 4"):
        AttentionMask(causal=True).shared(1, 4).materialize(2, 4)
    with pytest.raises(ValueError, match="query_segments need key_segments"):
        AttentionMask(query_segments=jnp.ones((1, 2), jnp.int32))
    with pytest.raises(ValueError, match="window must be at least 0, got -1"):
        AttentionMask(window=-1)


# --- the reference


@pytest.mark.parametrize("kind", ["full", "causal", "segments"])
def test_attention_equals_its_equation(kind):
    q, k, v = normal(1, 2, 5, 3, 4), normal(2, 2, 5, 3, 4), normal(3, 2, 5, 3, 4)
    segments = jnp.array([[1, 1, 2, 2, 0], [1, 2, 2, 2, 2]])
    mask = {
        "full": AttentionMask(),
        "causal": AttentionMask(causal=True),
        "segments": AttentionMask(key_segments=segments, query_segments=segments),
    }[kind]
    expected, expected_weights = attention64(q, k, v, mask.materialize(5, 5))
    np.testing.assert_allclose(jax.jit(attention)(q, k, v, mask), expected, **ONE_OP)
    np.testing.assert_allclose(jax.jit(attention_weights)(q, k, mask), expected_weights, **ONE_OP)


def test_bias_scale_and_soft_cap_enter_the_equation_where_it_says():
    q, k, v, bias = normal(1, 2, 5, 3, 4), normal(2, 2, 6, 3, 4), normal(3, 2, 6, 3, 4), normal(4, 1, 3, 5, 6)
    scores = 2.0 * np.tanh(0.3 * np.einsum("btnh,bsnh->bnts", float64(q), float64(k)) / 2.0) + float64(bias)
    expected = np.einsum("bnts,bsnh->btnh", softmax64(scores, np.array(True)), float64(v))
    found = jax.jit(functools.partial(attention, scale=0.3, soft_cap=2.0))(q, k, v, AttentionMask(), bias=bias)
    np.testing.assert_allclose(found, expected, **ONE_OP)


def test_a_key_value_head_serves_several_query_heads():
    q, k, v = normal(1, 2, 5, 6, 4), normal(2, 2, 5, 2, 4), normal(3, 2, 5, 2, 4)
    mask = AttentionMask(causal=True)
    served = [0, 0, 0, 1, 1, 1]
    expected = jax.jit(attention)(q, np.asarray(k)[:, :, served], np.asarray(v)[:, :, served], mask)
    np.testing.assert_allclose(jax.jit(attention)(q, k, v, mask), expected, **ONE_OP)


def test_a_row_with_nothing_to_attend_to_is_zero_in_value_and_gradient():
    scores = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    mask = jnp.array([[False, False], [True, False]])
    np.testing.assert_array_equal(masked_softmax(scores, mask), [[0.0, 0.0], [1.0, 0.0]])
    gradient = jax.grad(lambda s: (masked_softmax(s, mask) * jnp.array([[5.0, 7.0], [1.0, 2.0]])).sum())(scores)
    np.testing.assert_array_equal(gradient, np.zeros((2, 2)))


def test_softmax_survives_scores_beyond_the_range_of_exp():
    scores = jnp.array([[1e4, 1e4, -1e4, 3e4]])
    np.testing.assert_allclose(
        masked_softmax(scores, jnp.array([[True, True, True, False]])), [[0.5, 0.5, 0.0, 0.0]], rtol=1e-6
    )


def test_nothing_depends_on_what_a_query_gets_that_may_attend_to_nothing(monkeypatch):
    """A fused kernel may leave there what it likes, as long as it is finite: loss and gradient stay, to the bit.

    One program, so that both are rounded alike: what such a query gets is an argument, a zero being what it gets here.
    """
    graphdef, params = nnx.split(tiny.transformer(num_encoder_layers=1, num_decoder_layers=1))
    batch = tiny.batch([9, 4], [8, 5])
    reference, rows = attention_module.reference_attention, []

    @jax.jit
    def gradient(params: Any, rubbish: Any) -> Any:
        def with_rubbish(query, key, value, mask, **options):
            attended = reference(query, key, value, mask, **options)
            nothing = ~jnp.any(mask.materialize(query.shape[1], key.shape[1]), axis=-1)[:, 0, :, None, None]
            jax.debug.callback(lambda places: rows.append(int(places.sum())), nothing)
            return jnp.where(nothing, rubbish, attended)

        def loss(params):
            return batch_loss(nnx.merge(graphdef, params), batch, Objective(0.1), jax.random.key(0)).loss

        with monkeypatch.context() as patch:
            patch.setattr(attention_module, "reference_attention", with_rubbish)
            return jax.value_and_grad(loss)(params)

    chex.assert_trees_all_equal(gradient(params, 7.0), gradient(params, 0.0))
    jax.effects_barrier()
    assert sum(rows) > 0  # there were such queries


# --- the layer


def projected(module, value):
    return np.einsum("btd,dnh->btnh", float64(value), float64(module.kernel[...])) + float64(module.bias[...])


@pytest.mark.parametrize("key_heads, head_dim", [(None, None), (2, 3)])
def test_multi_head_attention_equals_its_equation(key_heads, head_dim):
    """With fewer key-value heads and heads of another size, too."""
    layer = randomised(
        MultiHeadAttention(
            8, 4, num_key_value_heads=key_heads, head_dim=head_dim, dropout_rate=0.0, **DTYPES, rngs=nnx.Rngs(0)
        )
    )
    x, encoded = normal(1, 2, 3, 8), normal(2, 2, 5, 8)
    mask = AttentionMask(key_segments=jnp.array([[1, 1, 2, 2, 0]] * 2), query_segments=jnp.array([[1, 2, 2]] * 2))
    assert layer.query.kernel[...].shape == (8, 4, head_dim or 2)
    assert layer.key.kernel[...].shape == layer.value.kernel[...].shape == (8, key_heads or 4, head_dim or 2)
    served = np.arange(4) // (4 // (key_heads or 4))
    keys, values = (projected(part, encoded)[:, :, served] for part in (layer.key, layer.value))
    attended, _ = attention64(projected(layer.query, x), keys, values, mask.materialize(3, 5))
    expected = np.einsum("btnh,nhd->btd", attended, float64(layer.output.kernel[...])) + float64(layer.output.bias[...])
    np.testing.assert_allclose(jax.jit(layer)(x, encoded, mask), expected, rtol=1e-4, atol=1e-4)


def test_key_value_heads_must_divide_the_heads():
    with pytest.raises(ValueError, match=r"num_key_value_heads \(3\) must divide num_heads \(4\): one of \[1, 2, 4\]"):
        MultiHeadAttention(8, 4, num_key_value_heads=3, dropout_rate=0.0, **DTYPES, rngs=nnx.Rngs(0))


# --- caches


@pytest.mark.parametrize("key_heads", [2, 1])
@pytest.mark.parametrize("platform, length", [("cpu", 20), (None, 6), pytest.param("cpu", 40, marks=pytest.mark.slow)])
def test_cached_attention_equals_attention_over_what_the_ancestors_wrote(platform, length, key_heads):
    """In two blocks and in three, and whole."""
    batch, beams, heads, dim = 2, 3, 2, 4
    rng = np.random.default_rng(1)
    q = rng.normal(size=(length, batch, beams, heads, dim)).astype(np.float32)
    k, v = rng.normal(size=(2, length, batch, beams, key_heads, dim)).astype(np.float32)
    parents = np.random.default_rng(4).integers(0, beams, (length, batch, beams))
    rows = np.arange(batch)[:, None]
    with tracing_for(platform):
        cache = empty_self_attention_cache(batch, beams, key_heads, length, dim, FLOAT32)
    assert len(cache.keys) == (1 if platform is None else 2 if length == 20 else 3)
    ancestors = np.zeros((batch, beams, length), np.int32)

    @jax.jit
    def step(cache, q, k, v, positions, ancestors):
        ancestors = write_ancestors(ancestors, positions)
        return *cached_self_attention(cache, q, k, v, positions, ancestors), ancestors

    history = np.zeros((2, batch, beams, 0, heads, dim))  # keys and values, copied when beams are reordered
    for t in range(length):
        positions = np.full((batch,), t, np.int32)
        out, cache, ancestors = step(cache, q[t], k[t], v[t], positions, ancestors)
        new = np.repeat(np.stack([float64(k[t]), float64(v[t])]), heads // key_heads, axis=3)
        history = np.concatenate([history, new[:, :, :, None]], axis=3)
        flat = history.reshape(2, batch * beams, t + 1, heads, dim)
        expected, _ = attention64(q[t].reshape(-1, 1, heads, dim), flat[0], flat[1], np.ones((1, 1, 1, 1), bool))
        np.testing.assert_allclose(out, expected.reshape(out.shape), rtol=1e-4, atol=1e-5)
        history = history[:, rows, parents[t]]
        ancestors = np.asarray(ancestors)[rows, parents[t]]


def empty_cache_of_a_cpu(sentences: int, beams: int, heads: int, length: int, dim: int) -> Any:
    with tracing_for("cpu"):
        return empty_self_attention_cache(sentences, beams, heads, length, dim, FLOAT32)


def test_beams_that_are_never_reordered_attend_to_what_they_wrote():
    shape = (2, 5, 3, 4)
    cache = jax.tree.map(lambda x: normal(1, *x.shape), empty_cache_of_a_cpu(2, 5, 3, 20, 4))
    query, key, value = (normal(s, *shape) for s in (2, 3, 4))
    own = jnp.broadcast_to(jnp.arange(5)[None, :, None], (2, 5, 20))
    step = jax.jit(cached_self_attention)
    for positions in (jnp.array([3, 7]), jnp.array([3, 18])):
        expected, _ = step(cache, query, key, value, positions, own)
        out, _ = step(cache, query, key, value, positions, None)
        np.testing.assert_allclose(out, expected, **ONE_OP)


def test_a_cache_is_read_as_far_as_a_sentence_has_come_whatever_the_others_need():
    heads, dim, length = 2, 4, 40
    cache = jax.tree.map(lambda x: normal(1, *x.shape), empty_cache_of_a_cpu(2, 3, heads, length, dim))
    query, key, value = (normal(s, 2, 3, heads, dim) for s in (2, 3, 4))
    ancestors = jnp.asarray(np.random.default_rng(5).integers(0, 3, (2, 3, length)))
    step = jax.jit(cached_self_attention)
    outs, caches = zip(
        *(jax.device_get(step(cache, query, key, value, jnp.array([9, n]), ancestors)) for n in (2, 20, 39)),
        strict=True,
    )
    for out, new in zip(outs[1:], caches[1:], strict=True):
        np.testing.assert_array_equal(out[0], outs[0][0])
        chex.assert_trees_all_equal(*(jax.tree.map(lambda x: x[0], c) for c in (new, caches[0])))
        assert np.abs(out[1] - outs[0][1]).max() > 1e-3


def test_sentences_of_a_cache_may_stand_at_different_positions():
    key, value, query = (np.asarray(normal(s, 3, 1, 2, 4)) for s in (1, 2, 3))
    cache = empty_cache_of_a_cpu(3, 1, 2, 20, 4)
    positions = jnp.array([0, 17, 20])  # the last is beyond the end, as in a slot that stands idle
    step = jax.jit(cached_self_attention)
    _, cache = jax.device_get(step(cache, query, key, value, positions, jnp.zeros((3, 1, 20), jnp.int32)))
    keys, values = np.concatenate(cache.keys, axis=4), np.concatenate(cache.values, axis=3)
    for row, place in ((0, 0), (1, 17)):
        np.testing.assert_array_equal(keys[row, :, :, 0, place], key[row, 0])
        np.testing.assert_array_equal(values[row, :, 0, place], value[row, 0])
    assert int((keys != 0).sum()) == int((values != 0).sum()) == key[:2].size


def test_a_layer_attends_to_its_history_as_to_all_tokens_at_once():
    """Its cache has its own number of key-value heads and their size."""
    layer = MultiHeadAttention(8, 4, num_key_value_heads=2, head_dim=3, dropout_rate=0.0, **DTYPES, rngs=nnx.Rngs(0))
    x, cache = normal(1, 2, 5, 8), layer.empty_cache(2, 1, 5)
    assert cache.keys[0].shape == (2, 2, 3, 1, 5)
    expected, _ = jax.jit(lambda layer, x: over_tokens(AttentionMask(causal=True))(layer, x, None))(layer, x)
    step = jax.jit(lambda layer, x, cache, positions: over_history(cache, positions, None)(layer, x, None))
    for t in range(5):
        out, cache = step(layer, x[:, t : t + 1], cache, jnp.full((2,), t))
        np.testing.assert_allclose(out[:, 0], expected[:, t], **ONE_OP)


@pytest.mark.parametrize("key_heads", [2, 1])
def test_cross_attention_shares_one_source_among_beams(key_heads):
    query, keys, values = normal(1, 2, 3, 2, 4), normal(2, 2, 5, key_heads, 4), normal(3, 2, 5, key_heads, 4)
    mask = AttentionMask(key_segments=jnp.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]))
    attend = jax.jit(lambda keys, values: cached_cross_attention(cross_attention_cache(keys, values), query, mask))
    attended, weights = jax.device_get(attend(keys, values))
    query, array = np.asarray(query), np.asarray(mask.materialize(1, 5))
    keys, values = (np.repeat(x, 2 // key_heads, axis=2) for x in (keys, values))
    for beam in range(3):
        alone, _ = attention64(query[:, beam : beam + 1], keys, values, array)
        np.testing.assert_allclose(attended[:, beam], alone[:, 0], **ONE_OP)
    assert not weights[0, :, :, 3:].any()


@pytest.mark.parametrize("part", ["causal", "window", "query_segments"])
def test_beams_are_no_queries_that_a_mask_could_tell_apart(part):
    cache, query = cross_attention_cache(normal(2, 2, 5, 2, 4), normal(3, 2, 5, 2, 4)), normal(1, 2, 3, 2, 4)
    parts: dict[str, Any] = {"causal": True, "window": 2, "query_segments": jnp.ones((2, 1), jnp.int32)}
    mask = dataclasses.replace(AttentionMask(jnp.ones((2, 5), jnp.int32)), **{part: parts[part]})
    with pytest.raises(ValueError, match="must be of padding alone"):
        cached_cross_attention(cache, query, mask)


def test_cached_attention_takes_a_scale_a_soft_cap_and_a_window():
    """Step by step, one beam, in two blocks: as all positions at once."""
    q, k, v = (normal(s, 2, 20, 2, 4) for s in (1, 2, 3))
    options = {"scale": 0.9, "soft_cap": 1.5}
    attend = jax.jit(functools.partial(attention, **options))
    expected = np.asarray(attend(q, k, v, AttentionMask(causal=True, window=3)))
    cache = empty_cache_of_a_cpu(2, 1, 2, 20, 4)
    step = jax.jit(functools.partial(cached_self_attention, window=3, **options))
    for t in range(20):
        now = slice(t, t + 1)
        new = (jnp.asarray(np.asarray(x)[:, now]) for x in (q, k, v))
        out, cache = step(cache, *new, jnp.asarray(np.full(2, t)), None)
        np.testing.assert_allclose(out, expected[:, now], **ONE_OP)
    source = AttentionMask(key_segments=jnp.array([[1] * 20, [1] * 5 + [0] * 15]))
    expected = attend(q[:, :3], k, v, source)
    found, _ = jax.jit(lambda k, v: cached_cross_attention(cross_attention_cache(k, v), q[:, :3], source, **options))(
        k, v
    )
    np.testing.assert_allclose(found, expected, **ONE_OP)
