"""The decoder of a search: three functions over a state. The search does not read that state.

Legend: B slots, K beams, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Bool, Float, Int

# (last tokens [B, K], state) -> logits [B, K, V], auxiliary values (tree of [B, K, ...], or None), state
Step = Callable[[Int[Array, "B K"], Any], tuple[Float[Array, "B K V"], Any, Any]]
# (state, parents [B, K]) -> state; its beam k of slot b is beam parents[b, k] of the old state
Reorder = Callable[[Any, Int[Array, "B K"]], Any]
# (state, which slots [B], sentences [B]) -> state; these slots are at the start of their sentences
Refill = Callable[[Any, Bool[Array, "B"], Int[Array, "B"]], Any]


@dataclass(frozen=True)
class DecoderFunctions:
    """The functions of a decoder that a search calls.

    The functions are traced into the program of the search. They close over the parameters and other arrays that no
    step changes. Arrays that steps change are in the state.

    Attributes:
        step: reads one token of each beam, and returns the logits of the next token. The search stores the auxiliary
            values beside the next token.
        reorder: moves beams within their slots. Sampling does not call it.
        refill: puts sentences into slots before their first step. Sampling does not call it.

    Example:
        >>> table = np.eye(3)  # each token is most probably followed by itself
        >>> functions = DecoderFunctions(
        ...     step=lambda tokens, state: (table[tokens], None, state),
        ...     reorder=lambda state, parents: state,
        ...     refill=lambda state, fresh, sentences: state,
        ... )
        >>> functions.step(np.array([[2]]), None)[0].tolist()
        [[[0.0, 0.0, 1.0]]]
    """

    step: Step
    reorder: Reorder
    refill: Refill
