"""The loss, fused and as its reference, against its definition in NumPy and the gradients of the plain form."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer import backend
from flax_transformer.ops.cross_entropy import (
    Blocking,
    LossSums,
    LossTerms,
    cross_entropy,
    fused_cross_entropy,
    reference_cross_entropy,
)
from flax_transformer.ops.vocabulary import OutputProjection


def blockings(elements: int) -> list[Blocking]:
    """Blocks of so many float32 logits, in the form for a CPU and in that for an accelerator."""
    return [Blocking(4 * elements, for_cpu, narrow=False) for for_cpu in (True, False)]


WHOLE = blockings(1 << 21)


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def loss_sums(
    blocking: Blocking | None, hidden, projection, targets, mask, smoothing, divergence_weight=0.0
) -> LossSums:
    """The sums, in blocks; None is the reference."""
    if blocking is None:
        return reference_cross_entropy(hidden, projection, targets, mask, smoothing, divergence_weight)
    terms = LossTerms(projection.num_real_rows, smoothing, divergence_weight)
    return fused_cross_entropy(hidden, projection, targets, mask, terms, blocking)


def float64(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def example(seed: int = 0, real: int = 11, with_bias: bool = True):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(2, 6, 4)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(16, 4)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=16), jnp.float32) if with_bias else None
    targets = jnp.asarray(rng.integers(0, real, (2, 6)), jnp.int32)
    mask = jnp.asarray(rng.random((2, 6)) < 0.7)
    return hidden, kernel, bias, targets, mask


def by_definition(hidden, kernel, bias, targets, mask, real, smoothing):
    logits = float64(hidden) @ float64(kernel).T + (0.0 if bias is None else float64(bias))
    logits = logits[..., :real]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_p, np.asarray(targets)[..., None], -1)[..., 0]
    loss = (1 - smoothing) * nll - smoothing * log_p.mean(-1)
    correct = logits.argmax(-1) == np.asarray(targets)
    m = np.asarray(mask, np.float64)
    return (loss * m).sum(), (nll * m).sum(), (correct * m).sum(), m.sum()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("blocking", [None, *WHOLE, *blockings(2 * 2 * 16), *blockings(1)])
def test_sums_equal_their_definition(smoothing, with_bias, blocking):
    hidden, kernel, bias, targets, mask = example(with_bias=with_bias)
    sums = loss_sums(blocking, hidden, OutputProjection(kernel, bias, 11), targets, mask, smoothing)
    expected = by_definition(hidden, kernel, bias, targets, mask, 11, smoothing)
    np.testing.assert_allclose(np.array(sums), expected, rtol=1e-5)


@pytest.mark.parametrize("blocking", [None, *WHOLE, *blockings(2 * 3 * 16)])
def test_gradients_equal_those_of_the_plain_form(blocking):
    hidden, kernel, bias, targets, mask = example()

    def fused(arguments):
        h, k, b = arguments
        return (
            3.0 * loss_sums(blocking, h, OutputProjection(k, b, 11), targets, mask, 0.1).loss
        )  # 3: the scale must carry

    def plain(arguments):
        h, k, b = arguments
        logits = jnp.einsum("btd,vd->btv", h, k[:11]) + b[:11][None, None]
        log_p = jax.nn.log_softmax(logits)
        nll = -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
        return 3.0 * jnp.sum(jnp.where(mask, 0.9 * nll - 0.1 * log_p.mean(-1), 0.0))

    value, gradient = jax.jit(jax.value_and_grad(fused))((hidden, kernel, bias))
    expected_value, expected = jax.jit(jax.value_and_grad(plain))((hidden, kernel, bias))
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    chex.assert_trees_all_close(gradient, expected, rtol=1e-4, atol=1e-5)
    assert not gradient[1][11:].any() and not gradient[2][11:].any()  # padding rows learn nothing


def plain_r_drop(hidden, kernel, bias, targets, mask, real, smoothing, weight):
    """R-Drop's loss as its paper writes it, rows 2i and 2i + 1 being the two passes."""
    logits = jnp.einsum("btd,vd->btv", hidden, kernel[:real]) + bias[:real][None, None]
    log_p = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    loss = jnp.sum(jnp.where(mask, (1 - smoothing) * nll - smoothing * log_p.mean(-1), 0.0))
    first, second = log_p[::2], log_p[1::2]
    forward = jnp.sum(jnp.exp(first) * (first - second), axis=-1)  # KL(p || q)
    backward = jnp.sum(jnp.exp(second) * (second - first), axis=-1)
    return loss + weight * jnp.sum(jnp.where(mask[::2], (forward + backward) / 2, 0.0))


