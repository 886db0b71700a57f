"""The state of a beam search, as one tree of arrays.

A program that takes and returns the state can keep it on a device and overwrite it in place (donation).

Legend: N sentences, B slots, K beams, M hypotheses, V vocabulary, T maximum length.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from flax_transformer.decoding.candidates import Candidates, CandidateSelector
from flax_transformer.decoding.hypotheses import Hypotheses
from flax_transformer.decoding.logits_processors import LogitsProcessor
from flax_transformer.shapes import MASKED, array_tree


@runtime_checkable
class ScoreAdjustment(Protocol):
    """A summand of the scores that rank hypotheses. An adjustment that has arrays is an `array_tree`."""

    def __call__(self, auxiliary: Any, sentences: Int[Array, "B"], lengths: Int[Array, "B"]) -> Float[Array, "B M"]:
        """Returns the summands, none above 0.

        Args:
            auxiliary: auxiliary values of M hypotheses, a tree of [B, M, T, ...].
            sentences: number of the sentence in each slot.
            lengths: number of tokens of each slot's hypotheses. Entries of T after these tokens are unspecified.
        """
        ...


@array_tree
@dataclasses.dataclass(frozen=True)
class HypothesisBuffer:
    """The tokens of M hypotheses, and values stored beside each token.

    Attributes:
        tokens: [B, M, T].
        log_probs: [B, M, T].
        auxiliary: tree of [B, M, T, ...].
    """

    tokens: Int[Array, "B M T"]
    log_probs: Float[Array, "B M T"]
    auxiliary: Any


@array_tree
@dataclasses.dataclass(frozen=True)
class LiveHypotheses:
    """The hypotheses of each slot that have not ended. Each gets one token at each step of its slot.

    Attributes:
        buffer: their tokens, [B, K, T].
        scores: [B, K], log-probabilities; MASKED for an empty place.
    """

    buffer: HypothesisBuffer
    scores: Float[Array, "B K"]


@array_tree
@dataclasses.dataclass(frozen=True)
class FinishedHypotheses:
    """The finished hypotheses of each slot, sorted by score.

    Attributes:
        buffer: their tokens, [B, K, T].
        lengths: [B, K], 0 for an empty place.
        scores: [B, K], log-probabilities, divided by the length penalty and adjusted; MASKED for an empty place.
    """

    buffer: HypothesisBuffer
    lengths: Int[Array, "B K"]
    scores: Float[Array, "B K"]


@array_tree
@dataclasses.dataclass(frozen=True)
class SearchRequest:
    """The inputs of a search. No step changes them.

    Attributes:
        num_sentences: number of sentences to search; the other ones of the N, at the end, are padding.
        max_lengths: [N + 1], most tokens of each sentence's outputs, end token included; the last entry, 0, is for
            empty slots.
        processors: logits processors, applied in this order.
        selector: chooses the candidates of a step; None is `best_candidates`.
        score_adjustment: added to scores; None adds nothing.
    """

    num_sentences: Int[Array, ""]
    max_lengths: Int[Array, "_"]
    processors: tuple[LogitsProcessor, ...]
    selector: CandidateSelector | None
    score_adjustment: ScoreAdjustment | None


@array_tree
@dataclasses.dataclass(frozen=True)
class BeamState:
    """The state of a search between two steps.

    Attributes:
        request: inputs of the search.
        next_sentence: number of the first sentence that has not been in a slot yet.
        sentences: [B], number of the sentence in each slot; N in an empty slot.
        steps: [B], number of tokens decoded so far.
        active: [B], False if the sentence of a slot is done, or if the slot is empty.
        live: hypotheses that have not ended.
        finished: hypotheses that have ended.
        decoder: state of the decoder for the live hypotheses.
        results: [N + 1, ...], results of the sentences that have left their slots; the last row is never read.
    """

    request: SearchRequest
    next_sentence: Int[Array, ""]
    sentences: Int[Array, "B"]
    steps: Int[Array, "B"]
    active: Bool[Array, "B"]
    live: LiveHypotheses
    finished: FinishedHypotheses
    decoder: Any
    results: Hypotheses


# --- new buffers


def empty_buffer(shape: tuple[int, int, int], end_token: int, auxiliary: Any) -> HypothesisBuffer:
    """Returns a buffer filled with end tokens.

    Args:
        shape: [B, M, T].
        end_token: token that ends a hypothesis.
        auxiliary: tree of `jax.ShapeDtypeStruct`, the values stored beside one token.
    """
    return HypothesisBuffer(
        jnp.full(shape, end_token, jnp.int32),
        jnp.zeros(shape, jnp.float32),
        jax.tree.map(lambda x: jnp.zeros((*shape, *x.shape), x.dtype), auxiliary),
    )


def empty_hypotheses(
    shape: tuple[int, int, int], end_token: int, auxiliary: Any
) -> tuple[LiveHypotheses, FinishedHypotheses]:
    """Returns the hypotheses of fresh slots: one live hypothesis without tokens, and no finished one.

    Args:
        shape: [B, K, T].
        end_token: token that ends a hypothesis.
        auxiliary: see `empty_buffer`.
    """
    slots, beams, _ = shape
    # A weak type here would differ from the type after a step, and the program would be compiled again.
    scores = jnp.where(jnp.arange(beams) == 0, 0.0, MASKED).astype(jnp.float32)
    live = LiveHypotheses(empty_buffer(shape, end_token, auxiliary), jnp.broadcast_to(scores, (slots, beams)))
    finished = FinishedHypotheses(
        empty_buffer(shape, end_token, auxiliary),
        jnp.zeros((slots, beams), jnp.int32),
        jnp.full((slots, beams), MASKED, jnp.float32),
    )
    return live, finished


# --- moving hypotheses


def gather_beams(x: Shaped[Array, "B K *rest"], chosen: Int[Array, "B M"]) -> Shaped[Array, "B M *rest"]:
    """Returns, for each slot, the entries `chosen` of the second axis. [[a b c]] with [[2 0]] gives [[c a]]."""
    index = chosen.reshape(*chosen.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)


def gather_hypotheses(buffer: HypothesisBuffer, chosen: Int[Array, "B M"]) -> HypothesisBuffer:
    """Returns, for each slot, the hypotheses `chosen`."""
    return jax.tree.map(lambda x: gather_beams(x, chosen), buffer)


def concatenate_hypotheses(first: HypothesisBuffer, second: HypothesisBuffer) -> HypothesisBuffer:
    """Returns, for each slot, the hypotheses of both buffers."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), first, second)


