"""Lexical constraints: against plain Python, against an exhaustive search, and by their promise.

The step is a Markov chain, as in `test_beam_search.py`.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer.decoding.beam_search import BeamSearchConfig, beam_search
from flax_transformer.decoding.length_penalty import LengthPenalty
from flax_transformer.decoding.lexical_constraints import (
    NOTHING,
    LexicalConstraints,
    allocate_beam,
    begun_phrases,
    contained_phrases,
)
from flax_transformer.decoding.logits_processors import ANY, SuppressTokens
from tests.chains import END, START, chain_functions, chain_state


def padded(phrases: list[list[list[int]]]) -> jnp.ndarray:
    """[N, Q, P] of the phrases of each sentence."""
    most = max(map(len, phrases))
    longest = max((len(p) for of in phrases for p in of), default=1)
    array = np.full((len(phrases), most, longest), ANY, np.int32)
    for row, of in zip(array, phrases, strict=True):
        for place, phrase in zip(row, of, strict=False):
            place[: len(phrase)] = phrase
    return jnp.asarray(array)


def holds(tokens, phrase) -> bool:
    return any(list(tokens[n : n + len(phrase)]) == list(phrase) for n in range(len(tokens) - len(phrase) + 1))


@functools.cache
def compiled(config: BeamSearchConfig, constrained: bool, suppressed: tuple[int, ...]):
    @jax.jit
    def run(chains, limits, phrases):
        suppress = SuppressTokens(jnp.isin(jnp.arange(chains.shape[1]), jnp.array(suppressed, jnp.int32)))
        constraints = LexicalConstraints(phrases, END) if constrained else None
        state = chain_state(chains, config.num_slots)
        return beam_search(chain_functions(), config, state, limits, (suppress,) if suppressed else (), constraints)

    return run


def search(chains, phrases, beam, length, slots=None, constrained=True, suppressed=()):
    config = BeamSearchConfig(beam, slots or len(chains), length, START, END, LengthPenalty.parse("none"))
    limits = jnp.full((len(chains),), length)
    found = jax.device_get(compiled(config, constrained, suppressed)(jnp.asarray(chains, jnp.float32), limits, phrases))
    return found, [
        [
            (tuple(tokens[:length].tolist()), float(score), bool(finished))
            for tokens, length, score, finished in zip(*of, strict=True)
            if length
        ]
        for of in zip(found.tokens, found.lengths, found.scores, found.finished, strict=True)
    ]


def chains(seed: int, num: int, vocab_size: int) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=(num, vocab_size, vocab_size)) * 2
    logits[..., END] += 2.0  # ends are probable enough for a narrow beam
    return logits


def test_a_search_gives_its_excluded_tokens_to_the_selector():
    likely = chains(0, 1, 6)
    likely[..., 3] += 9.0
    phrases = np.array([[[5, 4]]], np.int32)
    for excluded in ((), (3,)):
        config = BeamSearchConfig(4, 1, 6, START, END, LengthPenalty.parse("none"), excluded=excluded)
        found = compiled(config, True, ())(jnp.asarray(likely), jnp.array([6]), phrases)
        tokens = np.asarray(found.tokens)[np.asarray(found.lengths) > 0]
        assert (3 in tokens) == (excluded == ()) and (5 in tokens)


def test_what_is_held_and_begun_is_what_python_says():
    rng = np.random.default_rng(0)
    tokens, steps = rng.integers(0, 3, (40, 2, 7)), rng.integers(0, 8, 40)
    phrases = [[rng.integers(0, 3, rng.integers(0, 4)).tolist() for _ in range(3)] for _ in range(40)]
    held = contained_phrases(jnp.asarray(tokens), jnp.asarray(steps), padded(phrases))
    tails = np.full((40, 2, 3), NOTHING)
    for row, beam in itertools.product(range(40), range(2)):
        decoded = tokens[row, beam, : steps[row]].tolist()
        tails[row, beam] = ([NOTHING] * 3 + decoded)[-3:]
        for phrase, is_held in zip(phrases[row], held[row, beam].tolist(), strict=True):
            assert is_held == (holds(decoded, phrase) or not phrase)
    ended = begun_phrases(jnp.asarray(tails), padded(phrases))
    for row, beam in itertools.product(range(40), range(2)):
        for phrase, size in zip(phrases[row], ended[row, beam].tolist(), strict=True):
            tail = tails[row, beam].tolist()
            assert size == max(n for n in range(len(phrase) + 1) if n == 0 or tail[-n:] == phrase[:n])


@pytest.mark.parametrize(
    "beams, order",
    [
        (2, [4, 2, 3, 0, 1, 5]),  # fewer places than measures: the highest first
        (3, [4, 2, 0, 3, 1, 5]),  # one each
        (4, [4, 2, 0, 3, 1, 5]),  # two for the highest, which cannot fill them
        (6, [4, 2, 3, 0, 1, 5]),  # two each
    ],
)
def test_measures_share_a_beam(beams, order):
    scores = jnp.array([[-1.0, -2.0, -3.0, -4.0, -5.0, -1e30]])
    measures = jnp.array([[0, 0, 1, 1, 2, 2]])
    assert allocate_beam(scores, measures, jnp.array([2]), beams).tolist() == [order]


def test_outputs_hold_their_phrases_and_keep_the_models_scores():
    wanted = [[[3, 4]], [[5, 2, 5], [4]], [[2], [3], [6, 6]], [[6, 5, 4, 3, 2]], [[2, 3], [3, 4]], []]
    tables = chains(1, len(wanted), 7)
    log_p = np.asarray(jax.nn.log_softmax(tables, axis=-1))
    found, outputs = search(tables, padded(wanted), 4, 14)
    for sentence, (phrases, hypotheses) in enumerate(zip(wanted, outputs, strict=True)):
        finished = [(tokens, score) for tokens, score, is_finished in hypotheses if is_finished]
        assert finished and len({tokens for tokens, _ in finished}) == len(finished)
        for tokens, score in finished:
            assert all(holds(tokens, phrase) for phrase in phrases)
            path = zip((START, *tokens), tokens, strict=False)
            assert score == pytest.approx(sum(log_p[sentence, a, b] for a, b in path), rel=1e-4)
    assert found.finished[:, 0].all()


def test_a_wide_beam_finds_the_best_output_that_holds_the_phrase():
    table, phrase, length = chains(2, 1, 4), [3, 2], 4
    log_p = np.asarray(jax.nn.log_softmax(table[0], axis=-1))
    every = [
        (*body, END)
        for size in range(length)
        for body in itertools.product([0, 2, 3], repeat=size)
        if holds(body, phrase)
    ]
    scores = {tokens: sum(log_p[a, b] for a, b in zip((START, *tokens), tokens, strict=False)) for tokens in every}
    best = sorted(every, key=lambda tokens: -scores[tokens])[:5]
    _, ((*outputs,),) = search(table, padded([[phrase]]), 128, length)
    assert [tokens for tokens, _, _ in outputs[:5]] == best


def test_sentences_that_share_slots_are_as_alone_and_one_without_phrases_is_free():
    wanted = [[[3, 4]], [], [[5]], [[2, 2], [4]], []]
    tables = chains(3, 5, 6)
    together, _ = search(tables, padded(wanted), 3, 10, slots=2)
    for sentence, phrases in enumerate(wanted):
        asked = padded([[*phrases, *[[]] * (2 - len(phrases))]])
        asked = jnp.pad(asked, ((0, 0), (0, 0), (0, 2 - asked.shape[2])), constant_values=ANY)
        alone, _ = search(tables[sentence : sentence + 1], asked, 3, 10, slots=2)
        for name in ("tokens", "lengths", "scores"):
            np.testing.assert_array_equal(getattr(together, name)[sentence], getattr(alone, name)[0])
        if not phrases:
            free, _ = search(tables[sentence : sentence + 1], asked, 3, 10, slots=2, constrained=False)
            np.testing.assert_array_equal(free.lengths, alone.lengths)
            np.testing.assert_allclose(free.scores, alone.scores, rtol=1e-5)


def test_what_does_not_fit_is_unfinished_and_what_is_suppressed_is_not_required():
    table = chains(4, 1, 6)
    _, (cut,) = search(table, padded([[[2, 3, 4, 5]]]), 3, 4)  # no room for the end
    assert cut and not any(finished for _, _, finished in cut)
    _, (suppressed,) = search(table, padded([[[3]]]), 3, 6, suppressed=(3,))
    assert (
        suppressed
        and not any(finished for _, _, finished in suppressed)
        and not any(3 in tokens for tokens, _, _ in suppressed)
    )
