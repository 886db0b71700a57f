"""The choice of a form of attention: each fused form computes what the reference does, or the reference runs.

Fused forms run as plain operations here: kernels by JAX's interpreter, and cuDNN's attention by JAX's form for XLA.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer import backend
from flax_transformer.ops import attention as attention_module
from flax_transformer.ops import decode_attention as decode_module
from flax_transformer.ops import short_attention as short_module
from flax_transformer.ops.attention import attention, projected_attention
from flax_transformer.ops.attention_mask import AttentionMask
from flax_transformer.ops.cached_attention import SelfAttentionCache, cached_self_attention, write_ancestors
from flax_transformer.ops.int8_product import quantize
from tests.platforms import tracing_for

# What `attention` is asked for, and the forms that take it.
OF_LONG_ROWS = {
    "full": "cudnn splash",
    "padding": "cudnn splash",
    "causal": "cudnn splash",
    "causal, padding": "cudnn splash",
    "packed": "cudnn splash",
    "packed, causal": "cudnn splash",
    "causal, more keys": "cudnn splash",
    "window": "cudnn",
    "causal, window, padding": "cudnn",
    "offsets": "cudnn",
    "bias": "",
    "scale": "cudnn splash",
    "soft cap": "",
    "dropout": "",
    "dropout in evaluation": "cudnn splash",
    "fewer key-value heads": "cudnn splash",
    "a head of 96": "cudnn",
    "a head of 20": "",
    "a head of 192": "",
    "float32": "",
    "float32 values": "",
    "rows of 128": "",
    "rows of 264": "cudnn",
    "rows of 260": "",
    "off": "",
    "another platform": "",
}
# What `projected_attention` is asked for. It has no argument for a bias on scores, a scale or a soft cap.
OF_SHORT_ROWS = {
    "full": "short",
    "padding": "short",
    "causal": "short",
    "causal, padding": "short",
    "packed": "short",
    "packed, causal": "short",
    "causal, more keys": "short",
    "window": "",
    "offsets": "",
    "dropout": "short",
    "dropout in evaluation": "short",
    "fewer key-value heads": "",
    "a head of 32": "short",
    "a head of 24": "",
    "float32": "",
    "8-bit integers": "",
    "rows of 136": "",
    "off": "",
    "another platform": "",
}
# What `cached_self_attention` is asked for. It has no argument for a bias on scores.
OF_DECODING = {
    "reordered beams": "decode",
    "beams of their own": "decode",
    "scale": "decode",
    "soft cap": "",
    "window": "",
    "fewer key-value heads": "decode",
    "a head of 48": "",
    "blocks": "",
    "off": "",
    "another platform": "",
}
PLATFORMS: dict[str, backend.Platform] = {"cudnn": "gpu", "splash": "tpu", "short": "gpu", "decode": "gpu"}
LONG, SHORT = 256, 16

# A function, its arguments, and where its result is read.
Example = tuple[Callable[..., jax.Array], tuple[Any, ...], Any]


def draw(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.bfloat16)


def mask_of(feature: str, query_length: int, key_length: int) -> AttentionMask:
    """For two rows. Padding stands at the end of one, and in between in the other."""
    places = np.arange(key_length)
    padding = np.stack([places < 0.8 * key_length, places % 7 != 3])
    packed = np.stack([1 + places * 5 // key_length, np.where(padding[0], 1 + places * 3 // key_length, 0)])
    segments, packed = jnp.asarray(padding * (1 + places % 3), jnp.int32), jnp.asarray(packed, jnp.int32)
    return AttentionMask(
        packed if "packed" in feature else segments if "padding" in feature else None,
        packed[:, :query_length] if "packed" in feature else None,
        jnp.array([3, 0]) if "offsets" in feature else None,
        causal="causal" in feature or "offsets" in feature,
        window=5 if "window" in feature else None,
    )


def of_long_rows(feature: str) -> Example:
    length = int(feature.split()[-1]) if "rows of" in feature else LONG
    key_length = length + 128 if "more keys" in feature else length
    head_dim = int(feature.split()[-1]) if "head of" in feature else 64
    key_heads = 1 if "fewer" in feature else 2
    query, key, value = (
        draw(1, 2, length, 2, head_dim), draw(2, 2, key_length, key_heads, head_dim),
        draw(3, 2, key_length, key_heads, head_dim),
    )  # fmt: skip
    if feature == "float32":
        query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    value = value.astype(jnp.float32) if "float32" in feature else value
    options: dict[str, Any] = {
        "bias": {"bias": draw(4, 1, 2, length, key_length)},
        "scale": {"scale": 0.3},
        "soft cap": {"soft_cap": 5.0},
        "dropout": {"dropout_rate": 0.1, "dropout_key": jax.random.key(0)},
        "dropout in evaluation": {"dropout_rate": 0.1},
    }.get(feature, {})
    mask = mask_of(feature, length, key_length)
    read = jnp.any(mask.materialize(length, key_length), axis=-1)[:, 0, :, None, None]
    return (
        lambda query, key, value, mask: attention(query, key, value, mask, **options),
        (query, key, value, mask.shared(length, key_length)),
        read,
    )


def of_short_rows(feature: str) -> Example:
    length = int(feature.split()[-1]) if "rows of" in feature else SHORT
    head_dim = int(feature.split()[-1]) if "head of" in feature else 16
    x = draw(1, 2, length, 32)
    encoded = draw(2, 2, length + 8, 32) if "more keys" in feature else x
    heads = (2, 1, 1) if "fewer" in feature else (2, 2, 2)
    kernels: Any = [draw(s, 32, n, head_dim).astype(jnp.float32) / 6 for s, n in zip((3, 4, 5), heads, strict=True)]
    biases = [draw(s, n, head_dim).astype(jnp.float32) for s, n in zip((6, 7, 8), heads, strict=True)]
    if feature == "8-bit integers":
        kernels = [quantize(kernel, (0,)) for kernel in kernels]
    options: dict[str, Any] = {"dropout_rate": 0.5 if "dropout" in feature else 0.0}
    if feature == "dropout":
        options["dropout_key"] = jax.random.key(0)
    dtype = jnp.dtype("float32" if feature == "float32" else "bfloat16")
    mask = mask_of(feature, length, encoded.shape[1])

    def run(x, encoded, projections, mask):
        encoded = encoded if "more keys" in feature else x  # self-attention asks for the same array
        return projected_attention(x, encoded, projections, mask, dtype, **options)

    return run, (x, encoded, tuple(zip(kernels, biases, strict=True)), mask), True


def of_decoding(feature: str) -> Example:
    key_heads, head_dim = 1 if "fewer" in feature else 2, 48 if feature == "a head of 48" else 16
    query, key, value = (
        draw(1, 3, 2, 2, head_dim),
        draw(2, 3, 2, key_heads, head_dim),
        draw(3, 3, 2, key_heads, head_dim),
    )
    keys, values = draw(4, 3, key_heads, head_dim, 2, 8), draw(5, 3, key_heads, 2, 8, head_dim)
    cache = SelfAttentionCache((keys,), (values,))
    if feature == "blocks":
        cache = SelfAttentionCache((keys[..., :4], keys[..., 4:]), (values[:, :, :, :4], values[:, :, :, 4:]))
    positions = jnp.array([0, 3, 7])
    ancestors = write_ancestors(jnp.asarray(np.random.default_rng(6).integers(0, 2, (3, 2, 8))), positions)
    options: dict[str, Any] = {
        "scale": {"scale": 0.9},
        "soft cap": {"soft_cap": 5.0},
        "window": {"window": 2},
    }.get(feature, {})
    return (
        lambda *arguments: cached_self_attention(*arguments, **options)[0],
        (cache, query, key, value, positions, None if feature == "beams of their own" else ancestors),
        True,
    )


def all_cases() -> list[Any]:
    """All forms with all that they can be asked for, and whether they take it."""
    tables = {"cudnn": OF_LONG_ROWS, "splash": OF_LONG_ROWS, "short": OF_SHORT_ROWS, "decode": OF_DECODING}
    return [(form, feature, form in takers) for form, table in tables.items() for feature, takers in table.items()]


EXAMPLES = {"cudnn": of_long_rows, "splash": of_long_rows, "short": of_short_rows, "decode": of_decoding}


@pytest.fixture
def present(monkeypatch):
    """Makes JAX find cuDNN, and makes rows long early."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(attention_module, "cudnn_is_there", lambda: True)
    monkeypatch.setattr(attention_module, "SHORTEST_FOR_SPLASH", LONG)