@pytest.mark.parametrize("blocking", [None, *WHOLE, *blockings(2 * 5 * 16), *blockings(1)])
def test_two_passes_are_drawn_together_as_r_drop_writes_it(blocking):
    """Chunks of an odd number of tokens, too, in which a pair would be cut in two."""
    rng = np.random.default_rng(3)
    _, kernel, bias, targets, mask = example()
    hidden = jnp.asarray(rng.normal(size=(4, 6, 4)), jnp.float32)
    targets, mask = jnp.repeat(targets, 2, axis=0), jnp.repeat(mask, 2, axis=0)

    def fused(h, k, b):
        return loss_sums(blocking, h, OutputProjection(k, b, 11), targets, mask, 0.1, 2.5).loss

    def plain(h, k, b):
        return plain_r_drop(h, k, b, targets, mask, 11, 0.1, 2.5)

    value, gradient = jax.jit(jax.value_and_grad(fused, argnums=(0, 1, 2)))(hidden, kernel, bias)
    expected_value, expected = jax.jit(jax.value_and_grad(plain, argnums=(0, 1, 2)))(hidden, kernel, bias)
    without = jax.jit(plain_r_drop, static_argnums=(5, 6, 7))(hidden, kernel, bias, targets, mask, 11, 0.1, 0.0)
    assert without < 0.9 * expected_value
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    chex.assert_trees_all_close(gradient, expected, rtol=1e-4, atol=1e-5)
    assert not gradient[1][11:].any() and not gradient[2][11:].any()
    # The other sums are those of the same rows without the divergence.
    chex.assert_trees_all_close(
        loss_sums(blocking, hidden, OutputProjection(kernel, bias, 11), targets, mask, 0.1, 2.5)[1:],
        loss_sums(blocking, hidden, OutputProjection(kernel, bias, 11), targets, mask, 0.1)[1:],
        rtol=1e-5,
    )


@pytest.mark.parametrize("blocking", [None, *WHOLE])
def test_two_passes_that_agree_diverge_by_nothing(blocking):
    hidden, kernel, bias, targets, mask = example()
    hidden, targets, mask = (jnp.repeat(x, 2, axis=0) for x in (hidden, targets, mask))
    projection = OutputProjection(kernel, bias, 11)
    chex.assert_trees_all_close(
        loss_sums(blocking, hidden, projection, targets, mask, 0.1, 5.0),
        loss_sums(blocking, hidden, projection, targets, mask, 0.1),
        rtol=1e-6,
    )


def test_logits_of_bfloat16_change_the_loss_by_their_rounding_alone():
    """One logit is wrong by at most 2 ** -9 of itself; over many tokens the errors cancel."""
    rng = np.random.default_rng(3)
    hidden = jnp.asarray(rng.normal(size=(8, 64, 32)), jnp.bfloat16)
    projection = OutputProjection(jnp.asarray(rng.normal(size=(512, 32)), jnp.float32), None, 500)
    targets, mask = jnp.asarray(rng.integers(0, 500, (8, 64)), jnp.int32), jnp.ones((8, 64), bool)

    @functools.partial(jax.jit, static_argnums=0)
    @functools.partial(jax.value_and_grad, argnums=1, has_aux=True)
    def gradient(narrow, h):
        sums = loss_sums(Blocking(2 * 512 * 100, False, narrow), h, projection, targets, mask, 0.1)
        return sums.loss, sums

    (exact, exact_sums), by_hidden = gradient(False, hidden)
    (narrow, narrow_sums), by_narrow = gradient(True, hidden)
    assert 0.0 < abs(narrow / exact - 1.0) < 1e-3
    np.testing.assert_allclose(narrow_sums.correct, exact_sums.correct, atol=5)
    error, size = (np.linalg.norm(x.astype(jnp.float32)) for x in (by_hidden - by_narrow, by_hidden))
    assert error < 0.02 * size
    # An evaluation has float32 logits.
    evaluated = loss_sums(Blocking(2 * 512 * 100, False, True), hidden, projection, targets, mask, 0.1)
    np.testing.assert_allclose(evaluated.loss, exact, rtol=1e-6)


