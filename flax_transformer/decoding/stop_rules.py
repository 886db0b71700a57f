"""When the search of a sentence may stop, and the scores that decide it.

A sentence stops if it has the finished hypotheses that it waits for, and its rule allows it:
    exact: no live hypothesis can still beat the worst of these. An upper bound of its final score is known: a
        log-probability never rises, the score adjustment is never positive, and the divisor is monotone.
    heuristic: no live hypothesis beats the worst of these, if it is scored at its present length.
    first_finished: always. A live hypothesis may still become better.

Legend: B slots, K beams, M hypotheses.

References:
    Rule `exact`: Huang, Zhao and Ma 2017. Rule `first_finished`: Kasai et al. 2022, with a patience of 1.
"""

from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flax_transformer.decoding.beam_state import BeamState
from flax_transformer.decoding.length_penalty import LengthPenalty
from flax_transformer.shapes import MASKED

StopRule = Literal["exact", "heuristic", "first_finished"]


def final_scores(
    state: BeamState, penalty: LengthPenalty, log_probs: Float[Array, "B M"], auxiliary: Any, lengths: Int[Array, "B"]
) -> Float[Array, "B M"]:
    """Returns the scores that rank hypotheses: log-probabilities, divided by the length penalty and adjusted.

    Args:
        state: of the search; its request has the adjustment.
        penalty: the length penalty.
        log_probs: sums over the tokens of M hypotheses of each slot.
        auxiliary: values beside their tokens, a tree of [B, M, T, ...].
        lengths: number of tokens of each slot's hypotheses, at least 1.
    """
    scores, adjustment = log_probs / penalty.divisor(lengths)[:, None], state.request.score_adjustment
    return scores if adjustment is None else scores + adjustment(auxiliary, state.sentences, lengths)


def is_undecided(
    state: BeamState, limits: Int[Array, "B"], penalty: LengthPenalty, rule: StopRule, num_awaited: int
) -> Bool[Array, "B"]:
    """Returns which slots must go on by the rule.

    Args:
        state: after a step.
        limits: maximum lengths of the slots' sentences, end token included.
        penalty: the length penalty.
        rule: the stop rule.
        num_awaited: number of finished hypotheses that a sentence waits for, at most K.
    """
    awaited = state.finished.scores[:, num_awaited - 1]
    if rule == "first_finished" or state.live.scores.shape[1] == 1:  # greedy search stops at its first
        return awaited < MASKED / 2  # False if the place is taken, and for NaN
    if rule == "heuristic":
        live, lengths = state.live, jnp.maximum(state.steps, 1)
        return jnp.max(final_scores(state, penalty, live.scores, live.buffer.auxiliary, lengths), axis=1) > awaited
    return best_reachable(state.live.scores, state.steps, limits, penalty) > awaited


def best_reachable(
    live_scores: Float[Array, "B K"], steps: Int[Array, "B"], max_lengths: Int[Array, "B"], penalty: LengthPenalty
) -> Float[Array, "B"]:
    """Returns an upper bound of the final score of any live hypothesis, for each slot.

    A log-probability can only fall, and it is not positive. So the bound is the highest log-probability divided by the
    largest divisor that is still possible. A monotone divisor is largest for the shortest or for the longest output.
    """
    best = jnp.max(live_scores, axis=1)
    return best / jnp.maximum(penalty.divisor(steps + 1), penalty.divisor(max_lengths))
