"""The result of a search, as arrays."""

import dataclasses
from typing import Any

from jaxtyping import Array, Bool, Float, Int

from flax_transformer.shapes import array_tree


@array_tree
@dataclasses.dataclass(frozen=True)
class Hypotheses:
    """The K best outputs of each sentence, best first: finished ones by score, then unfinished ones by score.

    Attributes:
        tokens: [B, K, T]; after `lengths` tokens comes padding (the end token). A finished one ends with the end token.
        lengths: [B, K], end token included; 0 where there are fewer than K hypotheses.
        scores: [B, K], what they were ranked by: log-probability divided by the length penalty, plus a score adjustment
            if there is one.
        finished: [B, K], False for one that was cut at the maximum length.
        log_probs: [B, K, T], of each token, natural logarithm; anything after `lengths` tokens.
        auxiliary: tree of arrays [B, K, T, ...], what the step function gave beside each token; None if nothing.
    """

    tokens: Int[Array, "B K T"]
    lengths: Int[Array, "B K"]
    scores: Float[Array, "B K"]
    finished: Bool[Array, "B K"]
    log_probs: Float[Array, "B K T"]
    auxiliary: Any