def test_the_gradient_by_a_float32_kernel_is_not_rounded_to_the_type_of_products():
    """20,000 tokens in bfloat16, each with a gradient of one sign, against the same numbers in float32."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.uniform(0.1, 1, (4, 5_000, 4)), jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(size=(16, 4)), jnp.bfloat16).astype(jnp.float32)  # its cast loses nothing
    targets = jnp.full((4, 5_000), 3)

    def by_kernel(hidden):
        def loss(k):
            return loss_sums(WHOLE[0], hidden, OutputProjection(k, None, 11), targets, targets > 0, 0.1).loss

        return jax.jit(jax.grad(loss))(kernel)

    found, expected = by_kernel(hidden), by_kernel(hidden.astype(jnp.float32))
    assert found.dtype == jnp.float32
    # Gradients by logits are rounded to 8 bits each, by up to 0.4 %, but this is lost in the mean of 20,000.
    np.testing.assert_allclose(found, expected, rtol=2e-4)


@pytest.mark.parametrize("blocking", [None, *WHOLE])
def test_masked_positions_count_for_nothing(blocking):
    hidden, kernel, bias, targets, mask = example()
    projection = OutputProjection(kernel, bias, 11)
    changed = jnp.where(mask[..., None], hidden, 100.0)
    before = loss_sums(blocking, hidden, projection, targets, mask, 0.1)
    after = loss_sums(blocking, changed, projection, targets, mask, 0.1)
    chex.assert_trees_all_equal(before, after)
    gradient = jax.jit(jax.grad(lambda h: loss_sums(blocking, h, projection, targets, mask, 0.1).loss))(hidden)
    assert not np.asarray(gradient)[~np.asarray(mask)].any()


def test_blocks_that_are_padding_alone_are_left_out():
    """Of 2 x 8 tokens in blocks of 3, the 7 that are not padding fill three blocks of six; a NaN after them is not met.

    What is summed shows that tokens go back where they came from.
    """
    mask = jnp.asarray([[1, 0, 1, 1, 0, 0, 1, 0], [0, 0, 1, 0, 0, 1, 1, 0]], bool)
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 4)), jnp.float32)
    kernel = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4)), jnp.float32)
    targets = jnp.arange(16).reshape(2, 8) % 5
    far = jnp.zeros((2, 8), bool).at[1, 7].set(True)  # last in its order: in the sixth block

    def gradient(hidden: jax.Array, for_cpu: bool) -> jax.Array:
        def loss(h):
            terms, blocking = LossTerms(5, 0.1, 0.0), Blocking(4 * 3 * 5, for_cpu, False)
            return fused_cross_entropy(h, OutputProjection(kernel, None, 5), targets, mask, terms, blocking).loss

        return jax.jit(jax.grad(loss))(hidden)

    def reference(h):
        return reference_cross_entropy(h, OutputProjection(kernel, None, 5), targets, mask, 0.1).loss

    expected = jax.jit(jax.grad(reference))(hidden)
    broken = jnp.where(far[..., None], jnp.nan, hidden)
    np.testing.assert_allclose(gradient(broken, True), expected, rtol=1e-5, atol=1e-6)
    assert jnp.isnan(gradient(broken, False)).any()


@pytest.mark.parametrize("platform, is_fixed", [("cpu", False), ("gpu", True), ("tpu", True)])
def test_on_an_accelerator_the_number_of_blocks_is_fixed(platform, is_fixed):
    """A loop of unknown length makes a GPU wait for the host in each of its turns."""
    hidden, kernel, bias, targets, mask = example()

    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def gradient(h, k):
        return cross_entropy(h, OutputProjection(k, bias, 11), targets, mask, 0.1).loss

    with backend.tracing_for(platform):
        program = str(jax.make_jaxpr(gradient)(hidden, kernel))
        found = jax.jit(gradient)(hidden, kernel)
    assert ("while[" not in program and "scan[" in program) == is_fixed
    expected = jax.jit(gradient)(hidden, kernel)  # without a mesh: the reference
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("blocking", [None, *WHOLE])
def test_a_batch_of_padding_alone_has_no_loss_and_no_gradient(blocking):
    hidden, kernel, bias, targets, mask = example()
    projection = OutputProjection(kernel, bias, 11)
    nothing = jnp.zeros_like(mask)

    @jax.jit
    @jax.value_and_grad
    def gradient_of(h):
        return loss_sums(blocking, h, projection, targets, nothing, 0.1).loss

    value, gradient = gradient_of(hidden)
    assert value == 0.0 and not np.asarray(gradient).any()


@pytest.mark.parametrize("blocking", WHOLE)
def test_the_vocabulary_is_never_held_for_all_positions(blocking):
    """The compiled gradient needs less memory than one [B, T, V] array of logits."""
    rows, length, vocab, dim = 64, 32, 8192, 16
    hidden = jax.ShapeDtypeStruct((rows, length, dim), jnp.float32)
    kernel = jax.ShapeDtypeStruct((vocab, dim), jnp.float32)
    targets = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def value(h, k, t):
        return loss_sums(blocking, h, OutputProjection(k, None, vocab), t, t > 0, 0.1).loss

    compiled = jax.jit(jax.grad(value, argnums=(0, 1))).lower(hidden, kernel, targets).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < rows * length * vocab * 4 / 2
