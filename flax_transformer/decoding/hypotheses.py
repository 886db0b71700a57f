"""The result of a search, as arrays."""

import dataclasses

from jaxtyping import Array, Bool, Float, Int

from flax_transformer.shapes import array_tree


@array_tree
@dataclasses.dataclass(frozen=True)
class Hypotheses:
    """The K best outputs of each sentence, best first: finished ones by score, then unfinished ones by score.

    Attributes:
        tokens: [B, K, T]; after `lengths` tokens comes padding (the end token). A finished one ends with the end token.
        lengths: [B, K], end token included; 0 where there are fewer than K hypotheses.
        scores: [B, K], log-probability divided by the length penalty.
        finished: [B, K], False for one that was cut at the maximum length.
    """

    tokens: Int[Array, "B K T"]
    lengths: Int[Array, "B K"]
    scores: Float[Array, "B K"]
    finished: Bool[Array, "B K"]
