"""Beam search inside XLA, over any decode step.

A search is three functions over a `BeamState`:
    start: makes the state of a search before its first step.
    advance: takes the state some steps further.
    finish: reads the results.

The loop `beam_search` calls all three. A server may call them by itself. It compiles `advance` once, keeps the state on
the device, and checks between calls which sentences are done.

Slots. A program searches N sentences in B slots. When a sentence is done, the next one takes its slot. The other slots
do not wait for that. All shapes are fixed, and each slot has its own step number and maximum length. So the result of a
sentence depends neither on its slot nor on other sentences.

Candidates. The candidates of a step are the best 2K extensions of the live hypotheses by one token. A candidate with
the end token becomes finished if it is among the best K. The best K candidates without the end token live on. A beam of
1 is greedy search. A hypothesis that reaches the maximum length is returned as unfinished, behind the finished ones.

A sentence stops by its rule (see `stop_rules.py`), when it has no live hypothesis, and at its maximum length.

Legend: N sentences, B slots, K beams, M candidates, V vocabulary, T maximum length.

References:
    Graves 2012, section 2.5; Wu et al. 2016, section 7.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flax_transformer.decoding.beam_state import (
    BeamState,
    FinishedHypotheses,
    HypothesisBuffer,
    LiveHypotheses,
    ScoreAdjustment,
    SearchRequest,
    append_tokens,
    concatenate_hypotheses,
    empty_buffer,
    empty_hypotheses,
    gather_beams,
    gather_hypotheses,
    select_slots,
)
from flax_transformer.decoding.candidates import CandidateSelector, best_candidates
from flax_transformer.decoding.decoder_functions import DecoderFunctions
from flax_transformer.decoding.hypotheses import Hypotheses
from flax_transformer.decoding.length_penalty import LengthPenalty
from flax_transformer.decoding.logits_processors import LogitsProcessor, Progress
from flax_transformer.decoding.stop_rules import StopRule, final_scores, is_undecided
from flax_transformer.errors import ConfigError
from flax_transformer.shapes import MASKED, is_possible


@dataclasses.dataclass(frozen=True)
class BeamSearchConfig:
    """The static settings of a search.

    Attributes:
        beam_size: number of live hypotheses of a sentence, K.
        num_slots: number of sentences searched at the same time, B.
        max_length: most tokens of a hypothesis, end token included, T. Sentences may have lower limits.
        start_token: token that the first step reads.
        end_token: token that ends a hypothesis.
        length_penalty: makes scores of different lengths comparable.
        stop: the stop rule, "exact", "heuristic" or "first_finished"; see `stop_rules.py`.
        num_awaited: number of finished hypotheses that a sentence waits for; None waits for K. With `exact`, the first
            `num_awaited` results are the best that the search can find.
        refill_at: number of slots that must be done before sentences that wait take them.
        excluded: tokens that no hypothesis contains, such as padding. They cost nothing, unlike a logits processor.

    Raises:
        ConfigError: a value is out of range, or fields contradict each other.

    Example:
        >>> penalty = LengthPenalty.parse("gnmt:0.6")
        >>> BeamSearchConfig(4, 32, 100, start_token=1, end_token=2, length_penalty=penalty).stop
        'exact'
    """

    beam_size: int
    num_slots: int
    max_length: int
    start_token: int
    end_token: int
    length_penalty: LengthPenalty
    stop: StopRule = "exact"
    num_awaited: int | None = None
    refill_at: int = 1
    excluded: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("beam_size", "num_slots", "max_length", "refill_at"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.num_awaited is not None and not 1 <= self.num_awaited <= self.beam_size:
            raise ConfigError(
                f"num_awaited must lie between 1 and beam_size ({self.beam_size}), got {self.num_awaited}: no more "
                "hypotheses are kept than the beam holds."
            )
        if self.refill_at > self.num_slots:
            raise ConfigError(f"refill_at ({self.refill_at}) is more than all of the {self.num_slots} slots.")


# --- the search: start, advance, finish, and the loop that drives them


def start(
    functions: DecoderFunctions,
    config: BeamSearchConfig,
    decoder: Any,
    max_lengths: Int[Array, "N"],
    processors: Sequence[LogitsProcessor] = (),
    selector: CandidateSelector | None = None,
    score_adjustment: ScoreAdjustment | None = None,
) -> BeamState:
    """Returns the state of a search before its first step, with all slots empty.

    Args:
        functions: the decoder.
        config: static settings.
        decoder: a state of the decoder with B slots and K beams; its values are not read.
        max_lengths: most tokens of each sentence's output, end token included, at most `config.max_length`. 0 marks
            padding, which has no output. Padding after the last sentence costs no step.
        processors: change log-probabilities before candidates are chosen; applied in this order.
        selector: chooses the candidates of a step; None is `best_candidates`. The "best K" candidates are the first K
            in the selector's order.
        score_adjustment: added to scores, never above 0; None adds nothing.

    Example:
        >>> chain = jnp.array([[-9.0, -9.0, 3.0], [0.0, 0.0, 0.0], [-9.0, 3.0, 2.0]])
        >>> functions = DecoderFunctions(lambda tokens, _: (chain[tokens], None, None), lambda s, _: s, lambda s, *_: s)
        >>> config = BeamSearchConfig(2, 1, 4, start_token=0, end_token=1, length_penalty=LengthPenalty.parse("none"))
        >>> state = start(functions, config, None, jnp.array([4]))
        >>> state.sentences.tolist(), int(state.request.num_sentences)  # an empty slot, and a sentence that waits
        ([1], 1)
    """
    num_rows, slots, beams = max_lengths.shape[0], config.num_slots, config.beam_size
    request = SearchRequest(
        num_sentences=jnp.max(jnp.where(max_lengths > 0, jnp.arange(num_rows) + 1, 0)),
        max_lengths=jnp.append(max_lengths, 0),
        processors=tuple(processors),
        selector=selector,
        score_adjustment=score_adjustment,
    )
    # Shapes of the auxiliary values, without running the step.
    auxiliary = jax.eval_shape(functions.step, jnp.zeros((slots, beams), jnp.int32), decoder)[1]
    auxiliary = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[2:], x.dtype), auxiliary)
    blank = empty_buffer((num_rows + 1, beams, config.max_length), config.end_token, auxiliary)
    counts = jnp.zeros((num_rows + 1, beams), jnp.int32)
    scores = jnp.full(counts.shape, MASKED, jnp.float32)
    results = Hypotheses(blank.tokens, counts, scores, counts > 0, blank.log_probs, blank.auxiliary)
    zeros, next_sentence = jnp.zeros((slots,), jnp.int32), jnp.zeros((), jnp.int32)
    sentences, active = zeros + num_rows, zeros > 0  # all slots are empty
    live, finished = empty_hypotheses((slots, beams, config.max_length), config.end_token, auxiliary)
    return BeamState(
        request,
        next_sentence=next_sentence,
        sentences=sentences,
        steps=zeros,
        active=active,
        live=live,
        finished=finished,
        decoder=decoder,
        results=results,
    )


def is_running(state: BeamState) -> Bool[Array, ""]:
    """Returns whether any sentence is not done yet.

    Example:
        >>> chain = jnp.array([[-9.0, -9.0, 3.0], [0.0, 0.0, 0.0], [-9.0, 3.0, 2.0]])
        >>> functions = DecoderFunctions(lambda tokens, _: (chain[tokens], None, None), lambda s, _: s, lambda s, *_: s)
        >>> config = BeamSearchConfig(2, 1, 4, start_token=0, end_token=1, length_penalty=LengthPenalty.parse("none"))
        >>> bool(is_running(start(functions, config, None, jnp.array([4]))))
        True
    """
    return jnp.any(state.active) | (state.next_sentence < state.request.num_sentences)


def advance(
    functions: DecoderFunctions,
    config: BeamSearchConfig,
    state: BeamState,
    max_steps: Int[Array, ""] | int | None = None,
) -> BeamState:
    """Returns the state after at most `max_steps` steps.

    First, the results of slots that are done are stored, and the next sentences take these slots. Then steps run until
    `refill_at` slots are done, or until all are done if no sentence waits. Results do not depend on `max_steps`.

    Args:
        functions: the decoder.
        config: static settings.
        state: returned by `start` or by this function.
        max_steps: most steps to run; None sets no limit.

    Donation of the state deletes its arrays. A jitted `start` gives the state arrays of its own. Without `jax.jit`,
    they may be the caller's arrays.

    Example:
        >>> chain = jnp.array([[-9.0, -9.0, 3.0], [0.0, 0.0, 0.0], [-9.0, 3.0, 2.0]])
        >>> functions = DecoderFunctions(lambda tokens, _: (chain[tokens], None, None), lambda s, _: s, lambda s, *_: s)
        >>> config = BeamSearchConfig(2, 1, 4, start_token=0, end_token=1, length_penalty=LengthPenalty.parse("none"))
        >>> state = start(functions, config, None, jnp.array([4]))
        >>> advance(functions, config, state, 1).steps.tolist()
        [1]

        A server keeps the state on the device, and donates it to each call. Results are in `finish(config, state)`.
        Here `decoder`, `max_lengths` and `processors` are those of a model (see docs/serving.md)::

            state = jax.jit(functools.partial(start, functions, config))(decoder, max_lengths, processors)
            few_steps = jax.jit(functools.partial(advance, functions, config), donate_argnums=0)
            state = few_steps(state, 8)
            done = state.sentences[~state.active]
            done = done[done < len(max_lengths)]  # an empty slot holds N
    """
    state = _exchange(functions, config, state)
    step = functools.partial(_step, functions, config)
    if max_steps is None:
        return jax.lax.while_loop(functools.partial(_is_uninterrupted, config), step, state)
    _, state = jax.lax.while_loop(
        lambda carry: (carry[0] < max_steps) & _is_uninterrupted(config, carry[1]),
        lambda carry: (carry[0] + 1, step(carry[1])),
        (jnp.zeros((), jnp.int32), state),
    )
    return state


def finish(config: BeamSearchConfig, state: BeamState) -> Hypotheses:
    """Returns the K best outputs of each of the N sentences.

    The function may be called between two calls of `advance`. A sentence is done if it has left its slot, or if its
    slot is not `active`. Other sentences have no output yet (length 0). Under `jax.jit`, scores equal those of
    `beam_search` to the bit.

    Example:
        >>> chain = jnp.array([[-9.0, -9.0, 3.0], [0.0, 0.0, 0.0], [-9.0, 3.0, 2.0]])
        >>> functions = DecoderFunctions(lambda tokens, _: (chain[tokens], None, None), lambda s, _: s, lambda s, *_: s)
        >>> config = BeamSearchConfig(2, 1, 4, start_token=0, end_token=1, length_penalty=LengthPenalty.parse("none"))
        >>> state = start(functions, config, None, jnp.array([4]))
        >>> while is_running(state):
        ...     state = advance(functions, config, state, 2)
        >>> finish(config, state).lengths.tolist()
        [[2, 3]]
    """
    num_rows = state.request.max_lengths.shape[0] - 1
    return jax.tree.map(lambda x: x[:num_rows], _stored(config, state))


def beam_search(
    functions: DecoderFunctions,
    config: BeamSearchConfig,
    decoder: Any,
    max_lengths: Int[Array, "N"],
    processors: Sequence[LogitsProcessor] = (),
    selector: CandidateSelector | None = None,
    score_adjustment: ScoreAdjustment | None = None,
) -> Hypotheses:
    """Returns the K best outputs of each of the N sentences; the arguments are those of `start`.

    Example:
        >>> # A Markov chain, whose row k holds the logits after token k.
        >>> chain = jnp.array([[-9.0, -9.0, 3.0], [0.0, 0.0, 0.0], [-9.0, 3.0, 2.0]])
        >>> functions = DecoderFunctions(lambda tokens, _: (chain[tokens], None, None), lambda s, _: s, lambda s, *_: s)
        >>> config = BeamSearchConfig(2, 1, 4, start_token=0, end_token=1, length_penalty=LengthPenalty.parse("none"))
        >>> found = beam_search(functions, config, None, jnp.array([4]))
        >>> [tokens[:length] for tokens, length in zip(found.tokens[0].tolist(), found.lengths[0].tolist())]
        [[2, 1], [2, 2, 1]]
    """
    state = start(functions, config, decoder, max_lengths, processors, selector, score_adjustment)
    state = jax.lax.while_loop(is_running, functools.partial(advance, functions, config), state)
    return finish(config, state)


# --- one step


def _step(functions: DecoderFunctions, config: BeamSearchConfig, state: BeamState) -> BeamState:
    """Returns the state with one more token for the hypotheses of each active slot."""
    # --- 1. score every extension of every live hypothesis
    request, beams = state.request, config.beam_size
    last = jnp.maximum(state.steps - 1, 0)[:, None, None]
    previous = jnp.take_along_axis(state.live.buffer.tokens, last, axis=2)[:, :, 0]
    previous = jnp.where(state.steps[:, None] == 0, config.start_token, previous)
    logits, auxiliary, decoder = functions.step(previous, state.decoder)
    select = request.selector or best_candidates
    progress = Progress(state.live.buffer.tokens, state.steps, state.sentences)
    candidates = select(state.live.scores, logits, 2 * beams, progress, request.processors, config.excluded)
    extended = append_tokens(state.live.buffer, state.steps, candidates, auxiliary)  # [B, 2K, T]
    ends = candidates.tokens == config.end_token

    # --- 2. those among the best K that end become finished
    may_finish = ends & (jnp.arange(2 * beams) < beams)[None, :] & is_possible(candidates.scores)
    finished = _with_finished(config, state, candidates.scores, extended, may_finish)

    # --- 3. the first K that do not end live on
    stays = ~ends & is_possible(candidates.scores)
    _, alive = jax.lax.top_k(jnp.where(stays, 2 * beams - jnp.arange(2 * beams), 0), beams)
    live_scores = gather_beams(jnp.where(stays, candidates.scores, MASKED), alive)
    live = LiveHypotheses(gather_hypotheses(extended, alive), live_scores)
    decoder = functions.reorder(decoder, gather_beams(candidates.parents, alive))

    # --- 4. a slot that is not active keeps its hypotheses
    before = state.steps, state.live, state.finished
    steps, live, finished = select_slots(state.active, (state.steps + 1, live, finished), before)
    state = dataclasses.replace(state, steps=steps, live=live, finished=finished, decoder=decoder)
    limits = request.max_lengths[state.sentences]
    undecided = is_undecided(state, limits, config.length_penalty, config.stop, config.num_awaited or beams)
    some_live = is_possible(jnp.max(live.scores, axis=1))
    return dataclasses.replace(state, active=state.active & undecided & some_live & (steps < limits))


def _with_finished(
    config: BeamSearchConfig,
    state: BeamState,
    log_probs: Float[Array, "B M"],
    extended: HypothesisBuffer,
    may_finish: Bool[Array, "B M"],
) -> FinishedHypotheses:
    """Returns the best K among the finished hypotheses and the `extended` ones that may finish."""
    beams, old, length = config.beam_size, state.finished, state.steps + 1
    scores = final_scores(state, config.length_penalty, log_probs, extended.auxiliary, length)
    scores = jnp.where(may_finish, scores, MASKED)
    scores, kept = jax.lax.top_k(jnp.concatenate([old.scores, scores], axis=1), beams)  # [B, 3K]; old ones win ties
    lengths = jnp.concatenate([old.lengths, jnp.where(may_finish, length[:, None], 0)], axis=1)
    buffer = gather_hypotheses(concatenate_hypotheses(old.buffer, extended), kept)
    return FinishedHypotheses(buffer, gather_beams(lengths, kept), scores)


def _is_uninterrupted(config: BeamSearchConfig, state: BeamState) -> Bool[Array, ""]:
    """Returns whether another step runs before sentences are exchanged."""
    idle = jnp.sum(~state.active)
    waiting = state.next_sentence < state.request.num_sentences
    return jnp.where(waiting, idle < config.refill_at, idle < config.num_slots)


# --- between steps: the next sentences take the slots of those that are done


def _exchange(functions: DecoderFunctions, config: BeamSearchConfig, state: BeamState) -> BeamState:
    """Stores the results of slots that are done, and puts the next sentences into them."""
    request, empty = state.request, ~state.active
    none = request.max_lengths.shape[0] - 1  # number that an empty slot has in place of a sentence's
    number = state.next_sentence + jnp.cumsum(empty) - 1
    sentences = jnp.where(empty, jnp.where(number < request.num_sentences, number, none), state.sentences)
    auxiliary = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[3:], x.dtype), state.live.buffer.auxiliary)
    blank = empty_hypotheses((config.num_slots, config.beam_size, config.max_length), config.end_token, auxiliary)
    live, finished = select_slots(empty, blank, (state.live, state.finished))
    return BeamState(
        request,
        next_sentence=jnp.minimum(state.next_sentence + jnp.sum(empty), request.num_sentences),
        sentences=sentences,
        steps=jnp.where(empty, 0, state.steps),
        active=jnp.where(empty, request.max_lengths[sentences] > 0, state.active),
        live=live,
        finished=finished,
        decoder=functions.refill(state.decoder, empty & (sentences < none), sentences),
        results=_stored(config, state),
    )


def _stored(config: BeamSearchConfig, state: BeamState) -> Hypotheses:
    """Returns the results, with those of done slots added."""
    found = _collected(config, state)
    none = state.request.max_lengths.shape[0] - 1
    rows = jnp.where(state.active, none, state.sentences)
    return jax.tree.map(lambda kept, new: kept.at[rows].set(new), state.results, found)


def _collected(config: BeamSearchConfig, state: BeamState) -> Hypotheses:
    """Returns the K best of each slot: finished hypotheses, then live ones that have reached the maximum length."""
    live, finished, beams = state.live, state.finished, config.beam_size
    max_lengths = state.request.max_lengths[state.sentences]
    lengths = jnp.broadcast_to(max_lengths[:, None], live.scores.shape)
    there = is_possible(live.scores) & (lengths > 0) & (state.steps >= max_lengths)[:, None]
    at_least_one = jnp.maximum(max_lengths, 1)  # an empty slot has 0
    cut_scores = final_scores(state, config.length_penalty, live.scores, live.buffer.auxiliary, at_least_one)
    cut_scores = jnp.where(there, cut_scores, MASKED)
    scores = jnp.concatenate([finished.scores, cut_scores], axis=1)  # [B, 2K]
    has_ended = jnp.concatenate([finished.lengths > 0, jnp.zeros_like(there)], axis=1)
    # Finished ones come before unfinished ones. Within each group the order is by score.
    order = jnp.lexsort((-scores, ~has_ended), axis=-1)[:, :beams]
    lengths = jnp.concatenate([finished.lengths, jnp.where(there, lengths, 0)], axis=1)
    buffer = gather_hypotheses(concatenate_hypotheses(finished.buffer, live.buffer), order)
    return Hypotheses(
        buffer.tokens,
        gather_beams(lengths, order),
        gather_beams(scores, order),
        gather_beams(has_ended, order),
        buffer.log_probs,
        buffer.auxiliary,
    )
