"""Each layer against an independent NumPy form of its equation, in float64, and its edge cases."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_transformer.config.reading import read_config
from flax_transformer.errors import ConfigError
from flax_transformer.nn.embedding import Embedding, InputEmbedding
from flax_transformer.nn.feed_forward import FeedForward
from flax_transformer.nn.linear import Linear
from flax_transformer.nn.normalization import LayerNorm, ResidualNorm
from flax_transformer.nn.positions import LearnedPositions, SinusoidalPositions, sinusoidal_table
from flax_transformer.ops.dropout import dropout, kept, random_bytes, relu_dropout
from flax_transformer.ops.vocabulary import OutputProjection, fold_bias_into_kernel
from tests.platforms import PLATFORMS, tracing_for

FLOAT32, BFLOAT16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
DTYPES = {"param_dtype": FLOAT32, "compute_dtype": FLOAT32}
ONE_OP = {"rtol": 1e-5, "atol": 1e-5}


def float64(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def randomised(module: nnx.Module, seed: int = 7) -> Any:
    """The module with every parameter random, so that no zero bias and no unit scale hides a mistake."""
    graphdef, state = nnx.split(module)
    rng = np.random.default_rng(seed)
    random = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), state)
    return nnx.merge(graphdef, random)


def test_linear_contracts_several_dimensions():
    layer = randomised(Linear((3, 4), (2, 5), ("heads", "head_dim", "mlp", "embed"), **DTYPES, rngs=nnx.Rngs(0)))
    x = normal(1, 6, 3, 4)
    expected = np.einsum("bij,ijkl->bkl", float64(x), float64(layer.kernel[...])) + float64(layer.bias[...])
    np.testing.assert_allclose(layer(x), expected, **ONE_OP)


@PLATFORMS
def test_linear_has_the_gradients_of_its_equation(platform):
    layer = randomised(Linear((3, 4), (2, 5), ("heads", "head_dim", "mlp", "embed"), **DTYPES, rngs=nnx.Rngs(0)))
    x, weight = normal(1, 6, 7, 3, 4), normal(2, 6, 7, 2, 5)
    graphdef, params = nnx.split(layer)
    with tracing_for(platform):
        by_params, by_x = jax.grad(lambda p, x: jnp.sum(weight * nnx.merge(graphdef, p)(x)), argnums=(0, 1))(params, x)
    np.testing.assert_allclose(by_x, np.einsum("btmf,nhmf->btnh", weight, float64(layer.kernel[...])), **ONE_OP)
    np.testing.assert_allclose(by_params.kernel[...], np.einsum("btnh,btmf->nhmf", float64(x), weight), **ONE_OP)
    np.testing.assert_allclose(by_params.bias[...], float64(weight).sum((0, 1)), **ONE_OP)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_gradients_of_a_bfloat16_product_are_summed_in_float32(platform):
    """Over 20,000 rows; bfloat16 keeps 8 bits: a sum in it would stand still, and a rounding to it is 0.2 % or so."""
    layer = Linear(
        (4,), (3, 2), ("embed", "heads", "head_dim"), param_dtype=FLOAT32, compute_dtype=BFLOAT16, rngs=nnx.Rngs(0)
    )
    rng = np.random.default_rng(1)
    x, weight = (jnp.asarray(rng.uniform(0.01, 1, (20_000, *dims)), BFLOAT16) for dims in ((4,), (3, 2)))
    graphdef, params = nnx.split(layer)

    def weighted(params, x):
        y = nnx.merge(graphdef, params)(x)
        assert y.dtype == BFLOAT16
        return jnp.sum((y * weight).astype(jnp.float32))

    with tracing_for(platform):
        by_params, by_x = jax.grad(weighted, argnums=(0, 1))(params, x)
    assert (by_params.kernel[...].dtype, by_params.bias[...].dtype, by_x.dtype) == (FLOAT32, FLOAT32, BFLOAT16)
    # The terms are exact: 20,000 of them, added up one after the other in float32, would be off by 1e-5 or so.
    np.testing.assert_allclose(by_params.bias[...], float64(weight).sum(0), rtol=1e-4)
    expected = np.einsum("bd,bnh->dnh", float64(x), float64(weight))
    np.testing.assert_allclose(by_params.kernel[...], expected, rtol=1e-4)


def test_gradients_of_bfloat16_tables_are_summed_in_float32():
    """Of 20,000 ones, where a sum in bfloat16 would stand still at 256; the last rounding is to the table's type."""
    tokens = jnp.tile(jnp.array([[3, 5]]), (10_000, 1))
    tables = Embedding(8, 4, param_dtype=BFLOAT16, rngs=nnx.Rngs(0))
    positions = LearnedPositions(8, 4, param_dtype=BFLOAT16, rngs=nnx.Rngs(0))
    for module, scale in ((tables, 2.0), (positions, 1.0)):
        graphdef, params = nnx.split(module)
        total = jax.grad(lambda p, of=graphdef: jnp.sum(nnx.merge(of, p)(tokens).astype(jnp.float32)))(params)
        assert total.table[...].dtype == BFLOAT16
        expected = np.zeros((8, 4))
        expected[[3, 5]] = 10_000 * scale
        np.testing.assert_allclose(float64(total.table[...]), expected, rtol=2**-8)


