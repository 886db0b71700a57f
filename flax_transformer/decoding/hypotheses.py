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
        tokens: [B, K, T]. A finished output includes its end token. End tokens fill the rest.
        lengths: [B, K], number of tokens, end token included; 0 for an empty place.
        scores: [B, K], log-probability divided by the length penalty, plus the score adjustment if there is one.
        finished: [B, K], False for an output that was cut at the maximum length.
        log_probs: [B, K, T], natural log-probability of each token; unspecified after `lengths` tokens.
        auxiliary: tree of [B, K, T, ...], auxiliary values of the step that chose each token; None without any.

    Example:
        >>> found = Hypotheses(
        ...     tokens=jnp.array([[[5, 6, 2, 2]]]),
        ...     lengths=jnp.array([[3]]),
        ...     scores=jnp.array([[-1.5]]),
        ...     finished=jnp.array([[True]]),
        ...     log_probs=jnp.array([[[-0.5, -0.5, -0.5, 0.0]]]),
        ...     auxiliary=None,
        ... )
        >>> found.tokens[0, 0, : found.lengths[0, 0]].tolist()
        [5, 6, 2]
    """

    tokens: Int[Array, "B K T"]
    lengths: Int[Array, "B K"]
    scores: Float[Array, "B K"]
    finished: Bool[Array, "B K"]
    log_probs: Float[Array, "B K T"]
    auxiliary: Any
