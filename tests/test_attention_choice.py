"""The choice of a form of attention: what each fused form takes, and that it computes what the reference does.

Fused forms run as plain operations here: kernels by JAX's interpreter, and cuDNN's attention by JAX's form for XLA.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer.ops import attention as attention_module
from flax_transformer.ops.attention import attention, reference_attention
from flax_transformer.ops.attention_mask import AttentionMask
from tests.platforms import tracing_for


@pytest.fixture
def called(monkeypatch) -> list[str]:
    """The fused forms that were called; each runs as if this machine were of their platform."""
    names: list[str] = []

    def of_platform(*arguments, default, **forms):
        (form,) = forms.values()
        return form(*arguments)

    def cudnn(*arrays, implementation, **options):
        assert implementation == "cudnn"
        names.append("cudnn")

        def as_on_a_gpu(*arrays):
            made, backward = jax.vjp(functools.partial(real, implementation="cudnn", **options), *arrays)
            return backward(made)

        jax.eval_shape(as_on_a_gpu, *arrays)  # JAX refuses here what cuDNN does not take
        with jax.numpy_dtype_promotion("standard"):  # JAX's own form for XLA needs it
            return real(*arrays, implementation="xla", **options)

    real = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.lax, "platform_dependent", of_platform)
    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    monkeypatch.setattr(attention_module, "cudnn_is_there", lambda: True)
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    return names


def masks(length: int) -> dict[str, AttentionMask]:
    """A mask of each kind, of two rows; padding stands at the end, and in between."""
    places = np.arange(length)
    padded = np.stack([places < length - 20, places % 7 != 3]).astype(np.int32)
    packed = np.stack([1 + places // 50, np.where(places < length - 40, 1 + places // 99, 0)])
    segments, packed = jnp.asarray(padded), jnp.asarray(packed, jnp.int32)
    return {
        "full": AttentionMask(),
        "padding": AttentionMask(segments),
        "causal": AttentionMask(causal=True),
        "causal and padding": AttentionMask(segments, causal=True),
        "packed": AttentionMask(packed, packed),
        "packed and causal": AttentionMask(packed, packed, causal=True),
        "window": AttentionMask(window=5),
        "causal window": AttentionMask(segments, causal=True, window=5),
        "offsets": AttentionMask(causal=True, query_offsets=jnp.array([3, 0])),
    }


def draw(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.bfloat16)


@pytest.mark.parametrize("kind", masks(8))
def test_cudnn_takes_every_mask(kind, called):
    query, key, value = (draw(s, 2, 136, 2, 16) for s in (1, 2, 3))
    mask = masks(136)[kind]
    with tracing_for("gpu"):
        found = jax.jit(lambda *arrays: attention(*arrays, mask))(query, key, value)
    assert called == ["cudnn"]
    with tracing_for("gpu"):  # all arrays have one type
        jax.eval_shape(lambda *arrays: attention(*arrays, mask), query, key, value.astype(jnp.float32))
    assert called == ["cudnn"]
    expected = jax.jit(reference_attention)(query, key, value, mask)
    read = jnp.any(mask.materialize(136, 136), axis=-1)[:, 0, :, None, None]
    np.testing.assert_allclose(*(np.where(read, np.float32(x), 0.0) for x in (found, expected)), rtol=0.02, atol=0.02)
