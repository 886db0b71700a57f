"""What bfloat16 is asked of each backend, as the programs say it."""

import dataclasses
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_transformer import backend
from flax_transformer.inference.prepare import prepared_model
from flax_transformer.inference.translator import Translator
from flax_transformer.models.build import build_model
from flax_transformer.models.recurrent_config import RecurrentConfig
from flax_transformer.training.step import Objective, batch_loss
from tests import tiny
from tests.small_models import ALIKE, DECODING, MODELS, TOKENIZERS, params_of

BFLOAT16 = jnp.dtype("bfloat16")
LENGTH = 20
RECURRENT = RecurrentConfig(model_dim=16, hidden_dim=16, attention="dot", compute_dtype="bfloat16")


def recurrent() -> Any:
    return tiny.randomised(nnx.eval_shape(lambda: build_model(RECURRENT, tiny.VOCABULARY, rngs=nnx.Rngs(0))), 0)


def products(program: str) -> list[tuple[str, str, str]]:
    """Returns the types of both sides and of the result of every product in a lowered program."""
    one = r"stablehlo\.dot_general .*: \(tensor<(?:\d+x)*(\w+)>, tensor<(?:\d+x)*(\w+)>\) -> tensor<(?:\d+x)*(\w+)>"
    return re.findall(one, program)


@pytest.mark.parametrize("make", [lambda: tiny.transformer(compute_dtype="bfloat16"), recurrent])
def test_a_cpu_is_asked_for_float32_products_and_an_accelerator_for_narrow_ones(make):
    """Of both sides in bfloat16: XLA for CPU has no product of them with a result in bfloat16, but one with float32."""
    graphdef, params = nnx.split(make())
    batch = tiny.batch([9, 4], [8, 5])

    def loss(params):
        return batch_loss(nnx.merge(graphdef, params), batch, Objective(0.1), jax.random.key(0)).loss

    def narrow(platform: backend.Platform) -> list[str]:
        with backend.tracing_for(platform):
            found = products(jax.jit(jax.grad(loss)).lower(params).as_text())
        results = [result for left, right, result in found if left == right == "bf16"]
        assert len(results) > 20
        return [result for result in results if result == "bf16"]

    assert len(narrow("gpu")) > 10
    assert not narrow("cpu")


def start(model: Any) -> tuple[Any, Any]:
    """Returns the state of two sentences and three beams before the first token, and tokens for a step."""
    batch = tiny.batch([9, 4], [8, 5])
    memory = model.encode(batch.source_tokens, batch.source_positions, batch.source_segments)
    return model.init_decode_state(memory, 3, LENGTH), jnp.array([[3, 4, 5], [6, 7, 8]], jnp.int32)


@pytest.mark.parametrize("changes", [{}, {"zero_start": True, "share_embeddings": "all", "output_bias": True}])
def test_kernels_in_bfloat16_change_no_bit_of_a_step(changes):
    """They are rounded once for all steps, where each step rounds them otherwise."""
    model = tiny.transformer(compute_dtype="bfloat16", **changes)
    with backend.tracing_for("cpu"):
        made = jax.jit(prepared_model)(model)
    kernels = [p[...] for path, p in nnx.to_flat_state(nnx.state(made)) if path[-1] == "kernel"]
    kernels.append(made.output_projection().kernel)
    assert len(kernels) == 2 * 6 + 3 * 10 + 1
    assert {kernel.dtype for kernel in kernels} == {BFLOAT16}
    assert model.encoder.layers.feed_forward.up.kernel[...].dtype == jnp.float32  # left as it was

    def steps(params, graphdef):
        model: Any = nnx.merge(graphdef, params)
        state, tokens = start(model)
        first, state = model.decode_step(tokens, state)
        second, _ = model.decode_step(tokens + 1, state)
        return first.logits, second.logits

    with backend.tracing_for("cpu"):
        expected, found = (
            jax.jit(steps, static_argnums=1)(params, graphdef)
            for graphdef, params in (nnx.split(model), nnx.split(made))
        )
    chex.assert_trees_all_equal(found, expected)


def test_a_cpu_keeps_caches_in_float32():
    """A token that is written into bfloat16 would turn the whole cache into float32 and back."""
    model = jax.jit(prepared_model)(tiny.transformer(compute_dtype="bfloat16"))

    def types(state: Any) -> set[Any]:
        return {leaf.dtype for leaf in jax.tree.leaves((state.per_sentence[0], state.append_only))}

    with backend.tracing_for("cpu"):
        state, tokens = jax.jit(start)(model)
        program = jax.jit(lambda state: model.decode_step(tokens, state)).lower(state).compile().as_text() or ""
    assert types(state) == {np.dtype("float32")}
    shapes = {",".join(map(str, leaf.shape)) for leaf in jax.tree.leaves(state.append_only)}
    assert all(f"f32[{shape}]" in program and f"bf16[{shape}]" not in program for shape in shapes)
    with backend.tracing_for("gpu"):
        assert types(jax.eval_shape(start, model)[0]) == {BFLOAT16}


def test_a_step_is_the_same_within_rounding_whatever_the_caches_are():
    """What stands in a cache of float32 was rounded to bfloat16 before, so sums and weights alone are rounded less."""
    graphdef, params = nnx.split(tiny.transformer(compute_dtype="bfloat16"))

    @jax.jit
    def steps(params):
        model: Any = nnx.merge(graphdef, params)
        state, tokens = start(model)
        _, state = model.decode_step(tokens, state)
        return model.decode_step(tokens + 1, state)[0].logits

    def logits(platform: backend.Platform) -> np.ndarray:
        with backend.tracing_for(platform):
            return np.asarray(steps(params))

    wide, narrow = logits("cpu"), logits("gpu")
    # A few dozen roundings of 0.4 % each, on logits of size 1.
    assert 0 < np.abs(wide - narrow).max() < 0.1


@pytest.mark.slow
def test_a_translation_in_bfloat16_does_not_depend_on_its_batch(one_device):
    model = dataclasses.replace(MODELS["transformer"], compute_dtype="bfloat16")
    translator = Translator.from_params(model, TOKENIZERS, params_of(model, 4), DECODING, one_device)
    text = ALIKE[:6]
    for source, expected in zip(text, translator.translate(text), strict=True):  # alone, and beside all others
        (one,) = translator.translate([source])
        assert [(h.tokens, h.score) for h in one.hypotheses] == [(h.tokens, h.score) for h in expected.hypotheses]