def append_tokens(
    buffer: HypothesisBuffer, steps: Int[Array, "B"], candidates: Candidates, auxiliary: Any
) -> HypothesisBuffer:
    """Returns the candidates' hypotheses with their new tokens.

    Args:
        buffer: the live hypotheses, [B, K, T].
        steps: number of their tokens.
        candidates: M extensions of them.
        auxiliary: values of this step, a tree of [B, K, ...]. They are stored beside the new token.
    """

    def put(history: Shaped[Array, "B M T *rest"], new: Shaped[Array, "B M *rest"]) -> Shaped[Array, "B M T *rest"]:
        here = jnp.arange(history.shape[2])[None, :] == steps[:, None]  # [B, T]
        return jnp.where(here.reshape(here.shape[0], 1, -1, *(1,) * (history.ndim - 3)), new[:, :, None], history)

    buffer = gather_hypotheses(buffer, candidates.parents)
    auxiliary = jax.tree.map(lambda x: gather_beams(x, candidates.parents), auxiliary)
    return HypothesisBuffer(
        put(buffer.tokens, candidates.tokens),
        put(buffer.log_probs, candidates.log_probs),
        jax.tree.map(put, buffer.auxiliary, auxiliary),
    )


def select_slots(condition: Bool[Array, "B"], new: Any, old: Any) -> Any:
    """Returns a tree with the rows of `new` where the condition holds, and the rows of `old` elsewhere."""
    return jax.tree.map(lambda a, b: jnp.where(condition.reshape(-1, *(1,) * (a.ndim - 1)), a, b), new, old)
