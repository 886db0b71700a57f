"""Attention masks. Boolean, True means "may attend", broadcastable to [B, N, T, S]; built here and nowhere else.

Legend: B batch, N heads, T query length, S key length.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def segment_mask(query_segments: Int[Array, "B T"], key_segments: Int[Array, "B S"]) -> Bool[Array, "B 1 T S"]:
    """Returns True where query and key belong to the same segment and the key is not padding (segment 0).

    With one pair a row this is the padding mask; with several pairs packed into a row it also keeps them apart.

    Example: queries in segments [1, 2, 0] and keys in segments [1, 1, 2, 0] give
        1 1 0 0
        0 0 1 0
        0 0 0 0
    """
    same = query_segments[:, :, None] == key_segments[:, None, :]
    return (same & (key_segments > 0)[:, None, :])[:, None]


def causal_mask(length: int) -> Bool[Array, "1 1 T T"]:
    """Returns True where the key is not later than the query: the lower triangle with its diagonal."""
    index = jnp.arange(length)
    return (index[:, None] >= index[None, :])[None, None]