@pytest.fixture
def called(monkeypatch, present) -> list[str]:
    """The fused forms that were called, each run as if this machine were of its platform."""
    names: list[str] = []
    by_jax, splash = jax.nn.dot_product_attention, attention_module.splash_attention
    short, decode = short_module.short_attention, decode_module.decode_attention

    def of_its_platform(*arguments, default, **forms):
        (form,) = forms.values()
        return form(*arguments)

    def run_cudnn(*arrays, implementation, **options):
        names.append("cudnn")
        assert implementation == "cudnn"

        def both_ways(*arrays):
            made, backward = jax.vjp(functools.partial(by_jax, implementation="cudnn", **options), *arrays)
            return backward(made)

        jax.eval_shape(both_ways, *arrays)  # JAX refuses what cuDNN does not take
        with jax.numpy_dtype_promotion("standard"):
            return by_jax(*arrays, implementation="xla", **options)

    def run_splash(*arrays, causal):
        names.append("splash")
        return splash(*arrays, causal=causal, interpret=True)

    def run_short(settings, *arrays):
        names.append("short")
        return short(dataclasses.replace(settings, interpret=True), *arrays)

    def run_decode(*arrays):
        names.append("decode")
        return decode(*arrays, interpret=True)

    monkeypatch.setattr(jax.lax, "platform_dependent", of_its_platform)
    monkeypatch.setattr(jax.nn, "dot_product_attention", run_cudnn)
    monkeypatch.setattr(attention_module, "splash_attention", run_splash)
    monkeypatch.setattr(short_module, "short_attention", run_short)
    monkeypatch.setattr(decode_module, "decode_attention", run_decode)
    return names


