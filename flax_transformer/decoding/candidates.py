"""Candidates of a step: the extensions of live hypotheses among which a beam search chooses.

Legend: B slots, K beams, M candidates, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flax_transformer.decoding.logits_processors import LogitsProcessor, Progress
from flax_transformer.ops.vocabulary import best_of_vocabulary, log_probabilities, sum_of_exponentials
from flax_transformer.shapes import MASKED, array_tree, is_possible


@array_tree
@dataclasses.dataclass(frozen=True)
class Candidates:
    """Live hypotheses with one more token, in order of preference.

    Attributes:
        scores: [B, M], log-probabilities of all tokens; MASKED where there is no candidate.
        parents: [B, M], the beam that each candidate extends.
        tokens: [B, M], the added token.
        log_probs: [B, M], log-probability of the added token.
    """

    scores: Float[Array, "B M"]
    parents: Int[Array, "B M"]
    tokens: Int[Array, "B M"]
    log_probs: Float[Array, "B M"]


@runtime_checkable
class CandidateSelector(Protocol):
    """Chooses the candidates of a step. A selector that has arrays is an `array_tree`."""

    def __call__(
        self,
        live_scores: Float[Array, "B K"],
        logits: Float[Array, "B K V"],
        num: int,
        progress: Progress,
        processors: Sequence[LogitsProcessor],
        excluded: tuple[int, ...] = (),
    ) -> Candidates:
        """Returns `num` candidates.

        Args:
            live_scores: log-probabilities of the live hypotheses, MASKED where there is none.
            logits: logits of the next token.
            num: number of candidates, M.
            progress: tokens decoded so far.
            processors: logits processors, applied in this order.
            excluded: tokens that are no candidates.
        """
        ...


def best_candidates(
    live_scores: Float[Array, "B K"],
    logits: Float[Array, "B K V"],
    num: int,
    progress: Progress,
    processors: Sequence[LogitsProcessor],
    excluded: tuple[int, ...] = (),
) -> Candidates:
    """Returns the `num` most probable extensions of all beams, best first (a `CandidateSelector`).

    The best tokens of each beam are found first, then the best of all beams. Without processors, log-probabilities are
    computed only for the best tokens of each beam. Log-probabilities are not normalised again after processors. Ties
    go to the lower beam, then to the lower token.

    Args:
        live_scores, logits, num, progress, processors: see `CandidateSelector`.
        excluded: tokens that are no candidates. Each beam offers at least its best K + 1 other tokens. So neither the
            first K candidates nor the first K without an end token are missed.
    """
    per_beam = min(max(num, logits.shape[1] + 1 + len(excluded)), logits.shape[-1])
    if processors:
        ranked = log_probabilities(logits)
        for processor in processors:
            ranked = processor(ranked, progress)
        top, top_tokens = best_of_vocabulary(ranked, per_beam)  # [B, K, per_beam]
        log_probs = top
    else:
        top, top_tokens = best_of_vocabulary(logits, per_beam)
        highest = jnp.max(top, axis=-1, keepdims=True)  # not top[..., :1]: XLA would then sort everything
        log_probs = (top - highest) - jnp.log(sum_of_exponentials(logits, highest))
    scores = live_scores[:, :, None] + log_probs
    allowed = is_possible(top)  # a suppressed token is no candidate
    for token in excluded:
        allowed &= top_tokens != token
    scores = jnp.where(allowed, scores, MASKED)
    best, flat = jax.lax.top_k(scores.reshape(scores.shape[0], -1), num)  # [B, K * per_beam] -> [B, num]

    def chosen(x: Array) -> Array:
        return jnp.take_along_axis(x.reshape(flat.shape[0], -1), flat, axis=1)

    return Candidates(best, flat // per_beam, chosen(top_tokens), chosen(log_probs))
