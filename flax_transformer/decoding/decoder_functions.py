"""A decoder as a search sees it: three functions over a state whose content the search does not know.

Legend: B slots, K beams, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Bool, Float, Int

# (last tokens [B, K], state) -> logits [B, K, V], auxiliary values of the token (tree of [B, K, ...], or None), state
Step = Callable[[Int[Array, "B K"], Any], tuple[Float[Array, "B K V"], Any, Any]]
# (state, parents [B, K]) -> the state whose beam k is beam parents[b, k] of the old one
Reorder = Callable[[Any, Int[Array, "B K"]], Any]
# (state, which slots [B], sentences [B]) -> the state with these slots at the start of their sentences
Refill = Callable[[Any, Bool[Array, "B"], Int[Array, "B"]], Any]


@dataclass(frozen=True)
class DecoderFunctions:
    """The functions of a decoder that a search calls.

    The functions are traced into the program of the search. Arrays that they close over, such as parameters, belong to
    that program. Arrays that steps change belong to the state.

    Attributes:
        step: reads one token of each beam, and returns the logits of the next one. The search stores the auxiliary
            values beside that token.
        reorder: moves beams within their slots. Sampling does not call it.
        refill: puts sentences into slots, before the first step of each. Sampling does not call it.
    """

    step: Step
    reorder: Reorder
    refill: Refill
