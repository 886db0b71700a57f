"""Beam search inside XLA, over a decode step that it knows nothing about.

The search is given functions: a step from tokens and a state to logits and a new state, one that reorders a state's
beams, and one that puts sentences into slots of a state. Tests give it a Markov chain; inference gives it a model.

Slots. A program searches N sentences in B slots. A sentence that is done leaves its slot, and the next one is put in
its place while the others go on, so that a slot costs a step only for a sentence that needs it. All shapes are fixed
and every slot has its own position and limits: nothing of a sentence's result depends on its slot, on when it came, or
on the others.

What it promises:
    - A candidate finishes only when it ranks among the best K candidates of its step. A beam of 1 is greedy search: it
      ends with its first finished hypothesis.
    - A sentence stops as soon as enough hypotheses are finished (K, or a share of them) and no unfinished one can still
      beat the worst of them: a log-probability never rises, the bonus is never positive, and the length penalty's
      divisor is monotone, so the best score that a live hypothesis can still reach is known. That is the stop rule
      "sure". By the rule "likely" it stops as soon as enough are finished and no unfinished one, scored as it stands,
      beats the worst of them; by "finished" as soon as enough are finished. A longer one might be better then.
    - Hypotheses that reach the maximum length are returned as unfinished, behind the finished ones.

Legend: N sentences, B slots, K beams, M candidates, V vocabulary, T maximum length.

References:
    Graves 2012, section 2.5, and Wu et al. 2016, section 7, for the search; Huang, Zhao and Ma 2017 for when to stop
    surely; Kasai et al. 2022 for stopping at K finished hypotheses ("first come, first served") and for a patience,
    though theirs may be above 1, which waits for more than K.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from flax_transformer.decoding.hypotheses import Hypotheses
from flax_transformer.decoding.length_penalty import LengthPenalty
from flax_transformer.decoding.rules import Progress, Rule
from flax_transformer.errors import ConfigError
from flax_transformer.ops.vocabulary import best_of_vocabulary, log_probabilities, sum_of_exponentials
from flax_transformer.shapes import MASKED, array_tree

# (last tokens [B, K], state) -> logits [B, K, V], extras to keep beside the token (tree of [B, K, ...], or None), state
Step = Callable[[Int[Array, "B K"], Any], tuple[Float[Array, "B K V"], Any, Any]]
# (state, parents [B, K]) -> the state whose beam k is beam parents[b, k] of the old one
Reorder = Callable[[Any, Int[Array, "B K"]], Any]
# (state, which slots [B], sentences [B]) -> the state with those slots at the start of those sentences
Refill = Callable[[Any, Bool[Array, "B"], Int[Array, "B"]], Any]
# (extras of M hypotheses [B, M, T, ...], sentences [B], lengths [B]) -> what is added to their scores, at most 0
Bonus = Callable[[Any, Int[Array, "B"], Int[Array, "B"]], Float[Array, "B M"]]
# (log-probabilities [B, K] of the beams, logits [B, K, V], M, progress, rules) -> scores, parents, tokens and token
# log-probabilities of M candidates [B, M], in the order in which they are taken; MASKED scores are no candidates
Candidates = Callable[
    [Float[Array, "B K"], Float[Array, "B K V"], int, Progress, Sequence[Rule]],
    tuple[Float[Array, "B M"], Int[Array, "B M"], Int[Array, "B M"], Float[Array, "B M"]],
]

StopRule = Literal["sure", "likely", "finished"]


def num_awaited(beam_size: int, patience: float) -> int:
    """Returns how many finished hypotheses a search of one sentence waits for."""
    return math.ceil(beam_size * patience)


@dataclass(frozen=True)
class BeamSearchConfig:
    """Everything static about a search.

    Attributes:
        beam_size: hypotheses kept at each step, K.
        num_slots: sentences searched at the same time, B.
        max_length: tokens of a hypothesis at most, end token included, T; sentences may have lower limits of their own.
        start_token: what the first step reads.
        end_token: what closes a hypothesis.
        length_penalty: how scores of different lengths are compared.
        stop: when a sentence stops: once its finished hypotheses are "sure" to stay, "likely" to, or just "finished".
        patience: how many finished hypotheses that takes, as a share of the beam. When they must be sure, all K are the
            best that the search can find with 1, and the first is with 1/K.
        refill_at: slots that stand empty before they are refilled, while there are sentences left.
    """

    beam_size: int
    num_slots: int
    max_length: int
    start_token: int
    end_token: int
    length_penalty: LengthPenalty
    stop: StopRule = "sure"
    patience: float = 1.0
    refill_at: int = 1

    def __post_init__(self):
        for name in ("beam_size", "num_slots", "max_length", "refill_at"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 < self.patience <= 1:
            raise ConfigError(
                f"patience must be above 0 and at most 1, got {self.patience}: no more hypotheses are kept than the "
                "beam holds."
            )
        if self.refill_at > self.num_slots:
            raise ConfigError(f"refill_at ({self.refill_at}) is more than all of the {self.num_slots} slots.")

    @property
    def num_awaited(self) -> int:
        """Finished hypotheses that are waited for."""
        return num_awaited(self.beam_size, self.patience)


@array_tree
@dataclasses.dataclass(frozen=True)
class BeamState:
    """Everything dynamic about a search. Live hypotheses are unfinished; scores of empty places are MASKED.

    Attributes:
        next_sentence: the first that has not been in a slot yet.
        sentences: [B], which one is in each slot; N in an empty one.
        steps: [B], tokens decoded so far.
        active: [B], False once nothing can change for a slot.
        live: [B, K] hypotheses.
        live_scores: [B, K], log-probabilities.
        finished: [B, K] hypotheses, sorted by score.
        finished_lengths: [B, K], 0 for an empty place.
        finished_scores: [B, K], as they are ranked.
        decoder: the state of the step function, for the live hypotheses.
        results: of the sentences that are done, [N + 1, ...]; the last row is never read.
    """

    next_sentence: Int[Array, ""]
    sentences: Int[Array, "B"]
    steps: Int[Array, "B"]
    active: Bool[Array, "B"]
    live: "Record"
    live_scores: Float[Array, "B K"]
    finished: "Record"
    finished_lengths: Int[Array, "B K"]
    finished_scores: Float[Array, "B K"]
    decoder: Any
    results: Hypotheses


@array_tree
@dataclasses.dataclass(frozen=True)
class Record:
    """What is kept of M hypotheses for each of their tokens.

    Attributes:
        tokens: [B, M, T].
        log_probs: [B, M, T].
        extras: tree of [B, M, T, ...].
    """

    tokens: Int[Array, "B M T"]
    log_probs: Float[Array, "B M T"]
    extras: Any


def gather_beams(x: Shaped[Array, "B K *rest"], chosen: Int[Array, "B M"]) -> Shaped[Array, "B M *rest"]:
    """Returns, for each slot, the entries `chosen` of the second axis. [[a b c]] with [[2 0]] gives [[c a]]."""
    index = chosen.reshape(*chosen.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)


def _gather(record: Record, chosen: Int[Array, "B M"]) -> Record:
    return jax.tree.map(lambda x: gather_beams(x, chosen), record)


def _join(first: Record, second: Record) -> Record:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), first, second)


def _choose(condition: Bool[Array, "B"], new: Any, old: Any) -> Any:
    """Returns a tree with the rows of `new` where the condition holds, and those of `old` elsewhere."""
    return jax.tree.map(lambda a, b: jnp.where(condition.reshape(-1, *(1,) * (a.ndim - 1)), a, b), new, old)


def best_candidates(
    live_scores: Float[Array, "B K"], logits: Float[Array, "B K V"], num: int, progress: Progress, rules: Sequence[Rule]
) -> tuple[Float[Array, "B M"], Int[Array, "B M"], Int[Array, "B M"], Float[Array, "B M"]]:
    """Returns the `num` best extensions of all beams, best first: scores, parents, tokens, log-probabilities.

    The best of each beam are taken first, then the best of those: without rules, log-probabilities are made for the few
    that survive, not for the vocabulary. What a rule takes away is not given to the others: log-probabilities are the
    model's. Ties go to the lower beam, then to the lower token.
    """
    per_beam = min(num, logits.shape[-1])
    if rules:
        ranked = log_probabilities(logits)
        for rule in rules:
            ranked = rule(ranked, progress)
        top, top_tokens = best_of_vocabulary(ranked, per_beam)  # [B, K, per_beam]
        log_probs = top
    else:
        top, top_tokens = best_of_vocabulary(logits, per_beam)
        highest = jnp.max(top, axis=-1, keepdims=True)  # a slice of it would make a sort of the whole `top_k`
        log_probs = (top - highest) - jnp.log(sum_of_exponentials(logits, highest))
    scores = live_scores[:, :, None] + log_probs
    scores = jnp.where(top > MASKED / 2, scores, MASKED)  # a banned token is no candidate
    best, flat = jax.lax.top_k(scores.reshape(scores.shape[0], -1), num)  # [B, K * per_beam] -> [B, num]

    def chosen(x):
        return jnp.take_along_axis(x.reshape(flat.shape[0], -1), flat, axis=1)

    return best, flat // per_beam, chosen(top_tokens), chosen(log_probs)


def best_reachable(
    live_scores: Float[Array, "B K"], steps: Int[Array, "B"], max_lengths: Int[Array, "B"], penalty: LengthPenalty
) -> Float[Array, "B"]:
    """Returns the best score that any live hypothesis of each slot can still finish with.

    A log-probability can only fall, and it is not positive, so the bound is the one now, divided by the largest divisor
    among the lengths still possible; a monotone divisor is largest at one end of them.
    """
    best = jnp.max(live_scores, axis=1)
    return best / jnp.maximum(penalty.divisor(steps + 1), penalty.divisor(max_lengths))


def beam_search(
    step: Step,
    reorder: Reorder,
    refill: Refill,
    decoder: Any,
    max_lengths: Int[Array, "N"],
    config: BeamSearchConfig,
    rules: Sequence[Rule] = (),
    bonus: Bonus | None = None,
    choose: Candidates | None = None,
) -> Hypotheses:
    """Returns the K best outputs of each of N sentences.

    Args:
        step: see `Step`.
        reorder: see `Reorder`.
        refill: see `Refill`; called before a slot's first step.
        decoder: a state with B slots and K beams, whatever is in them.
        max_lengths: most tokens of each sentence's output, end token included, at most `config.max_length`; 0 makes a
            row of padding, which gives no hypothesis, and costs nothing if it stands at the end.
        config: everything static.
        rules: what may follow what, see `decoding/rules.py`.
        bonus: see `Bonus`; nothing when None.
        choose: see `Candidates`; `best_candidates` when None. With another, a candidate that "ranks among the best K"
            is one of the first K in its order.
    """
    choose = best_candidates if choose is None else choose
    num_sentences, slots, beams = max_lengths.shape[0], config.num_slots, config.beam_size
    length, penalty = config.max_length, config.length_penalty
    limit = jnp.max(jnp.where(max_lengths > 0, jnp.arange(num_sentences) + 1, 0))  # sentences without the padding
    slot_limits = jnp.append(max_lengths, 0)  # an empty slot has the limit 0

    def advance(state: BeamState) -> BeamState:
        # --- 1. score every extension of every live hypothesis
        last = jnp.maximum(state.steps - 1, 0)[:, None, None]
        previous = jnp.take_along_axis(state.live.tokens, last, axis=2)[:, :, 0]
        previous = jnp.where(state.steps[:, None] == 0, config.start_token, previous)
        logits, extras, decoder = step(previous, state.decoder)
        progress = Progress(state.live.tokens, state.steps, state.sentences)
        scores, parents, tokens, log_probs = choose(state.live_scores, logits, 2 * beams, progress, rules)
        candidates = _write(_gather(state.live, parents), state.steps, tokens, log_probs, extras, parents)  # [B, 2K, T]
        ends = tokens == config.end_token

        # --- 2. those that end and rank among the best K join the finished ones
        may_finish = ends & (jnp.arange(2 * beams) < beams)[None, :] & (scores > MASKED / 2)
        new_length = state.steps + 1
        normalised = scores / penalty.divisor(new_length)[:, None]
        if bonus is not None:
            normalised = normalised + bonus(candidates.extras, state.sentences, new_length)
        normalised = jnp.where(may_finish, normalised, MASKED)
        all_scores = jnp.concatenate([state.finished_scores, normalised], axis=1)  # [B, 3K], old ones win a tie
        finished_scores, kept = jax.lax.top_k(all_scores, beams)
        new_lengths = jnp.where(may_finish, new_length[:, None], 0)
        finished_lengths = gather_beams(jnp.concatenate([state.finished_lengths, new_lengths], axis=1), kept)
        finished = _gather(_join(state.finished, candidates), kept)

        # --- 3. the first K that do not end live on
        stays = ~ends & (scores > MASKED / 2)
        _, alive = jax.lax.top_k(jnp.where(stays, 2 * beams - jnp.arange(2 * beams), 0), beams)
        live_scores = gather_beams(jnp.where(stays, scores, MASKED), alive)
        live = _gather(candidates, alive)
        decoder = reorder(decoder, gather_beams(parents, alive))

        # --- 4. a slot that is done keeps what it has
        changed = (state.steps + 1, live, live_scores, finished, finished_lengths, finished_scores)
        before = (
            state.steps, state.live, state.live_scores, state.finished, state.finished_lengths, state.finished_scores,
        )  # fmt: skip
        steps, live, live_scores, finished, finished_lengths, finished_scores = _choose(state.active, changed, before)
        limits = slot_limits[state.sentences]
        awaited = finished_scores[:, config.num_awaited - 1]
        if config.stop == "finished" or beams == 1:  # greedy search does not look for longer ones that score better
            undecided = awaited < MASKED / 2
        elif config.stop == "likely":
            lengths = jnp.maximum(steps, 1)
            as_they_stand = live_scores / penalty.divisor(lengths)[:, None]
            if bonus is not None:
                as_they_stand = as_they_stand + bonus(live.extras, state.sentences, lengths)
            undecided = jnp.max(as_they_stand, axis=1) > awaited
        else:
            undecided = best_reachable(live_scores, steps, limits, penalty) > awaited
        some_live = jnp.max(live_scores, axis=1) > MASKED / 2
        active = state.active & undecided & some_live & (steps < limits)
        return BeamState(
            state.next_sentence, state.sentences, steps, active, live, live_scores, finished, finished_lengths,
            finished_scores, decoder, state.results,
        )  # fmt: skip

    def store(state: BeamState) -> Hypotheses:
        """Returns the results with those of the slots that are done."""
        found = _collect(state, slot_limits[state.sentences], penalty, bonus)
        rows = jnp.where(state.active, num_sentences, state.sentences)
        return jax.tree.map(lambda kept, new: kept.at[rows].set(new), state.results, found)

    def exchange(state: BeamState) -> BeamState:
        """Stores what the slots that are done have found, and puts the next sentences in their place."""
        empty = ~state.active
        number = state.next_sentence + jnp.cumsum(empty) - 1
        sentences = jnp.where(empty, jnp.where(number < limit, number, num_sentences), state.sentences)
        fresh = empty & (sentences < num_sentences)
        blank = nothing(state.decoder, state.results)
        live, live_scores, finished, finished_lengths, finished_scores, steps = _choose(
            empty,
            (blank.live, blank.live_scores, blank.finished, blank.finished_lengths, blank.finished_scores, blank.steps),
            (state.live, state.live_scores, state.finished, state.finished_lengths, state.finished_scores, state.steps),
        )
        return BeamState(
            jnp.minimum(state.next_sentence + jnp.sum(empty), limit), sentences, steps,
            jnp.where(empty, slot_limits[sentences] > 0, state.active), live, live_scores, finished, finished_lengths,
            finished_scores, refill(state.decoder, fresh, sentences), store(state),
        )  # fmt: skip

    def nothing(decoder: Any, results: Hypotheses) -> BeamState:
        """Returns a state whose slots are empty."""
        scores = jnp.where(jnp.arange(beams) == 0, 0.0, MASKED)  # one live hypothesis, which is empty
        zeros = jnp.zeros((slots,), jnp.int32)
        return BeamState(
            jnp.zeros((), jnp.int32), zeros + num_sentences, zeros, zeros > 0, record(slots, beams),
            jnp.broadcast_to(scores, (slots, beams)), record(slots, beams),
            jnp.zeros((slots, beams), jnp.int32), jnp.full((slots, beams), MASKED, jnp.float32),
            decoder, results,
        )  # fmt: skip

    # What the step gives beside the logits: its shapes, without running it.
    extras = jax.eval_shape(step, jnp.zeros((slots, beams), jnp.int32), decoder)[1]

    def record(rows: int, num: int) -> Record:
        shape = (rows, num, length)
        return Record(
            jnp.full(shape, config.end_token, jnp.int32),
            jnp.zeros(shape, jnp.float32),
            jax.tree.map(lambda x: jnp.zeros((*shape, *x.shape[2:]), x.dtype), extras),
        )

    blank = record(num_sentences + 1, beams)
    counts = jnp.zeros((num_sentences + 1, beams), jnp.int32)
    results = Hypotheses(
        blank.tokens, counts, jnp.full(counts.shape, MASKED, jnp.float32), counts > 0, blank.log_probs, blank.extras
    )

    def uninterrupted(state: BeamState) -> Bool[Array, ""]:
        idle = jnp.sum(~state.active)
        return jnp.where(state.next_sentence < limit, idle < config.refill_at, idle < slots)

    final = jax.lax.while_loop(
        lambda state: jnp.any(state.active) | (state.next_sentence < limit),
        lambda state: jax.lax.while_loop(uninterrupted, advance, exchange(state)),
        nothing(decoder, results),
    )
    return jax.tree.map(lambda x: x[:num_sentences], store(final))


def _write(
    candidates: Record,
    steps: Int[Array, "B"],
    tokens: Int[Array, "B M"],
    log_probs: Float[Array, "B M"],
    extras: Any,
    parents: Int[Array, "B M"],
) -> Record:
    """Returns the candidates with their new token in its place, and what belongs to it."""

    def put(history: Shaped[Array, "B M T *rest"], new: Shaped[Array, "B M *rest"]) -> Shaped[Array, "B M T *rest"]:
        here = jnp.arange(history.shape[2])[None, :] == steps[:, None]  # [B, T]
        return jnp.where(here.reshape(here.shape[0], 1, -1, *(1,) * (history.ndim - 3)), new[:, :, None], history)

    gathered = jax.tree.map(lambda x: gather_beams(x, parents), extras)
    return Record(
        put(candidates.tokens, tokens), put(candidates.log_probs, log_probs),
        jax.tree.map(put, candidates.extras, gathered),
    )  # fmt: skip


def _collect(state: BeamState, max_lengths: Int[Array, "B"], penalty: LengthPenalty, bonus: Bonus | None) -> Hypotheses:
    """Returns the K best of each slot: the finished hypotheses, then the live ones that were cut at their limit."""
    beams = state.live_scores.shape[1]
    lengths = jnp.broadcast_to(max_lengths[:, None], state.live_scores.shape)
    there = (state.live_scores > MASKED / 2) & (lengths > 0) & (state.steps >= max_lengths)[:, None]
    live_scores = state.live_scores / penalty.divisor(jnp.maximum(lengths, 1))
    if bonus is not None:
        live_scores = live_scores + bonus(state.live.extras, state.sentences, max_lengths)
    live_scores = jnp.where(there, live_scores, MASKED)
    scores = jnp.concatenate([state.finished_scores, live_scores], axis=1)  # [B, 2K]
    finished = jnp.concatenate([state.finished_lengths > 0, jnp.zeros_like(there)], axis=1)
    # Finished before unfinished, by score within each: a stable sort by two keys.
    order = jnp.lexsort((-scores, ~finished), axis=-1)[:, :beams]
    all_lengths = jnp.concatenate([state.finished_lengths, jnp.where(there, lengths, 0)], axis=1)
    record = _gather(_join(state.finished, state.live), order)
    return Hypotheses(
        record.tokens, gather_beams(all_lengths, order), gather_beams(scores, order), gather_beams(finished, order),
        record.log_probs, record.extras,
    )  # fmt: skip