def test_linear_is_xavier_uniform_over_the_flattened_matrix():
    layer = Linear((256,), (8, 64), ("embed", "heads", "head_dim"), **DTYPES, rngs=nnx.Rngs(0))
    kernel = np.asarray(layer.kernel[...])
    bound = np.sqrt(6 / (256 + 512))
    assert np.abs(kernel).max() <= bound
    # 131,072 uniform draws: the standard error of the mean square is 0.25 % of it, so 2 % never happens by chance.
    assert np.mean(kernel**2) == pytest.approx(bound**2 / 3, rel=0.02)
    assert layer.bias is not None and not layer.bias[...].any()


def test_layer_norm_equals_its_equation():
    layer = randomised(LayerNorm(6, epsilon=1e-5, param_dtype=FLOAT32))
    x = normal(1, 4, 6) * 3 + 2
    x64 = float64(x)
    expected = (x64 - x64.mean(-1, keepdims=True)) / np.sqrt(x64.var(-1, keepdims=True) + 1e-5)
    expected = expected * float64(layer.scale[...]) + float64(layer.bias[...])
    np.testing.assert_allclose(layer(x), expected, **ONE_OP)


def test_residual_orders():
    x = normal(1, 2, 3, 6)
    norm = randomised(LayerNorm(6, epsilon=1e-5, param_dtype=FLOAT32))
    for order in ("post", "pre"):
        residual = ResidualNorm(6, order, dropout_rate=0.5, epsilon=1e-5, param_dtype=FLOAT32)
        residual.norm = norm
        result = residual.leave(x, 2 * residual.enter(x), None)
        expected = norm(x + 2 * x) if order == "post" else x + 2 * norm(x)
        np.testing.assert_allclose(result, expected, **ONE_OP)


@pytest.mark.parametrize("activation", ["relu", "gelu", "swish"])
def test_feed_forward_equals_its_equation(activation):
    import math

    formulas = {
        "relu": lambda a: np.maximum(a, 0),
        "gelu": lambda a: a * 0.5 * (1 + np.vectorize(math.erf)(a / np.sqrt(2))),
        "swish": lambda a: a / (1 + np.exp(-a)),
    }
    layer = randomised(FeedForward(4, 6, activation=activation, dropout_rate=0.0, **DTYPES, rngs=nnx.Rngs(0)))
    x = normal(1, 2, 3, 4)
    up = float64(x) @ float64(layer.up.kernel[...]) + float64(layer.up.bias[...])
    expected = formulas[activation](up) @ float64(layer.down.kernel[...]) + float64(layer.down.bias[...])
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_sinusoids_are_the_papers_up_to_the_order_of_channels():
    table = sinusoidal_table(50, 8)
    for position in (0, 1, 49):
        for i in range(4):
            angle = position / 10000 ** (2 * i / 8)
            assert table[position, i] == pytest.approx(np.sin(angle), abs=1e-6)
            assert table[position, 4 + i] == pytest.approx(np.cos(angle), abs=1e-6)
    positions = SinusoidalPositions(50, 8)(jnp.array([[3, 0]]))
    np.testing.assert_array_equal(positions[0], table[[3, 0]])


def test_embeddings_are_scaled_and_have_positions_added():
    embedding = Embedding(11, 16, param_dtype=FLOAT32, rngs=nnx.Rngs(0))
    tokens, positions = jnp.array([[4, 10, 0]]), jnp.array([[0, 1, 0]])
    layer = InputEmbedding("learned", 5, 16, dropout_rate=0.0, **DTYPES, rngs=nnx.Rngs(1))
    assert isinstance(layer.positions, LearnedPositions)
    table, learned = np.asarray(embedding.table[...]), np.asarray(layer.positions.table[...])
    expected = 4.0 * table[[4, 10, 0]] + learned[[0, 1, 0]]
    np.testing.assert_allclose(layer(embedding, tokens, positions)[0], expected, **ONE_OP)


def test_embeddings_start_with_variance_one_over_width():
    table = np.asarray(Embedding(4096, 64, param_dtype=FLOAT32, rngs=nnx.Rngs(0)).table[...])
    assert table.std() == pytest.approx(1 / 8, rel=0.01)  # 262,144 draws: standard error 0.14 %


