"""Sampling, against the distribution."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer.decoding.hypotheses import Hypotheses
from flax_transformer.decoding.length_penalty import LengthPenalty
from flax_transformer.decoding.sampling import SamplingConfig, TokenSampling, keep_probable, sample
from flax_transformer.errors import ConfigError
from flax_transformer.shapes import MASKED, array_tree
from tests.chains import END, START, outputs, table_functions

VOCAB = 6
NONE = LengthPenalty.parse("none")


def draw(
    chain, seeds, num: int, processors=(), max_length: int = 6, penalty=NONE, excluded: tuple[int, ...] = ()
) -> Hypotheses:
    seeds = jnp.asarray(seeds, jnp.int32)
    config = SamplingConfig(num, max_length, START, END, penalty, excluded=excluded)

    @jax.jit
    def run(chain, seeds):
        limits = jnp.full(seeds.shape, max_length)
        return sample(table_functions(chain), config, None, limits, seeds, processors)

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


def test_excluded_tokens_are_never_drawn():
    """The others are drawn by their own probabilities, which are not normalised again."""
    chain = np.zeros((5, 5))
    chain[:, 3] = 9.0
    found = draw(chain, [7], 200, excluded=(3, 4))
    drawn = outputs(found)
    assert {token for tokens, _, _ in drawn for token in tokens} == {0, END, 2}
    (score,) = {score for tokens, score, _ in drawn if tokens == (END,)}
    assert score == pytest.approx(-np.log(4 + np.exp(9.0)), rel=1e-6)


@array_tree
@dataclasses.dataclass(frozen=True)
class NothingAfterThree:
    """What begins with 3 has no token to go on with."""

    def __call__(self, log_probs, progress):
        stuck = (progress.tokens[:, :, 0] == 3) & (progress.steps >= 1)[:, None]
        return jnp.where(stuck[:, :, None], MASKED, log_probs)


@pytest.mark.parametrize("penalty", ["none", "gnmt:3.0", "average:1.0"])
def test_a_sample_that_no_token_is_left_for_is_no_output(penalty):
    """What begins with 3 is stuck; what begins with 2 has 2 and the end."""
    chain = np.full((4, 4), MASKED)
    chain[START, [2, 3]] = np.log(0.5)
    chain[2, [2, END]] = chain[3, [2, END]] = np.log(0.5)
    found = draw(chain, [5], 64, processors=[NothingAfterThree()], penalty=LengthPenalty.parse(penalty))
    there = found.lengths[0] > 0
    num = there.sum()  # at random: 1 in 2^63 that all are alike
    assert 0 < num < 64 and there[:num].all() and (found.tokens[0, :, 0] == np.where(there, 2, 3)).all()
    assert (found.scores[0, :num] > -100).all() and (np.diff(found.scores[0, found.finished[0]]) <= 0).all()
    assert (found.scores[0, num:] == np.float32(MASKED)).all() and not found.finished[0, num:].any()
    # The others are what is drawn without the processor.
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
        (TokenSampling(), {0, 1, 2, 3}),
        (TokenSampling(top_k=2), {0, 1}),
        (TokenSampling(top_k=9), {0, 1, 2, 3}),
        (TokenSampling(top_p=0.5), {0}),
        (TokenSampling(top_p=0.51), {0, 1}),
        (TokenSampling(min_p=0.5), {0, 1}),
        (TokenSampling(temperature=0.1, min_p=0.1), {0}),
        (TokenSampling(temperature=10.0, min_p=0.5), {0, 1, 2, 3}),
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
        TokenSampling(**values)


def test_bad_sizes_are_explained():
    with pytest.raises(ConfigError, match="num_samples must be at least 1, got 0"):
        SamplingConfig(0, 6, START, END, NONE)
