"""Beam search in one `lax.while_loop`, over a decode step that it knows nothing about.

The search is given two functions: a step from tokens and a state to logits and a new state, and one that reorders a
state's beams. Tests give it a Markov chain; inference gives it a model. All shapes are fixed; sentences have their own
maximum lengths and stop on their own, so nothing of a sentence's result depends on the others in the batch.

What it promises:
    - A candidate finishes only when it ranks among the best K candidates of its step. A beam of 1 is greedy search: it
      ends with its first finished hypothesis.
    - A sentence stops as soon as K hypotheses are finished and no unfinished one can still beat the worst of them: a
      log-probability never rises, and the length penalty's divisor is monotone, so the best score that a live
      hypothesis can still reach is known.
    - Hypotheses that reach the maximum length are returned as unfinished, behind the finished ones.

Legend: B sentences, K beams, V vocabulary, T maximum length.

References:
    Graves 2012, section 2.5, and Wu et al. 2016, section 7, for the search; Huang, Zhao and Ma 2017 for when to stop.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from flax_transformer.decoding.hypotheses import Hypotheses
from flax_transformer.decoding.length_penalty import LengthPenalty
from flax_transformer.errors import ConfigError
from flax_transformer.shapes import MASKED, array_tree

Step = Callable[[Int[Array, "B K"], Any], tuple[Float[Array, "B K V"], Any]]
Reorder = Callable[[Any, Int[Array, "B K"]], Any]


@dataclass(frozen=True)
class BeamSearchConfig:
    """Everything static about a search.

    Attributes:
        beam_size: hypotheses kept at each step, K.
        max_length: tokens of a hypothesis at most, end token included, T; sentences may have lower limits of their own.
        start_token: what the first step reads.
        end_token: what closes a hypothesis.
        length_penalty: how scores of different lengths are compared.
    """

    beam_size: int
    max_length: int
    start_token: int
    end_token: int
    length_penalty: LengthPenalty

    def __post_init__(self):
        for name in ("beam_size", "max_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")


@array_tree
@dataclasses.dataclass(frozen=True)
class BeamState:
    """Everything dynamic about a search. Live hypotheses are unfinished and sorted; scores of empty slots are MASKED.

    Attributes:
        step: tokens decoded so far.
        active: [B], False once nothing can change for a sentence.
        live_tokens: [B, K, T].
        live_scores: [B, K], log-probabilities.
        finished_tokens: [B, K, T], sorted by score.
        finished_lengths: [B, K], 0 for an empty slot.
        finished_scores: [B, K], log-probabilities divided by the length penalty.
        decoder: the state of the step function, for the live hypotheses.
    """

    step: Int[Array, ""]
    active: Bool[Array, "B"]
    live_tokens: Int[Array, "B K T"]
    live_scores: Float[Array, "B K"]
    finished_tokens: Int[Array, "B K T"]
    finished_lengths: Int[Array, "B K"]
    finished_scores: Float[Array, "B K"]
    decoder: Any


def gather_beams(x: Shaped[Array, "B K *rest"], chosen: Int[Array, "B M"]) -> Shaped[Array, "B M *rest"]:
    """Returns, for each sentence, the entries `chosen` of the second axis. [[a b c]] with [[2 0]] gives [[c a]]."""
    index = chosen.reshape(*chosen.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)


def best_candidates(
    live_scores: Float[Array, "B K"], logits: Float[Array, "B K V"], num: int
) -> tuple[Float[Array, "B M"], Int[Array, "B M"], Int[Array, "B M"]]:
    """Returns the `num` best extensions of all beams: log-probabilities, parent beams, tokens; best first.

    The best of each beam are taken first, then the best of those: log-probabilities are made for the few that survive,
    not for the vocabulary. Ties go to the lower beam, then to the lower token.
    """
    per_beam = min(num, logits.shape[-1])
    top_logits, top_tokens = jax.lax.top_k(logits, per_beam)  # [B, K, per_beam]
    log_normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    scores = live_scores[:, :, None] + (top_logits - log_normaliser)
    scores = jnp.where(top_logits > MASKED / 2, scores, MASKED)  # a banned token is no candidate
    best, flat = jax.lax.top_k(scores.reshape(scores.shape[0], -1), num)  # [B, K * per_beam] -> [B, num]
    return best, flat // per_beam, jnp.take_along_axis(top_tokens.reshape(flat.shape[0], -1), flat, axis=1)


def best_reachable(
    live_scores: Float[Array, "B K"], step: Int[Array, ""], max_lengths: Int[Array, "B"], penalty: LengthPenalty
) -> Float[Array, "B"]:
    """Returns the best score that any live hypothesis of each sentence can still finish with.

    A log-probability can only fall, and it is not positive, so the bound is the one now, divided by the largest divisor
    among the lengths still possible; a monotone divisor is largest at one end of them.
    """
    best = jnp.max(live_scores, axis=1)
    divisor = jnp.maximum(penalty.divisor(jnp.broadcast_to(step + 1, max_lengths.shape)), penalty.divisor(max_lengths))
    return best / divisor


def beam_search(
    step: Step, reorder: Reorder, decoder: Any, max_lengths: Int[Array, "B"], config: BeamSearchConfig
) -> Hypotheses:
    """Returns the K best outputs of each sentence.

    Args:
        step: maps the last tokens [B, K] and a state to logits [B, K, V] for the next ones and the state after them.
        reorder: maps a state and parents [B, K] to the state whose beam k is beam parents[b, k] of the old one.
        decoder: the state before the first token, with K beams.
        max_lengths: most tokens of each sentence's output, end token included, at most `config.max_length`; 0 makes a
            row of padding, which gives no hypothesis and costs no step.
        config: everything static.
    """
    num_sentences = max_lengths.shape[0]
    beams, length, penalty = config.beam_size, config.max_length, config.length_penalty

    def advance(state: BeamState) -> BeamState:
        # --- 1. score every extension of every live hypothesis
        previous = jax.lax.dynamic_index_in_dim(
            state.live_tokens, jnp.maximum(state.step - 1, 0), axis=2, keepdims=False
        )
        previous = jnp.where(state.step == 0, config.start_token, previous)
        logits, decoder = step(previous, state.decoder)
        scores, parents, tokens = best_candidates(state.live_scores, logits, 2 * beams)
        sequences = jax.lax.dynamic_update_index_in_dim(
            gather_beams(state.live_tokens, parents), tokens, state.step, axis=2
        )  # [B, 2K, T]
        ends = tokens == config.end_token

        # --- 2. those that end and rank among the best K join the finished ones
        may_finish = ends & (jnp.arange(2 * beams) < beams)[None, :] & (scores > MASKED / 2)
        new_length = jnp.broadcast_to(state.step + 1, scores.shape)
        normalised = jnp.where(may_finish, scores / penalty.divisor(new_length), MASKED)
        all_scores = jnp.concatenate([state.finished_scores, normalised], axis=1)  # [B, 3K], old ones first in a tie
        finished_scores, kept = jax.lax.top_k(all_scores, beams)
        all_lengths = jnp.concatenate([state.finished_lengths, jnp.where(may_finish, new_length, 0)], axis=1)
        finished_lengths = gather_beams(all_lengths, kept)
        finished_tokens = gather_beams(jnp.concatenate([state.finished_tokens, sequences], axis=1), kept)

        # --- 3. the best K that do not end live on
        live_scores, alive = jax.lax.top_k(jnp.where(ends, MASKED, scores), beams)
        live_tokens = gather_beams(sequences, alive)
        decoder = reorder(decoder, gather_beams(parents, alive))

        # --- 4. a sentence that is done keeps what it has
        new = BeamState(
            state.step + 1, state.active, live_tokens, live_scores, finished_tokens, finished_lengths, finished_scores,
            decoder,
        )  # fmt: skip
        return freeze(state, new)

    def freeze(old: BeamState, new: BeamState) -> BeamState:
        """Returns `new` with the hypotheses of inactive sentences as they were, and `active` brought up to date."""

        def keep(name):
            before, after = getattr(old, name), getattr(new, name)
            return jnp.where(old.active.reshape(-1, *(1,) * (before.ndim - 1)), after, before)

        names = ("live_tokens", "live_scores", "finished_tokens", "finished_lengths", "finished_scores")
        kept = dataclasses.replace(new, **{name: keep(name) for name in names})
        bound = best_reachable(kept.live_scores, kept.step, max_lengths, penalty)
        undecided = bound > jnp.min(kept.finished_scores, axis=1)  # MASKED while a slot is empty
        if beams == 1:  # greedy: a longer hypothesis might score better after the penalty, but is not looked for
            undecided = kept.finished_scores[:, 0] < MASKED / 2
        some_live = jnp.max(kept.live_scores, axis=1) > MASKED / 2
        return dataclasses.replace(kept, active=old.active & undecided & some_live & (kept.step < max_lengths))

    shape = (num_sentences, beams)
    nothing = jnp.full(shape, MASKED, jnp.float32)
    padding = jnp.full((*shape, length), config.end_token, jnp.int32)
    start = BeamState(
        step=jnp.zeros((), jnp.int32),
        active=max_lengths > 0,
        live_tokens=padding,
        live_scores=jnp.broadcast_to(jnp.where(jnp.arange(beams) == 0, 0.0, MASKED), shape),  # one hypothesis, empty
        finished_tokens=padding,
        finished_lengths=jnp.zeros(shape, jnp.int32),
        finished_scores=nothing,
        decoder=decoder,
    )
    # Two steps an iteration: the second writes its caches where the first has read its own, so that no cache is copied.
    # A step beyond the last one changes nothing, since no sentence is active.
    final = jax.lax.while_loop(lambda state: jnp.any(state.active), lambda state: advance(advance(state)), start)
    return collect(final, max_lengths, penalty)


def collect(state: BeamState, max_lengths: Int[Array, "B"], penalty: LengthPenalty) -> Hypotheses:
    """Returns the K best: the finished hypotheses, then the live ones that were cut at the maximum length."""
    beams = state.live_scores.shape[1]
    lengths = jnp.broadcast_to(max_lengths[:, None], state.live_scores.shape)
    there = (state.live_scores > MASKED / 2) & (lengths > 0)
    live_scores = jnp.where(there, state.live_scores / penalty.divisor(jnp.maximum(lengths, 1)), MASKED)
    scores = jnp.concatenate([state.finished_scores, live_scores], axis=1)  # [B, 2K]
    finished = jnp.concatenate([state.finished_lengths > 0, jnp.zeros_like(there)], axis=1)
    # Finished before unfinished, by score within each: a stable sort by two keys.
    order = jnp.lexsort((-scores, ~finished), axis=-1)[:, :beams]
    all_lengths = jnp.concatenate([state.finished_lengths, jnp.where(there, lengths, 0)], axis=1)
    all_tokens = jnp.concatenate([state.finished_tokens, state.live_tokens], axis=1)
    return Hypotheses(
        gather_beams(all_tokens, order), gather_beams(all_lengths, order), gather_beams(scores, order),
        gather_beams(finished, order),
    )  # fmt: skip