@PLATFORMS
def test_output_projection_gives_padding_rows_no_probability(platform):
    """However its logits lie in memory."""
    kernel, bias, hidden = normal(1, 8, 4), normal(2, 8), normal(3, 2, 4)
    projection = OutputProjection(kernel, bias, num_real_rows=6)
    expected = float64(hidden) @ float64(kernel).T + float64(bias)
    with tracing_for(platform):
        folded = fold_bias_into_kernel(projection)
        for same in (projection, folded):
            logits = same.logits(hidden)
            np.testing.assert_allclose(logits[:, :6], expected[:, :6], **ONE_OP)
            assert not jax.nn.softmax(logits)[:, 6:].any()
        nothing_to_add = OutputProjection(kernel, None, num_real_rows=8)
        assert fold_bias_into_kernel(nothing_to_add) is nothing_to_add
    assert folded.bias_in_kernel == (platform == "cpu")
    widened: Any = folded.kernel
    assert widened.shape == (8, 5 if platform == "cpu" else 4)


# --- dropout


def test_dropout_keeps_the_share_and_the_mean_that_it_states():
    x = jnp.ones((1000, 1003))
    y = np.asarray(dropout(x, 0.3, jax.random.key(0)))
    kept = (y != 0).mean()
    threshold = round(0.7 * 256)
    # A million Bernoulli draws: standard error 0.0005; 5 of them are exceeded once in two million runs.
    assert kept == pytest.approx(threshold / 256, abs=0.0025)
    np.testing.assert_allclose(y[y != 0], 256 / threshold, rtol=1e-6)


@PLATFORMS
@pytest.mark.parametrize("key", [None, 0])
def test_dropout_after_a_rectifier_equals_both_in_turn(key, platform):
    key = None if key is None else jax.random.key(key)
    x, cotangent = normal(0, 40, 30), normal(1, 40, 30)

    def value_and_gradient(form):
        return jax.jit(jax.value_and_grad(lambda x: jnp.sum(form(x) * cotangent)))(x)

    with tracing_for(platform):
        ours = value_and_gradient(lambda x: relu_dropout(x, 0.3, key))
    one_by_one = value_and_gradient(lambda x: dropout(jax.nn.relu(x), 0.3, key))
    np.testing.assert_allclose(ours[0], one_by_one[0], rtol=1e-5)
    np.testing.assert_allclose(ours[1], one_by_one[1], rtol=1e-6)


def test_dropout_is_off_without_a_key_or_a_rate():
    x = normal(1, 4, 5)
    np.testing.assert_array_equal(dropout(x, 0.5, None), x)
    np.testing.assert_array_equal(dropout(x, 0.0, jax.random.key(0)), x)


def test_random_bytes_are_uniform_and_independent_within_a_word():
    draws = np.asarray(random_bytes(jax.random.key(1), (4, 1 << 16))).reshape(-1, 4)
    counts = np.bincount(draws.ravel(), minlength=256)
    expected = draws.size / 256
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 255 + 6 * np.sqrt(2 * 255)  # six sigma
    correlation = np.corrcoef(draws.T.astype(float))
    assert np.abs(correlation - np.eye(4)).max() < 6 / np.sqrt(len(draws))  # six sigma


@pytest.mark.parametrize("size", [3, 10, 64, 512, 1000, 1024])
def test_a_tpu_keeps_the_same_elements(size):
    key, shape = jax.random.key(4), (2, 5, size)
    expected = kept(key, shape, 200)
    with tracing_for("tpu"):
        found = jax.jit(lambda: kept(key, shape, 200))()
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(expected, np.asarray(random_bytes(key, shape)) < 200)


def test_two_keys_give_different_masks():
    x = jnp.ones((64, 64))
    first, second = jax.random.split(jax.random.key(0))
    assert (np.asarray(dropout(x, 0.5, first)) != np.asarray(dropout(x, 0.5, second))).mean() > 0.4


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("transformer", "dropout"),
        ("transformer", "embedding_dropout"),
        ("transformer", "attention_dropout"),
        ("transformer", "activation_dropout"),
        ("rnn", "dropout"),
    ],
)
def test_a_dropout_rate_out_of_range_is_named_with_its_file(tmp_path, kind, name, rate):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {{kind: {kind}, {name}: {rate}}}\n")
    message = rf"{re.escape(str(path))}: model\.{name} must be at least 0 and below 1, got {rate}"
    with pytest.raises(ConfigError, match=message):
        read_config(path)
    path.write_text(f"model: {{kind: {kind}, {name}: 0.0019}}\n")  # of 256 values of a byte, it is none
    with pytest.raises(ConfigError, match=rf"model\.{name}: rates are drawn in steps of 1/256, .* at least 0.002\."):
        read_config(path)
    path.write_text(f"model: {{kind: {kind}, {name}: 0.002}}\n")
    assert getattr(read_config(path).model, name) == 0.002
