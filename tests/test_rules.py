"""Rules of a search, each against plain Python over random hypotheses, and sampling against the distribution."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer.decoding import rules
from flax_transformer.decoding.beam_search import BeamSearchConfig, beam_search
from flax_transformer.decoding.length_penalty import LengthPenalty
from flax_transformer.decoding.rules import Progress
from flax_transformer.decoding.sampling import SamplingConfig, keep_probable, sample
from flax_transformer.errors import ConfigError
from flax_transformer.shapes import MASKED
from tests.chains import END, START, outputs

VOCAB = 6
NONE = LengthPenalty.parse("none")


def random_progress(seed: int, slots: int = 5, beams: int = 3, length: int = 9) -> tuple[Progress, jax.Array]:
    rng = np.random.default_rng(seed)
    tokens = jnp.asarray(rng.integers(0, VOCAB, (slots, beams, length)), jnp.int32)
    steps = jnp.asarray(rng.integers(0, length, slots), jnp.int32)
    sentences = jnp.asarray(rng.permutation(slots), jnp.int32)
    log_probs = jax.nn.log_softmax(jnp.asarray(rng.normal(size=(slots, beams, VOCAB)), jnp.float32))
    return Progress(tokens, steps, sentences), log_probs


def allowed(rule, seed: int):
    """Yields for each hypothesis: its slot, its tokens so far, and the set of tokens that the rule leaves."""
    progress, log_probs = random_progress(seed)
    ruled = np.asarray(rule(log_probs, progress))
    left = ruled > MASKED / 2
    np.testing.assert_array_equal(ruled[left], np.asarray(log_probs)[left])
    for slot in range(left.shape[0]):
        for beam in range(left.shape[1]):
            so_far = np.asarray(progress.tokens)[slot, beam, : int(progress.steps[slot])].tolist()
            yield int(progress.sentences[slot]), so_far, set(np.flatnonzero(left[slot, beam]).tolist())


EVERY = set(range(VOCAB))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_ngram_is_repeated(size, seed):
    for _, so_far, left in allowed(rules.no_repeated_ngrams(size), seed):
        seen = {tuple(so_far[i : i + size]) for i in range(len(so_far) - size + 1)}
        head = so_far[len(so_far) - size + 1 :] if size > 1 else []
        fits = len(so_far) >= size - 1
        assert left == {t for t in EVERY if not (fits and (*head, t) in seen)}, (so_far, left)


@pytest.mark.parametrize("seed", range(3))
def test_phrases_are_banned(seed):
    phrases = [[3], [1, 2], [4, 4, 0], [2, 5]]
    for _, so_far, left in allowed(rules.banned_phrases(phrases), seed):
        banned = {p[-1] for p in phrases if len(p) - 1 <= len(so_far) and so_far[len(so_far) - len(p) + 1 :] == p[:-1]}
        assert left == EVERY - banned, so_far


def test_tokens_are_banned_and_the_end_waits_for_the_minimum():
    for _, _, left in allowed(rules.banned_tokens(jnp.asarray(np.arange(VOCAB) == 4)), 0):
        assert left == EVERY - {4}
    lengths = jnp.array([0, 3, 5, 9, 1])
    for sentence, so_far, left in allowed(rules.minimum_lengths(lengths, END), 0):
        assert left == (EVERY - {END} if len(so_far) + 1 < int(lengths[sentence]) else EVERY)


def test_a_prefix_is_forced_and_the_other_rules_come_after_it():
    prefixes = jnp.array([[3, 3, 3, -1], [-1] * 4, [2, -1, -1, -1], [5, 4, 3, 2], [1, 2, -1, -1]])
    banned = rules.banned_tokens(jnp.asarray(np.arange(VOCAB) == 3))
    for seed in range(4):
        for sentence, so_far, left in allowed(rules.forced_prefixes(prefixes, [banned]), seed):
            prefix = [t for t in prefixes[sentence].tolist() if t >= 0]
            assert left == ({prefix[len(so_far)]} if len(so_far) < len(prefix) else EVERY - {3})


def test_the_last_place_belongs_to_the_end_token():
    lengths = jnp.array([1, 3, 5, 7, 9])
    seen = set()
    for seed in range(6):
        progress, log_probs = random_progress(seed)
        steps, sentences = np.asarray(progress.steps).tolist(), np.asarray(progress.sentences).tolist()
        ruled = np.asarray(rules.forced_end(lengths, END)(log_probs, progress))
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
    asked: list[rules.Rule] = [rules.minimum_lengths(jnp.array([9, 0]), END)]  # what is forced comes after it
    asked.append(rules.forced_end(jnp.asarray(limits), END))
    if prefix:
        asked = [rules.forced_prefixes(jnp.array([[5, 5], [-1, -1]]), asked)]
    run = jax.jit(
        lambda chain: beam_search(
            lambda t, s: (chain[t], None, s), lambda s, _: s, lambda s, *_: s, None, jnp.array(limits), config, asked
        )
    )
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
    ruled = rules.repetition_penalty(1.5)(log_probs, progress)
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
    asked = (
        rules.forced_prefixes(prefixes, [rules.no_repeated_ngrams(2), rules.minimum_lengths(jnp.array([5, 6]), END)]),
    )

    @functools.partial(jax.jit)
    def run(chain):
        return beam_search(
            lambda t, s: (chain[t], None, s), lambda s, _: s, lambda s, *_: s, None, jnp.array([8, 8]), config, asked
        )

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


# --- sampling


def draw(chain, seeds, num: int, config: SamplingConfig | None = None, asked=(), max_length: int = 6, penalty=NONE):
    seeds = jnp.asarray(seeds, jnp.int32)

    @jax.jit
    def run(chain, seeds):
        limits = jnp.full(seeds.shape, max_length)
        return sample(
            lambda t, s: (chain[t], None, s),
            None,
            limits,
            seeds,
            num,
            max_length,
            START,
            END,
            penalty,
            config or SamplingConfig(),
            asked,
        )

    return jax.device_get(run(jnp.asarray(chain, jnp.float32), seeds))


def test_samples_follow_the_distribution_and_score_what_the_model_says():
    table = np.array([[0, 0.5, 0.3, 0.2], [0, 1, 0, 0], [0, 0.75, 0.25, 0], [0, 1.0, 0, 0]])
    with np.errstate(divide="ignore"):
        chain = np.maximum(np.log(table), MASKED)
    found = draw(chain, [7], 4000)
    drawn = [tokens for tokens, _, _ in outputs(found)]
    for tokens, probability in {(1,): 0.5, (3, 1): 0.2, (2, 1): 0.225, (2, 2, 1): 0.05625}.items():
        assert abs(drawn.count(tokens) / 4000 - probability) < 4 * (probability * (1 - probability) / 4000) ** 0.5
    scores = dict((tokens, score) for tokens, score, _ in outputs(found))
    assert scores[(2, 2, 1)] == pytest.approx(np.log(0.05625), rel=1e-5)
    found_scores = [score for _, score, _ in outputs(found)]
    assert found_scores == sorted(found_scores, reverse=True)


@pytest.mark.parametrize("penalty", ["none", "gnmt:3.0", "average:1.0"])
def test_a_sample_that_no_token_is_left_for_is_no_output(penalty):
    """What begins with 3 has no token to go on with; what begins with 2 has 2 and the end."""

    def rule(log_probs, progress):
        stuck = (progress.tokens[:, :, 0] == 3) & (progress.steps >= 1)[:, None]
        return jnp.where(stuck[:, :, None], MASKED, log_probs)

    chain = np.full((4, 4), MASKED)
    chain[START, [2, 3]] = np.log(0.5)
    chain[2, [2, END]] = chain[3, [2, END]] = np.log(0.5)
    found = draw(chain, [5], 64, asked=[rule], penalty=LengthPenalty.parse(penalty))
    there = found.lengths[0] > 0
    num = there.sum()  # at random: 1 in 2^63 that all are alike
    assert 0 < num < 64 and there[:num].all() and (found.tokens[0, :, 0] == np.where(there, 2, 3)).all()
    assert (found.scores[0, :num] > -100).all() and (np.diff(found.scores[0, found.finished[0]]) <= 0).all()
    assert (found.scores[0, num:] == np.float32(MASKED)).all() and not found.finished[0, num:].any()
    # The others are what is drawn without the rule.
    free = draw(chain, [5], 64, penalty=LengthPenalty.parse(penalty))
    assert {o for o in outputs(found) if o[0][:1] == (2,)} == {o for o in outputs(free) if o[0][0] == 2}


def test_a_sentence_draws_the_same_beside_others():
    chain = np.random.default_rng(0).normal(size=(VOCAB, VOCAB))
    together = draw(chain, [3, 1, 4, 1], 5)
    alone = draw(chain, [4], 5)
    assert outputs(together, 2) == outputs(alone)
    assert outputs(together, 1) == outputs(together, 3) != outputs(together, 0)


@pytest.mark.parametrize(
    "config, expected",
    [
        (SamplingConfig(), {0, 1, 2, 3}),
        (SamplingConfig(top_k=2), {0, 1}),
        (SamplingConfig(top_k=9), {0, 1, 2, 3}),
        (SamplingConfig(top_p=0.5), {0}),
        (SamplingConfig(top_p=0.51), {0, 1}),
        (SamplingConfig(min_p=0.5), {0, 1}),
        (SamplingConfig(temperature=0.1, min_p=0.1), {0}),
        (SamplingConfig(temperature=10.0, min_p=0.5), {0, 1, 2, 3}),
    ],
)
def test_only_probable_tokens_are_drawn_from(config, expected):
    log_probs = jnp.log(jnp.array([[[0.5, 0.3, 0.15, 0.05]]]))
    kept = np.asarray(keep_probable(log_probs, config))[0, 0]
    assert set(np.flatnonzero(kept > MASKED / 2).tolist()) == expected


@pytest.mark.parametrize(
    "values, message",
    [
        ({"temperature": 0.0}, "temperature must be at least 1e-06, got 0.0"),
        ({"top_k": -1}, "top_k must not be negative"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"min_p": 1.5}, "min_p must lie between 0 and 1"),
    ],
)
def test_bad_sampling_is_explained(values, message):
    with pytest.raises(ConfigError, match=message):
        SamplingConfig(**values)
