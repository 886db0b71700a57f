"""The search against chains solved by hand, against exhaustive search, and against greedy search.

The step function here is a Markov chain: the logits of the next token depend on the last one alone.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_transformer.decoding.beam_search import BeamSearchConfig, beam_search
from flax_transformer.decoding.beam_state import ScoreAdjustment
from flax_transformer.decoding.candidates import best_candidates
from flax_transformer.decoding.decoder_functions import DecoderFunctions
from flax_transformer.decoding.length_penalty import LengthPenalty
from flax_transformer.decoding.logits_processors import Progress
from flax_transformer.errors import ConfigError
from flax_transformer.shapes import MASKED, array_tree
from tests.chains import END, START, chain_functions, chain_state, outputs

PENALTY_NAMES = ("none", "average:1.0", "average:0.5", "gnmt:0.6")


def float64(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def log_probabilities(table: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.maximum(np.log(table), 10 * MASKED)


@functools.cache
def compiled_search(config: BeamSearchConfig, adjustment: ScoreAdjustment | None):
    """The search over N chains, compiled once for a configuration and shape.

    For a score adjustment the tokens that were read are kept with each hypothesis.
    """
    functions = chain_functions(keep_read=adjustment is not None)

    @jax.jit
    def run(chains, limits):
        state = chain_state(chains, config.num_slots)
        return beam_search(functions, config, state, limits, score_adjustment=adjustment)

    return run


def search(
    logits: np.ndarray,
    beam_size: int,
    max_length: int,
    penalty: str = "none",
    max_lengths=None,
    slots=None,
    adjustment: ScoreAdjustment | None = None,
    **changes,
):
    """Searches a chain given as logits [V, V] (or [N, V, V], one chain a sentence)."""
    chains = jnp.asarray(logits if logits.ndim == 3 else logits[None], jnp.float32)
    limits = jnp.full((chains.shape[0],), max_length) if max_lengths is None else jnp.asarray(max_lengths)
    config = BeamSearchConfig(
        beam_size, slots or len(chains), max_length, START, END, LengthPenalty.parse(penalty), **changes
    )
    return jax.device_get(compiled_search(config, adjustment)(chains, limits))


def divisor(penalty: LengthPenalty, length: int) -> float:
    return {"none": 1.0, "average": length**penalty.exponent, "gnmt": ((5 + length) / 6) ** penalty.exponent}[
        penalty.name
    ]


def exhaustive(logits: np.ndarray, max_length: int, penalty: str) -> list[tuple[tuple[int, ...], float]]:
    """Every output that ends within `max_length`, best first."""
    logits = float64(logits)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rule = LengthPenalty.parse(penalty)
    others = [t for t in range(logits.shape[0]) if t != END]
    found = []
    for length in range(1, max_length + 1):
        for body in itertools.product(others, repeat=length - 1):
            tokens = (*body, END)
            score = sum(log_p[a, b] for a, b in zip((START, *body), tokens, strict=True))
            found.append((tokens, score / divisor(rule, length)))
    return sorted(found, key=lambda item: -item[1])


def plain_search(logits: np.ndarray, beams: int, limit: int, penalty: str, enough: int, stop: str):
    """A search of the same kind in plain Python: what it has found, best first, and how many steps it took.

    By the rule "exact" it looks at every length at which a live hypothesis may still end.
    """
    log_p = float64(logits) - np.log(np.exp(float64(logits)).sum(-1, keepdims=True))
    rule = LengthPenalty.parse(penalty)
    live, finished = [((), 0.0)], []
    for length in range(1, limit + 1):
        candidates = [
            ((*tokens, token), score + log_p[tokens[-1] if tokens else START, token])
            for tokens, score in live
            for token in range(logits.shape[0])
        ]
        candidates = sorted(candidates, key=lambda c: -c[1])[: 2 * beams]
        finished += [(t, s / divisor(rule, length)) for t, s in candidates[:beams] if t[-1] == END]
        live = [c for c in candidates if c[0][-1] != END][:beams]
        finished = sorted(finished, key=lambda f: -f[1])[:beams]
        if len(finished) >= enough:
            lengths = [length] if stop == "heuristic" else range(length + 1, limit + 1)
            reachable = max((score / divisor(rule, at) for _, score in live for at in lengths), default=-np.inf)
            if stop == "first_finished" or reachable <= finished[enough - 1][1]:
                break
    return finished, length


# --- worked by hand

# From the start: a (2) with 0.6, b (3) with 0.4. After a everything is even, after b the end is nearly certain:
#   a c: 0.6 * 0.3 ...    b END: 0.4 * 0.9 = 0.36    a END: 0.6 * 0.4 = 0.24
CHAIN = log_probabilities(
    np.array(
        [
            # START END   a    b
            [0.0, 0.0, 0.6, 0.4],  # after START
            [0.0, 1.0, 0.0, 0.0],  # after END (never read)
            [0.0, 0.4, 0.3, 0.3],  # after a
            [0.0, 0.9, 0.05, 0.05],  # after b
        ]
    )
)


def test_greedy_takes_the_best_first_step_and_beam_two_finds_the_better_sentence():
    (greedy,) = outputs(search(CHAIN, 1, 4))
    assert greedy == ((2, END), pytest.approx(np.log(0.24), abs=1e-5), True)
    first, second = outputs(search(CHAIN, 2, 4))
    assert first == ((3, END), pytest.approx(np.log(0.36), abs=1e-5), True)
    assert second == ((2, END), pytest.approx(np.log(0.24), abs=1e-5), True)


def test_three_beams_solved_by_hand():
    # Third best: a a END = 0.6 * 0.3 * 0.4 = 0.072; a b END = 0.6 * 0.3 * 0.9 = 0.162 is better.
    found = outputs(search(CHAIN, 3, 4))
    assert [tokens for tokens, _, _ in found] == [(3, END), (2, END), (2, 3, END)]
    np.testing.assert_allclose([score for _, score, _ in found], np.log([0.36, 0.24, 0.162]), atol=1e-5)


def test_the_length_penalty_prefers_longer_outputs():
    # Averages: b END ln(.36)/2 = -0.511; a b END ln(.162)/3 = -0.607; a END ln(.24)/2 = -0.714.
    found = outputs(search(CHAIN, 3, 3, "average:1.0"))
    assert [tokens for tokens, _, _ in found] == [(3, END), (2, 3, END), (2, END)]
    np.testing.assert_allclose([s for _, s, _ in found], np.log([0.36, 0.162, 0.24]) / [2, 3, 2], atol=1e-5)


def test_an_output_cut_at_the_limit_is_unfinished_and_behind_the_finished_ones():
    never_ends = log_probabilities(np.array([[0, 0.1, 0.9], [0, 1, 0], [0, 0.01, 0.99]]))
    found = outputs(search(never_ends, 2, 3))
    assert found[0] == ((END,), pytest.approx(np.log(0.1), abs=1e-5), True)
    assert [finished for _, _, finished in found] == [True, True]
    found = outputs(search(never_ends, 1, 3))
    assert found == [((2, 2, 2), pytest.approx(np.log(0.9 * 0.99 * 0.99), abs=1e-5), False)]


def test_sentences_have_their_own_limits_and_padding_rows_give_nothing():
    chain = log_probabilities(np.array([[0, 0.1, 0.9], [0, 1, 0], [0, 0.01, 0.99]]))
    found = search(np.stack([chain] * 3), 1, 5, max_lengths=[2, 5, 0])
    assert outputs(found, 0)[0][0] == (2, 2)
    assert outputs(found, 1)[0][0] == (2, 2, 2, 2, 2)
    assert outputs(found, 2) == []
    assert not found.finished.any()


def test_a_later_better_output_is_waited_for():
    # END at once has 0.5; under "average" the path a END (0.5 * 1.0)^(1/2) scores better and takes a step longer.
    chain = log_probabilities(np.array([[0, 0.5, 0.5], [0, 1, 0], [0, 1.0, 0]]))
    found = outputs(search(chain, 2, 6, "average:1.0"))
    assert found[0] == ((2, END), pytest.approx(np.log(0.5) / 2, abs=1e-5), True)


def test_the_search_stops_as_soon_as_nothing_can_change():
    """The state counts the steps: two are enough here, of a limit of 50."""
    config = BeamSearchConfig(2, 1, 50, START, END, LengthPenalty.parse("none"))
    chain = jnp.asarray(log_probabilities(np.array([[0, 0.01, 0.99], [0, 1, 0], [0, 0.999, 0.001]])), jnp.float32)
    steps_taken = []

    def step(tokens, count):
        jax.debug.callback(steps_taken.append, count)
        return chain[tokens], None, count + 1

    start = jnp.zeros((), jnp.int32)
    functions = DecoderFunctions(step, lambda s, _: s, lambda s, *_: s)
    jax.block_until_ready(jax.jit(functools.partial(beam_search, functions, config))(start, jnp.array([50])))
    jax.effects_barrier()
    # "END" (0.01) finishes in step 1, "a END" (0.989) in step 2, and all that is left has less than 0.001.
    assert len(steps_taken) == 2


@pytest.mark.parametrize("penalty", PENALTY_NAMES)
def test_a_search_that_must_be_sure_takes_as_many_steps_as_a_plain_one(penalty):
    """One slot takes 40 sentences one after the other; the state says which one a step was for."""
    chains = np.random.default_rng(7).normal(size=(40, 4, 4)).astype(np.float32) * 3
    config, taken = BeamSearchConfig(2, 1, 10, START, END, LengthPenalty.parse(penalty)), []

    def step(tokens, slots):
        jax.debug.callback(lambda slot: taken.append(int(slot[0])), slots)
        return jnp.asarray(chains)[slots[:, None], tokens], None, slots

    def refill(slots, fresh, sentences):
        return jnp.where(fresh, sentences, slots)

    start = jnp.zeros((1,), jnp.int32)
    functions = DecoderFunctions(step, lambda s, _: s, refill)
    jax.block_until_ready(jax.jit(functools.partial(beam_search, functions, config))(start, jnp.full((40,), 10)))
    jax.effects_barrier()
    steps = np.bincount(taken, minlength=40).tolist()
    assert steps == [plain_search(chain, 2, 10, penalty, 2, "exact")[1] for chain in chains]
    assert len(set(steps)) >= 5 and sum(count < 10 for count in steps) >= 8


def test_fewer_outputs_than_beams_leave_no_empty_slots_behind():
    chain = log_probabilities(np.array([[0, 1.0, 0.0], [0, 1, 0], [0, 1, 0]]))
    assert outputs(search(chain, 3, 4)) == [((END,), pytest.approx(0.0, abs=1e-6), True)]


# --- properties, on random chains

CHAINS = st.builds(
    lambda seed, vocab: np.random.default_rng(seed).normal(size=(vocab, vocab)).astype(np.float32) * 1.5,
    st.integers(0, 2**32 - 1),
    st.just(4),  # one size, one compilation
)
PENALTIES = st.sampled_from(PENALTY_NAMES)


@settings(max_examples=60, deadline=None)
@given(CHAINS, PENALTIES)
def test_a_beam_as_wide_as_the_space_equals_exhaustive_search(chain, penalty):
    expected = exhaustive(chain, 3, penalty)  # 1 + 3 + 9 outputs
    # 36 beams hold every candidate of the last step: 9 unfinished outputs with 4 extensions each.
    found = [o for o in outputs(search(chain, 36, 3, penalty)) if o[2]]
    assert len(found) == len(expected) == 13
    np.testing.assert_allclose([s for _, s, _ in found], [s for _, s in expected], rtol=1e-4, atol=1e-5)
    assert {t for t, _, _ in found} == {t for t, _ in expected}
    assert found[0][0] == expected[0][0] or found[0][1] == pytest.approx(expected[1][1], abs=1e-4)


@array_tree
@dataclasses.dataclass(frozen=True)
class FewerTwos:
    """A score adjustment that differs from hypothesis to hypothesis, as a coverage penalty does: -0.7 for a token 2."""

    def __call__(self, auxiliary, sentences, lengths):
        decoded = jnp.arange(auxiliary.shape[2])[None, :] < lengths[:, None]
        twos = (auxiliary == 2) & decoded[:, None, :]
        return jnp.sum(jnp.where(twos, jnp.float32(-0.7), jnp.float32(0.0)), axis=2)


@array_tree
@dataclasses.dataclass(frozen=True)
class AllWorse:
    """A score adjustment that is the same for all hypotheses, so it changes nothing of their order."""

    def __call__(self, auxiliary, sentences, lengths):
        return jnp.full((len(lengths), 1), -2.0)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(CHAINS, PENALTIES)
def test_with_a_score_adjustment_the_search_is_as_exact_and_stops_no_sooner(chain, penalty):
    expected = sorted(((t, s - 0.7 * t.count(2)) for t, s in exhaustive(chain, 3, penalty)), key=lambda item: -item[1])
    for awaited in (36, 1):  # of the latter only the first is promised
        found = [o for o in outputs(search(chain, 36, 3, penalty, adjustment=FewerTwos(), num_awaited=awaited)) if o[2]]
        found = found[: 13 if awaited == 36 else 1]
        scores = [s for _, s in expected][: len(found)]
        np.testing.assert_allclose([s for _, s, _ in found], scores, rtol=1e-4, atol=1e-5)
        assert {t for t, _, _ in found} <= {t for t, _ in expected} and len(found) in (1, 13)


@settings(max_examples=100, deadline=None)
@given(CHAINS, PENALTIES)
def test_one_beam_is_greedy(chain, penalty):
    tokens, last = [], START
    while len(tokens) < 6 and last != END:
        last = int(np.argmax(chain[last]))
        tokens.append(last)
    (found,) = outputs(search(chain, 1, 6, penalty))
    assert found[0] == tuple(tokens)
    assert found[2] == (last == END)


@settings(max_examples=60, deadline=None)
@given(CHAINS, PENALTIES)
def test_results_are_sorted_unique_and_scored_as_they_say(chain, penalty):
    log_p = float64(chain) - np.log(np.exp(float64(chain)).sum(-1, keepdims=True))
    rule = LengthPenalty.parse(penalty)
    found = outputs(search(chain, 3, 8, penalty))
    assert len({t for t, _, _ in found}) == len(found)
    assert [f for _, _, f in found] == sorted((f for _, _, f in found), reverse=True)
    for group in (True, False):
        scores = [s for _, s, f in found if f == group]
        assert scores == sorted(scores, reverse=True)
    for tokens, score, finished in found:
        assert (tokens[-1] == END) == finished and END not in tokens[:-1]
        total = sum(log_p[a, b] for a, b in zip((START, *tokens[:-1]), tokens, strict=True))
        assert score == pytest.approx(total / divisor(rule, len(tokens)), rel=1e-4, abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(CHAINS, PENALTIES)
def test_stopping_early_changes_nothing(chain, penalty):
    """Against the plain search, which never stops before the limit here."""
    expected, _ = plain_search(chain, 3, 8, penalty, 1_000, "first_finished")
    found = [o for o in outputs(search(chain, 3, 8, penalty)) if o[2]]
    np.testing.assert_allclose([s for _, s, _ in found], [s for _, s in expected], rtol=1e-4, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(CHAINS, PENALTIES)
def test_the_rules_first_finished_and_heuristic_stop_where_a_plain_search_does(chain, penalty):
    """Each two of rule, number of awaited hypotheses and penalty meet."""
    numbers = (3, 1) if PENALTY_NAMES.index(penalty) % 2 else (1, 3)
    for stop, enough in zip(("first_finished", "heuristic"), numbers, strict=True):
        expected, _ = plain_search(chain, 3, 8, penalty, enough, stop)
        found = [o for o in outputs(search(chain, 3, 8, penalty, stop=stop, num_awaited=enough)) if o[2]]
        np.testing.assert_allclose([s for _, s, _ in found], [s for _, s in expected], rtol=1e-4, atol=1e-5)


def test_only_the_rule_exact_waits_for_every_later_better_output():
    stops = ("first_finished", "heuristic", "exact")
    # After two steps END, ln(.4) = -0.92, and a END, ln(.06)/2 = -1.41, are there; a a, ln(.54)/2 = -0.31, may go on.
    chain = log_probabilities(np.array([[0, 0.4, 0.6], [0, 1, 0], [0, 0.1, 0.9]]))
    found = [outputs(search(chain, 2, 6, "average:1.0", stop=stop))[0][0] for stop in stops]
    assert found == [(END,), (2, 2, 2, 2, 2, END), (2, 2, 2, 2, 2, END)]  # ln(.039)/6 = -0.54
    # END, ln(.5) = -0.69, and a END, ln(.3)/2 = -0.60, are better than a b as it is, ln(.2)/2 = -0.80.
    table = [[0, 0.5, 0.5, 0], [0, 1, 0, 0], [0, 0.6, 0, 0.4], [0, 0.1, 0, 0.9]]
    chain = log_probabilities(np.array(table))
    found = [outputs(search(chain, 2, 12, "average:1.0", stop=stop))[0][0] for stop in stops]
    assert found == [(2, END), (2, END), (2, *[3] * 10, END)]  # ln(.5 * .4 * .9 ** 9 * .1)/12 = -0.41

    worse = search(chain, 2, 12, "average:1.0", stop="heuristic", adjustment=AllWorse())
    assert outputs(worse)[0][0] == (2, END)


def test_sentences_do_not_influence_one_another():
    rng = np.random.default_rng(0)
    chains = rng.normal(size=(6, 5, 5)).astype(np.float32)
    limits = [3, 7, 5, 7, 2, 6]
    together = search(chains, 3, 7, "gnmt:0.6", limits)
    order = [4, 2, 0, 5, 1, 3]
    shuffled = search(chains[order], 3, 7, "gnmt:0.6", [limits[i] for i in order])
    for place, sentence in enumerate(order):
        assert outputs(together, sentence) == outputs(shuffled, place)


@pytest.mark.parametrize("slots, refill_at", [(1, 1), (2, 1), (3, 2), (4, 4)])
def test_sentences_that_share_slots_are_as_alone(slots, refill_at):
    """More sentences than slots: each is put in when another is done, and what it finds is the same to the bit."""
    rng = np.random.default_rng(1)
    chains = rng.normal(size=(11, 5, 5)).astype(np.float32)
    limits = [3, 7, 5, 7, 2, 6, 1, 4, 7, 0, 0]
    alone = search(chains, 3, 7, "gnmt:0.6", limits)
    shared = search(chains, 3, 7, "gnmt:0.6", limits, slots=slots, refill_at=refill_at)
    for sentence in range(len(chains)):
        assert outputs(shared, sentence) == outputs(alone, sentence)
    assert outputs(shared, 9) == []


def test_a_slot_costs_nothing_once_its_sentence_is_done():
    """Of nine sentences eight end at once and one goes on for 40 steps: three slots need hardly more than 40."""
    short = log_probabilities(np.array([[0, 1.0, 0.0], [0, 1, 0], [0, 1, 0]]))
    long = log_probabilities(np.array([[0, 0.0, 1.0], [0, 1, 0], [0, 0.001, 0.999]]))
    chains = jnp.asarray(np.stack([long] + [short] * 8), jnp.float32)
    config = BeamSearchConfig(1, 3, 40, START, END, LengthPenalty.parse("none"))
    steps_taken = []

    def step(tokens, slots):
        jax.debug.callback(lambda _: steps_taken.append(1), tokens)
        return jax.vmap(lambda chain, row: jnp.take(chain, row, axis=0))(chains[slots], tokens), None, slots

    def refill(slots, fresh, sentences):
        return jnp.where(fresh, sentences, slots)

    start = jnp.zeros((3,), jnp.int32)
    functions = DecoderFunctions(step, lambda s, _: s, refill)
    found = jax.device_get(jax.jit(functools.partial(beam_search, functions, config))(start, jnp.full((9,), 40)))
    jax.effects_barrier()
    assert len(steps_taken) <= 42
    assert [len(outputs(found, n)[0][0]) for n in range(9)] == [40] + [1] * 8


@pytest.mark.slow
def test_a_search_that_awaits_fewer_stops_sooner_and_is_still_exact_for_those():
    """The first outputs are those of the usual search, which waits for all four beams."""
    rng = np.random.default_rng(5)
    chains = rng.normal(size=(30, 6, 6)).astype(np.float32)
    usual = search(chains, 4, 12, "average:1.0")
    for awaited in (1, 2):
        found = search(chains, 4, 12, "average:1.0", num_awaited=awaited)
        for n in range(30):
            assert outputs(found, n)[:awaited] == outputs(usual, n)[:awaited]
    steps = {}
    for awaited in (1, 4):
        taken: list[int] = []

        def step(tokens, slots, taken=taken):
            jax.debug.callback(lambda _: taken.append(1), tokens)
            rows = jax.vmap(lambda chain, row: jnp.take(chain, row, axis=0))(jnp.asarray(chains)[slots], tokens)
            return rows, None, slots

        config = BeamSearchConfig(4, 1, 12, START, END, LengthPenalty.parse("none"), num_awaited=awaited)  # one by one
        limits, start = jnp.full((30,), 12), jnp.zeros((1,), jnp.int32)
        functions = DecoderFunctions(step, lambda s, _: s, lambda s, f, n: jnp.where(f, n, s))
        jax.block_until_ready(jax.jit(functools.partial(beam_search, functions, config))(start, limits))
        jax.effects_barrier()
        steps[awaited] = len(taken)
    assert steps[1] < steps[4]


def test_token_scores_add_up_to_the_score():
    rng = np.random.default_rng(2)
    found = search(rng.normal(size=(8, 5, 5)).astype(np.float32), 3, 6, "average:1.0")
    for sentence in range(8):
        for beam, (tokens, score, _) in enumerate(outputs(found, sentence)):
            total = found.log_probs[sentence, beam, : len(tokens)].sum()
            assert score == pytest.approx(total / len(tokens), rel=1e-5)


def test_beams_carry_their_own_state():
    """The chain looks two tokens back, through the state: a state that is not reordered gives other scores."""
    rng = np.random.default_rng(3)
    vocab, limit, beams = 4, 5, 4
    table = jnp.asarray(rng.normal(size=(vocab, vocab, vocab)), jnp.float32)  # [before last, last, next]
    config = BeamSearchConfig(beams, 1, limit, START, END, LengthPenalty.parse("none"))

    def step(tokens, before):
        return table[before, tokens], {"token": tokens}, tokens

    def reorder(before, parents):
        return jnp.take_along_axis(before, parents, axis=1)

    start = jnp.zeros((1, beams), jnp.int32)
    functions = DecoderFunctions(step, reorder, lambda s, *_: s)
    found = jax.device_get(jax.jit(functools.partial(beam_search, functions, config))(start, jnp.array([limit])))
    log_p = np.asarray(jax.nn.log_softmax(table), np.float64)
    for tokens, score, _ in outputs(found):
        padded = (START, START, *tokens)
        total = sum(log_p[padded[i], padded[i + 1], padded[i + 2]] for i in range(len(tokens)))
        assert score == pytest.approx(total, rel=1e-4)
    # What the step gives beside each token follows its hypothesis: here, the token that was read.
    for beam, (tokens, _, _) in enumerate(outputs(found)):
        assert found.auxiliary["token"][0, beam, : len(tokens)].tolist() == [START, *tokens[:-1]]


def test_ties_go_to_the_lower_beam_and_token():
    progress = Progress(jnp.zeros((1, 2, 1), jnp.int32), jnp.zeros((1,), jnp.int32), jnp.zeros((1,), jnp.int32))
    found = best_candidates(jnp.zeros((1, 2)), jnp.zeros((1, 2, 3)), 4, progress, ())
    np.testing.assert_allclose(found.scores, np.full((1, 4), np.log(1 / 3)), rtol=1e-6)
    np.testing.assert_array_equal(found.parents, [[0, 0, 0, 1]])
    np.testing.assert_array_equal(found.tokens, [[0, 1, 2, 0]])


# --- bad input


@pytest.mark.parametrize(
    "text, message",
    [
        ("gmnt:0.6", "unknown length penalty 'gmnt:0.6'. Did you mean 'gnmt'"),
        ("gnmt", "needs an exponent of at least 0 after a colon, such as 'gnmt:0.6'"),
        ("average:-1", "needs an exponent of at least 0"),
        ("average:nan", "needs an exponent of at least 0"),
        ("none:1", "takes no exponent"),
    ],
)
def test_bad_length_penalties_are_explained(text, message):
    with pytest.raises(ConfigError, match=message):
        LengthPenalty.parse(text)


def test_bad_sizes_are_explained():
    with pytest.raises(ConfigError, match="beam_size must be at least 1, got 0"):
        BeamSearchConfig(0, 1, 5, START, END, LengthPenalty.parse("none"))
    with pytest.raises(ConfigError, match=r"num_awaited must lie between 1 and beam_size \(2\), got 3"):
        BeamSearchConfig(2, 1, 5, START, END, LengthPenalty.parse("none"), num_awaited=3)
