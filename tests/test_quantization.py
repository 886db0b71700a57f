"""Weights as 8-bit integers: rounding and products against float64, and a model that is made of them."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer import backend
from flax_transformer.decoding.candidates import best_candidates
from flax_transformer.decoding.logits_processors import Progress
from flax_transformer.errors import ConfigError
from flax_transformer.inference.scorer import Scorer
from flax_transformer.inference.translator import Translator
from flax_transformer.interop.marian import write_marian
from flax_transformer.ops.int8_product import Int8Weights, int8_product, int8_rows, quantize
from flax_transformer.ops.vocabulary import OutputProjection, fold_bias_into_kernel, without_row
from tests.small_models import ALIKE, DECODING, MODELS, SOURCES, TARGETS, TOKENIZERS, params_of

RNG = np.random.default_rng(0)


def dequantized(weights: Int8Weights, in_axes: tuple[int, ...]) -> np.ndarray:
    return np.asarray(weights.values, np.float64) * np.expand_dims(np.asarray(weights.scales, np.float64), in_axes)


@pytest.mark.parametrize("shape, in_axes", [((6, 4), (0,)), ((3, 5, 2, 4), (1,)), ((2, 4, 5), (0, 1)), ((7, 3), (1,))])
def test_weights_are_off_by_half_a_step_at_most(shape, in_axes):
    weights = RNG.normal(size=shape).astype(np.float32)
    found = quantize(jnp.asarray(weights), in_axes)
    assert found.values.dtype == jnp.int8
    steps = np.abs(weights).max(axis=in_axes, keepdims=True) / 127
    assert found.scales.shape == np.squeeze(steps, in_axes).shape
    assert (np.abs(dequantized(found, in_axes) - weights) <= 0.5001 * steps).all()
    assert np.abs(np.asarray(found.values)).max(axis=in_axes).min() == 127  # every channel uses its whole range


@pytest.mark.parametrize("weights_left", [False, True])
@pytest.mark.parametrize("shape, in_axes", [((6, 4), (0,)), ((2, 3, 5), (0, 1)), ((6, 2, 4), (0,)), ((7, 6), (1,))])
def test_products_are_those_of_rounded_inputs_and_weights(shape, in_axes, weights_left):
    weights = quantize(jnp.asarray(RNG.normal(size=shape).astype(np.float32)), in_axes)
    x = RNG.normal(size=(3, 2, *(shape[axis] for axis in in_axes))).astype(np.float32) * 10
    found = int8_product(jnp.asarray(x), weights, in_axes, weights_left)
    x_axes = tuple(range(2, x.ndim))
    steps = np.abs(x).max(axis=x_axes, keepdims=True).astype(np.float64) / 127
    expected = np.tensordot(np.round(x / steps) * steps, dequantized(weights, in_axes), (x_axes, in_axes))
    if weights_left:  # the axes of the weights stand first
        found = jnp.moveaxis(found, range(found.ndim - 2), range(2, found.ndim))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_zeros_stay_zeros_and_rows_are_int8_rows():
    table = RNG.normal(size=(5, 8)).astype(np.float32)
    table[2] = 0.0
    weights = quantize(jnp.asarray(table), (1,))
    np.testing.assert_array_equal(int8_product(jnp.zeros((3, 8)), weights, (1,)), np.zeros((3, 5)))
    rows = int8_rows(weights, jnp.array([[4, 2], [0, 4]]))
    np.testing.assert_allclose(rows, dequantized(weights, (1,))[[[4, 2], [0, 4]]], rtol=1e-6)
    assert not np.asarray(rows)[0, 1].any()
    assert np.asarray(weights.scales).min() >= np.finfo(np.float32).tiny  # which no processor takes for zero
    emptied = without_row(weights, 4)
    assert isinstance(emptied, Int8Weights)
    assert not np.asarray(int8_rows(emptied, jnp.array([4]))).any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["transformer", "recurrent"])
def test_a_quantised_model_scores_nearly_alike_and_promises_the_same(kind, one_device):
    """Its weights are integers, scores stay near, and results do not depend on the batch."""
    changes: Any = {}
    if kind == "transformer":
        changes = {"zero_start": True, "num_encoder_layers": 2, "num_decoder_layers": 2}
    model: Any = dataclasses.replace(MODELS[kind], **changes)
    whole = Translator.from_params(model, TOKENIZERS, params_of(model, 4), DECODING, one_device)
    made = whole.quantized()
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(t.params)) for t in (made, whole)]
    assert sizes[0] < (0.5 if kind == "transformer" else 0.8) * sizes[1]  # the gates of recurrent cells stay float32
    text = ALIKE[:6]
    found = made.translate(text)
    targets = [TARGETS[SOURCES.index(source)] for source in text]
    first, second = (Scorer(t).score(text, targets) for t in (made, whole))
    off = np.array([a.score - b.score for a, b in zip(first, second, strict=True)])
    assert 0 < np.abs(off).max() < 0.3  # 0.1 seen: 16 random dimensions are rough; scores here are about -4
    for source, expected in zip(text, found, strict=True):  # alone, and beside all others
        (one,) = made.translate([source])
        assert [(h.tokens, h.score) for h in one.hypotheses] == [(h.tokens, h.score) for h in expected.hypotheses]
    other = made.with_decoding(dataclasses.replace(DECODING, beam_size=2))
    assert other.parameters.prepared() is made.parameters.prepared()  # made once, whatever the settings


@pytest.mark.slow
def test_an_ensemble_of_one_model_twice_is_that_model(one_device):
    model, params = MODELS["transformer"], params_of(MODELS["transformer"], 4)
    twice = jax.tree.map(lambda a: jnp.stack([a, a]), params)
    one = Translator.from_params(model, TOKENIZERS, params, DECODING, one_device).quantized().translate(ALIKE[:4])
    two = Translator.from_params(model, TOKENIZERS, twice, DECODING, one_device, 2).quantized().translate(ALIKE[:4])
    for a, b in zip(one, two, strict=True):
        assert a.tokens == b.tokens
        assert a.score == pytest.approx(b.score, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"share_embeddings": "none"}, {"compute_dtype": "bfloat16"}, {"share_embeddings": "all", "norm_order": "pre"}],
)
def test_other_models_are_quantised_alike(changes, one_device):
    """Attention over the source stays near, too, and is as well spread; a translator is quantised once at most."""
    model: Any = dataclasses.replace(MODELS["transformer"], **changes)
    whole = Translator.from_params(model, TOKENIZERS, params_of(model, 4), DECODING, one_device)
    made = whole.quantized()
    assert made.quantized() is made and whole.quantized() is not whole
    text = ALIKE[:6]
    targets = [TARGETS[SOURCES.index(source)] for source in text]
    first, second = (Scorer(t).score(text, targets) for t in (made, whole))
    off = np.array([a.score - b.score for a, b in zip(first, second, strict=True)])
    assert 0 < np.abs(off).max() < 0.3
    for a, b in zip(*(t.translate(text, attention=True, max_length_offset=3) for t in (made, whole)), strict=True):
        ours, theirs = a.hypotheses[0].attention, b.hypotheses[0].attention
        np.testing.assert_allclose(ours.sum(axis=1), 1.0, rtol=1e-2)
        assert ours.shape[1] == theirs.shape[1]
        np.testing.assert_allclose(ours[0], theirs[0], atol=0.1)  # where both have read the same
    with pytest.raises(ConfigError, match="8-bit weights cannot be written as a MarianMT model"):
        write_marian(made, dataclasses.replace(model, norm_order="post"), Path("never"))


@pytest.mark.slow
def test_an_ensemble_of_two_models_has_the_scales_of_each(one_device):
    """Its scores lie near those of the same ensemble in float32, and far from those of either model."""
    model = MODELS["transformer"]
    params = [params_of(model, 4), params_of(model, 5)]
    params[1] = jax.tree.map(lambda a: 2 * a, params[1])  # scales that do not fit the first
    both = Translator.from_params(
        model, TOKENIZERS, jax.tree.map(lambda *a: jnp.stack(a), *params), DECODING, one_device, 2
    )
    singles = [Translator.from_params(model, TOKENIZERS, p, DECODING, one_device) for p in params]

    def best(translator: Translator) -> np.ndarray:
        found = translator.translate(ALIKE[:8], beam_size=1, max_length_offset=1, max_length_factor=0.0)
        return np.array([t.hypotheses[0].token_scores[0] for t in found])  # of the first token, as nothing was read yet

    whole, made = best(both), best(both.quantized())
    assert 0 < np.abs(whole - made).max() < 0.2
    assert min(np.abs(whole - best(single)).max() for single in singles) > 0.3


@pytest.mark.parametrize("kind", ["plain", "bias", "padding", "integers", "integers and bias"])
def test_no_step_of_a_search_turns_its_logits_round(kind):
    """A pass in another order takes as long as the product (docs/lab_book.md, "Scales of 8-bit logits")."""
    vocab, dim = 1200, 16
    kernel = jnp.asarray(RNG.normal(size=(vocab, dim)).astype(np.float32))
    weights = quantize(kernel, (1,)) if "integers" in kind else kernel
    bias = jnp.ones(vocab) if "bias" in kind else None
    plain = OutputProjection(weights, bias, vocab - 3 * (kind == "padding"))

    @jax.jit
    def candidates(hidden):
        progress = Progress(jnp.zeros((3, 4, 1), jnp.int32), jnp.zeros(3, jnp.int32), jnp.arange(3))
        return best_candidates(jnp.zeros((3, 4)), projection.logits(hidden), 8, progress, ())

    with backend.tracing_for("cpu"):
        projection = fold_bias_into_kernel(plain)
        program = candidates.lower(jnp.ones((3, 4, dim))).compile().as_text() or ""
    assert f"[{vocab},12]" in program or f"[{vocab},3,4]" in program
    assert f"[3,4,{vocab}]" not in program and f"[12,{vocab}]" not in program
