"""Candidates of a step: which extensions of the live hypotheses a beam search looks at.

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
    """Live hypotheses with one more token, in the order in which a search takes them.

    Attributes:
        scores: [B, M], log-probabilities of all tokens; MASKED where there is no candidate.
        parents: [B, M], the beam that each extends.
        tokens: [B, M], the token that it adds.
        log_probs: [B, M], of that token.
    """

    scores: Float[Array, "B M"]
    parents: Int[Array, "B M"]
    tokens: Int[Array, "B M"]
    log_probs: Float[Array, "B M"]


@runtime_checkable
class CandidateSelector(Protocol):
    """Chooses the candidates of a step; one that holds arrays is an `array_tree`."""

    def __call__(
        self,
        live_scores: Float[Array, "B K"],
        logits: Float[Array, "B K V"],
        num: int,
        progress: Progress,
        processors: Sequence[LogitsProcessor],
    ) -> Candidates:
        """Returns `num` candidates.

        Args:
            live_scores: log-probabilities of the live hypotheses, MASKED where there is none.
            logits: of the next token.
            num: M.
            progress: how far the hypotheses are.
            processors: applied in this order.
        """
        ...


def best_candidates(
    live_scores: Float[Array, "B K"],
    logits: Float[Array, "B K V"],
    num: int,
    progress: Progress,
    processors: Sequence[LogitsProcessor],
) -> Candidates:
    """Returns the `num` most probable extensions of all beams, best first (a `CandidateSelector`).

    The best of each beam are taken first, then the best of those. So without processors log-probabilities are made for
    the few that survive, not for the vocabulary. What a processor takes away is not given to the others:
    log-probabilities are the model's. Ties go to the lower beam, then to the lower token.
    """
    per_beam = min(num, logits.shape[-1])
    if processors:
        ranked = log_probabilities(logits)
        for processor in processors:
            ranked = processor(ranked, progress)
        top, top_tokens = best_of_vocabulary(ranked, per_beam)  # [B, K, per_beam]
        log_probs = top
    else:
        top, top_tokens = best_of_vocabulary(logits, per_beam)
        highest = jnp.max(top, axis=-1, keepdims=True)  # a slice of it would make a sort of the whole `top_k`
        log_probs = (top - highest) - jnp.log(sum_of_exponentials(logits, highest))
    scores = live_scores[:, :, None] + log_probs
    scores = jnp.where(is_possible(top), scores, MASKED)  # a banned token is no candidate
    best, flat = jax.lax.top_k(scores.reshape(scores.shape[0], -1), num)  # [B, K * per_beam] -> [B, num]

    def chosen(x: Array) -> Array:
        return jnp.take_along_axis(x.reshape(flat.shape[0], -1), flat, axis=1)

    return Candidates(best, flat // per_beam, chosen(top_tokens), chosen(log_probs))
