"""Logits processors, each against plain Python over random hypotheses, and what a search makes of them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer.decoding.beam_search import BeamSearchConfig, beam_search
from flax_transformer.decoding.length_penalty import LengthPenalty
from flax_transformer.decoding.logits_processors import (
    ForceEos,
    ForcePrefix,
    LogitsProcessor,
    MinLength,
    NoRepeatNgram,
    Progress,
    RepetitionPenalty,
    SuppressSequences,
    SuppressTokens,
)
from flax_transformer.shapes import MASKED
from tests.chains import END, START, outputs, table_functions

VOCAB = 6
NONE = LengthPenalty.parse("none")


def random_progress(seed: int, slots: int = 5, beams: int = 3, length: int = 9) -> tuple[Progress, jax.Array]:
    rng = np.random.default_rng(seed)
    tokens = jnp.asarray(rng.integers(0, VOCAB, (slots, beams, length)), jnp.int32)
    steps = jnp.asarray(rng.integers(0, length, slots), jnp.int32)
    sentences = jnp.asarray(rng.permutation(slots), jnp.int32)
    log_probs = jax.jit(jax.nn.log_softmax)(jnp.asarray(rng.normal(size=(slots, beams, VOCAB)), jnp.float32))
    return Progress(tokens, steps, sentences), log_probs


@jax.jit
def _ruled(processor, log_probs, progress):
    return processor(log_probs, progress)


def allowed(processor, seed: int):
    """Yields for each hypothesis: its slot, its tokens so far, and the set of tokens that the processor leaves."""
    progress, log_probs = random_progress(seed)
    ruled, log_probs, progress = jax.device_get((_ruled(processor, log_probs, progress), log_probs, progress))
    left = ruled > MASKED / 2
    np.testing.assert_array_equal(ruled[left], log_probs[left])
    for slot in range(left.shape[0]):
        for beam in range(left.shape[1]):
            so_far = progress.tokens[slot, beam, : int(progress.steps[slot])].tolist()
            yield int(progress.sentences[slot]), so_far, set(np.flatnonzero(left[slot, beam]).tolist())


EVERY = set(range(VOCAB))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_ngram_is_repeated(size, seed):
    for _, so_far, left in allowed(NoRepeatNgram(size), seed):
        seen = {tuple(so_far[i : i + size]) for i in range(len(so_far) - size + 1)}
        head = so_far[len(so_far) - size + 1 :] if size > 1 else []
        fits = len(so_far) >= size - 1
        assert left == {t for t in EVERY if not (fits and (*head, t) in seen)}, (so_far, left)


@pytest.mark.parametrize("seed", range(3))
def test_phrases_are_suppressed(seed):
    phrases = [[3], [1, 2], [4, 4, 0], [2, 5]]
    for _, so_far, left in allowed(SuppressSequences.of(phrases), seed):
        suppressed = {
            p[-1] for p in phrases if len(p) - 1 <= len(so_far) and so_far[len(so_far) - len(p) + 1 :] == p[:-1]
        }
        assert left == EVERY - suppressed, so_far


def test_tokens_are_suppressed_and_the_end_waits_for_the_minimum():
    for _, _, left in allowed(SuppressTokens(jnp.asarray(np.arange(VOCAB) == 4)), 0):
        assert left == EVERY - {4}
    lengths = jnp.array([0, 3, 5, 9, 1])
    for sentence, so_far, left in allowed(MinLength(lengths, END), 0):
        assert left == (EVERY - {END} if len(so_far) + 1 < int(lengths[sentence]) else EVERY)


def test_a_prefix_is_forced_and_the_other_rules_come_after_it():
    prefixes = jnp.array([[3, 3, 3, -1], [-1] * 4, [2, -1, -1, -1], [5, 4, 3, 2], [1, 2, -1, -1]])
    suppressed = SuppressTokens(jnp.asarray(np.arange(VOCAB) == 3))
    for seed in range(4):
        for sentence, so_far, left in allowed(ForcePrefix(prefixes, (suppressed,)), seed):
            prefix = [t for t in prefixes[sentence].tolist() if t >= 0]
            assert left == ({prefix[len(so_far)]} if len(so_far) < len(prefix) else EVERY - {3})


def test_the_last_place_belongs_to_the_end_token():
    lengths = jnp.array([1, 3, 5, 7, 9])
    seen = set()
    for seed in range(6):
        progress, log_probs = random_progress(seed)
        steps, sentences = np.asarray(progress.steps).tolist(), np.asarray(progress.sentences).tolist()
        ruled = np.asarray(_ruled(ForceEos(lengths, END), log_probs, progress))
        for slot, (step, sentence) in enumerate(zip(steps, sentences, strict=True)):
            if is_last := step + 1 == int(lengths[sentence]):
                only_end = np.where(np.arange(VOCAB) == END, 0.0, MASKED)
                np.testing.assert_array_equal(ruled[slot], np.broadcast_to(only_end.astype(np.float32), (3, VOCAB)))
            else:
                np.testing.assert_array_equal(ruled[slot], np.asarray(log_probs)[slot])
            seen.add(is_last)
    assert seen == {False, True}


@pytest.mark.parametrize("prefix", [[], [5, 5]])
def test_a_search_that_forces_the_end_closes_what_reaches_its_limit_for_nothing(prefix):
    """As wide as the space: all outputs that end before the limit, and all others with an end that costs nothing."""
    rng = np.random.default_rng(3)
    chain = np.asarray(rng.normal(size=(3, 3)), np.float32)  # start, END and one more
    chain = np.pad(chain, ((0, VOCAB - 3), (0, VOCAB - 3)), constant_values=10 * MASKED)
    chain[5], chain[:, 5] = chain[2], chain[:, 2]
    limits = [4, 3]
    config = BeamSearchConfig(32, 2, 4, START, END, LengthPenalty.parse("average:1.0"))
    asked: list[LogitsProcessor] = [MinLength(jnp.array([9, 0]), END)]  # what is forced comes after it
    asked.append(ForceEos(jnp.asarray(limits), END))
    if prefix:
        asked = [ForcePrefix(jnp.array([[5, 5], [-1, -1]]), tuple(asked))]
    run = jax.jit(lambda chain: beam_search(table_functions(chain), config, None, jnp.array(limits), asked))
    found = jax.device_get(run(jnp.asarray(chain)))
    log_p = np.asarray(jax.nn.log_softmax(jnp.asarray(chain)), np.float64)
    for sentence, (limit, first, ends) in enumerate(((4, prefix, False), (3, [], True))):
        expected: dict[tuple[int, ...], float] = {}
        for size in range(limit):
            for body in itertools.product((0, 2, 5), repeat=size):
                forced = size + 1 == limit
                if list(body[: len(first)]) != first[: len(body)] or len(body) < len(first) or not (forced or ends):
                    continue
                steps = body if forced else (*body, END)
                total = sum(log_p[a, b] for a, b in zip((START, *steps), steps, strict=False))
                expected[(*body, END)] = total / (size + 1)
        hypotheses = outputs(found, sentence)
        assert {tokens for tokens, _, _ in hypotheses} == set(expected) and all(ended for _, _, ended in hypotheses)
        for tokens, score, _ in hypotheses:
            assert score == pytest.approx(expected[tokens], rel=1e-4)


def test_what_has_occurred_is_less_probable():
    progress, log_probs = random_progress(1)
    ruled = np.asarray(_ruled(RepetitionPenalty(1.5), log_probs, progress))
    progress = jax.device_get(progress)
    for slot in range(5):
        for beam in range(3):
            seen = set(np.asarray(progress.tokens)[slot, beam, : int(progress.steps[slot])].tolist())
            factor = [1.5 if t in seen else 1.0 for t in range(VOCAB)]
            np.testing.assert_allclose(ruled[slot, beam], np.asarray(log_probs)[slot, beam] * factor, rtol=1e-6)


def test_a_search_obeys_its_rules_and_keeps_the_models_log_probabilities():
    rng = np.random.default_rng(0)
    chain = jnp.asarray(rng.normal(size=(VOCAB, VOCAB)), jnp.float32)
    config = BeamSearchConfig(4, 2, 8, START, END, NONE)
    prefixes = jnp.array([[5, 5], [-1, -1]])
    asked = (ForcePrefix(prefixes, (NoRepeatNgram(2), MinLength(jnp.array([5, 6]), END))),)

    @functools.partial(jax.jit)
    def run(chain):
        return beam_search(table_functions(chain), config, None, jnp.array([8, 8]), asked)

    found = jax.device_get(run(chain))
    log_p = np.asarray(jax.nn.log_softmax(chain), np.float64)
    for sentence, (prefix, least) in enumerate((([5, 5], 5), ([], 6))):
        hypotheses = outputs(found, sentence)
        assert len(hypotheses) == 4
        for tokens, score, _ in hypotheses:
            assert list(tokens[: len(prefix)]) == prefix and len(tokens) >= least
            pairs = list(zip(tokens, tokens[1:], strict=False))
            assert len(set(pairs)) == len(pairs)
            total = sum(log_p[a, b] for a, b in zip((START, *tokens[:-1]), tokens, strict=True))
            assert score == pytest.approx(total, rel=1e-4)