@functools.cache
def by_the_reference(make: Callable[[str], Example], feature: str) -> np.ndarray:
    run, arguments, read = make(feature)
    return np.where(read, np.float32(jax.jit(run)(*arguments)), 0.0)


@pytest.mark.parametrize("form, feature, takes", all_cases())
def test_a_form_computes_what_the_reference_does_or_is_not_called(form, feature, takes, called, monkeypatch):
    run, arguments, read = EXAMPLES[form](feature)
    monkeypatch.setenv("FLAX_TRANSFORMER_KERNELS", "off" if feature == "off" else "on")
    platform = PLATFORMS[form]
    if feature == "another platform":
        platform = "gpu" if platform == "tpu" else "tpu"
    with tracing_for(platform):
        found = jax.jit(run)(*arguments) if takes else jax.eval_shape(run, *arguments)
    assert called.count(form) == takes
    if takes:
        found = np.where(read, np.float32(found), 0.0)
        np.testing.assert_allclose(found, by_the_reference(EXAMPLES[form], feature), rtol=0.02, atol=0.03)
        assert called == [form]


NAMES = {
    "cudnn": "dot_product_attention_fwd",
    "splash": "splash_mha",
    "short": "short_attention",
    "decode": "decode_attention",
}


@pytest.mark.parametrize("form", NAMES)
def test_a_program_with_a_fused_form_runs_elsewhere_by_the_reference(form, present):
    feature = "reordered beams" if form == "decode" else "causal, padding"
    run, arguments, read = EXAMPLES[form](feature)
    with tracing_for(PLATFORMS[form]):
        assert NAMES[form] in str(jax.make_jaxpr(run)(*arguments))
        found = jax.jit(run)(*arguments)
    found = np.where(read, np.float32(found), 0.0)
    np.testing.assert_array_equal(found, by_the_reference(EXAMPLES[form], feature))
