"""Attention of a decoding step over cached keys and values. Only this file knows the layout of the caches.

Self-attention. Keys and values stay where they were written when beams are reordered. A table of ancestors says which
beam wrote each position of each beam's history. A query is multiplied with the keys of all beams of its sentence. Beams
that are not its ancestors get weight 0. Nothing is copied, and each key is read once for all beams. The products do K
times the arithmetic, which is cheap for small K. Beams that are never reordered, such as samples, need no table. They
attend only to what they wrote themselves.

On a CPU a cache is split into blocks, and a step reads only the blocks that some slot has reached. Each block is an
array of its own, since XLA would copy a slice before reading it. A CPU also keeps a bfloat16 cache as float32.
Otherwise XLA converts the whole cache for each written token (docs/lab_book.md, "Caches of bfloat16 in float32").

On a GPU one kernel reads the history of each beam as far as it goes; see `decode_attention.py`.

Cross-attention. Keys and values are stored once for each sentence. Its K beams take the place of the query axis.

Legend: B sentences, K beams, N query heads, M key-value heads, T cache slots, C slots of a block, S source length,
H head dim.

References:
    The table of ancestors: `cache_indirection` in NVIDIA's FasterTransformer.
    Attention by blocks: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", algorithm 3.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flax_transformer import backend
from flax_transformer.ops.attention import cap_scores, masked_softmax, repeat_heads, scale_query
from flax_transformer.ops.attention_mask import AttentionMask
from flax_transformer.ops.product import accumulation_dtype
from flax_transformer.shapes import MASKED, array_tree

# On a CPU the first two blocks have this many slots. Each later block is twice as long as the one before.
SHORTEST_BLOCK: int = 16


@array_tree
@dataclasses.dataclass(frozen=True)
class SelfAttentionCache:
    """Keys and values of the tokens decoded so far, for one layer, by the beam that wrote them.

    Attributes:
        keys: blocks [B, M, H, K, C], in the layout of the product with queries. Their C sum to T.
        values: blocks [B, M, K, C, H], in the layout of the product with weights.
    """

    keys: tuple[Float[Array, "B M H K _"], ...]
    values: tuple[Float[Array, "B M K _ H"], ...]


@array_tree
@dataclasses.dataclass(frozen=True)
class CrossAttentionCache:
    """Keys and values of the encoder's output, for one layer, shared by all beams of a sentence."""

    keys: Float[Array, "B M H S"]
    values: Float[Array, "B M S H"]


# --- making caches, and the choice of their form


def block_lengths(length: int) -> tuple[int, ...]:
    """Returns the number of slots in each block.

    There is one block, except on a CPU, where a branch for each block is cheap.
    """
    if backend.platform() != "cpu":
        return (length,)
    lengths: list[int] = []
    while sum(lengths) < length:
        lengths.append(min(max(sum(lengths), SHORTEST_BLOCK), length - sum(lengths)))
    return tuple(lengths)


def empty_self_attention_cache(
    num_sentences: int, num_beams: int, num_heads: int, length: int, head_dim: int, dtype: jnp.dtype
) -> SelfAttentionCache:
    """Returns a cache of zeros with `length` slots and `num_heads` key-value heads, for products in `dtype`."""
    dtype = accumulation_dtype(dtype)
    lengths = block_lengths(length)
    return SelfAttentionCache(
        tuple(jnp.zeros((num_sentences, num_heads, head_dim, num_beams, block), dtype) for block in lengths),
        tuple(jnp.zeros((num_sentences, num_heads, num_beams, block, head_dim), dtype) for block in lengths),
    )


def cross_attention_cache(keys: Float[Array, "B S M H"], values: Float[Array, "B S M H"]) -> CrossAttentionCache:
    """Returns the projections of the encoder's output in the layout of a cache."""
    keys, values = (x.astype(accumulation_dtype(x.dtype)) for x in (keys, values))
    return CrossAttentionCache(jnp.transpose(keys, (0, 2, 3, 1)), jnp.swapaxes(values, 1, 2))


# --- writing


def write_ancestors(ancestors: Int[Array, "B K T"], positions: Int[Array, "B"]) -> Int[Array, "B K T"]:
    """Returns the table after each beam has written its token."""
    here = (jnp.arange(ancestors.shape[2])[None, :] == positions[:, None])[:, None, :]
    return jnp.where(here, jnp.arange(ancestors.shape[1])[None, :, None], ancestors)


def _write(
    cache: SelfAttentionCache, key: Float[Array, "B K M H"], value: Float[Array, "B K M H"], positions: Int[Array, "B"]
) -> SelfAttentionCache:
    """Returns the cache with one token of each beam written at its sentence's position."""
    rows = jnp.arange(key.shape[0])
    key, value = jnp.transpose(key, (0, 2, 3, 1)), jnp.swapaxes(value, 1, 2)  # [B, M, H, K] and [B, M, K, H]
    key, value = key.astype(cache.keys[0].dtype), value.astype(cache.values[0].dtype)
    offset, keys, values = 0, [], []
    for old_keys, old_values in zip(cache.keys, cache.values, strict=True):
        slots = old_values.shape[3]
        place = jnp.where(positions < offset, slots, positions - offset)  # a place beyond the block is dropped
        keys.append(old_keys.at[rows, :, :, :, place].set(key, mode="drop"))
        values.append(old_values.at[rows, :, :, place].set(value, mode="drop"))
        offset += slots
    return SelfAttentionCache(tuple(keys), tuple(values))


# --- self-attention


def _block_scores(query: jax.Array, keys: jax.Array, wrote: jax.Array | None) -> Float[Array, "B N K C"]:
    """Returns each beam's scores for the keys that its ancestors wrote in a block."""
    if wrote is None:
        return jnp.einsum("bnkh,bnhkc->bnkc", query, keys, preferred_element_type=jnp.float32)
    sentences, heads, head_dim, beams, _ = keys.shape
    keys = keys.reshape(sentences, heads, head_dim, -1)  # [B, N, H, K * C]
    scores = jnp.einsum("bnqh,bnhj->bnqj", query, keys, preferred_element_type=jnp.float32)
    scores = scores.reshape(sentences, heads, beams, beams, -1)
    return jnp.sum(jnp.where(wrote, scores, 0.0), axis=3)


def _block_sums(weights: jax.Array, values: jax.Array, wrote: jax.Array | None) -> Float[Array, "B N K H"]:
    """Returns each beam's weighted sum of the values that its ancestors wrote in a block."""
    weights = weights.astype(values.dtype)
    if wrote is None:
        return jnp.einsum("bnkc,bnkch->bnkh", weights, values, preferred_element_type=jnp.float32)
    sentences, heads, beams, _, head_dim = values.shape
    spread = jnp.where(wrote, weights[:, :, :, None], jnp.zeros((), weights.dtype))
    spread, values = spread.reshape(sentences, heads, beams, -1), values.reshape(sentences, heads, -1, head_dim)
    return jnp.einsum("bnqj,bnjh->bnqh", spread, values, preferred_element_type=jnp.float32)


def cached_self_attention(
    cache: SelfAttentionCache,
    query: Float[Array, "B K N H"],
    key: Float[Array, "B K M H"],
    value: Float[Array, "B K M H"],
    positions: Int[Array, "B"],
    ancestors: Int[Array, "B K T"] | None,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    window: int | None = None,
) -> tuple[Float[Array, "B K N H"], SelfAttentionCache]:
    """Writes one token of each beam. Returns attention over the tokens of the beam's ancestors, and the cache.

    A block with no visible key adds exact zeros. So the number of blocks that other sentences need changes no bit. The
    scores have no bias, unlike those of `attention`.

    Args:
        cache: keys and values of earlier steps.
        query, key, value: projections of the token being decoded.
        positions: slot to write, per sentence.
        ancestors: the beam that wrote each position of each beam's history, this step included. None if beams are
            never reordered.
        scale: factor on the products; 1 / sqrt(H) when None.
        soft_cap: see `attention`.
        window: number of slots before its own that a query sees; None for all.
    """
    query = scale_query(query, scale).astype(cache.keys[0].dtype)
    plain = functools.partial(_self_attention, soft_cap=soft_cap, window=window)
    arguments = (cache, query, key, value, positions, ancestors)
    if backend.uses_kernels("gpu") and soft_cap is None and window is None and _suits_kernel(cache, query):
        # The program of a GPU may also be run elsewhere, in tests.
        return jax.lax.platform_dependent(*arguments, cuda=_fused_self_attention, default=plain)
    return plain(*arguments)


def _suits_kernel(cache: SelfAttentionCache, query: Float[Array, "B K N H"]) -> bool:
    """Returns whether a kernel computes this step (docs/lab_book.md, "Attention of a decoding step as one kernel")."""
    from flax_transformer.ops import decode_attention  # Pallas takes time to import; only a GPU needs it

    return len(cache.keys) == 1 and decode_attention.serves(query.shape, cache.keys[0].shape[1])


def _fused_self_attention(cache, query, key, value, positions, ancestors):
    from flax_transformer.ops.decode_attention import decode_attention

    beams, length = cache.values[0].shape[2:4]
    if ancestors is None:  # each beam has written its own history
        own = jnp.arange(beams, dtype=jnp.int32)[None, :, None]
        ancestors = jnp.broadcast_to(own, (query.shape[0], beams, length))
    attended, keys, values = decode_attention(query, key, value, cache.keys[0], cache.values[0], positions, ancestors)
    return attended.astype(value.dtype), SelfAttentionCache((keys,), (values,))


def _self_attention(
    cache: SelfAttentionCache,
    query: Float[Array, "B K N H"],
    key: Float[Array, "B K M H"],
    value: Float[Array, "B K M H"],
    positions: Int[Array, "B"],
    ancestors: Int[Array, "B K T"] | None,
    *,
    soft_cap: float | None,
    window: int | None,
) -> tuple[Float[Array, "B K N H"], SelfAttentionCache]:
    """Returns `cached_self_attention` of scaled queries, block by block."""
    cache = _write(cache, key, value, positions)
    sentences, beams, heads, head_dim = query.shape
    query = jnp.swapaxes(query, 1, 2)  # [B, N, K, H]
    furthest = jnp.max(positions)

    def attend(sums: Any, keys: jax.Array, values: jax.Array, filled: jax.Array, wrote: jax.Array | None) -> Any:
        """Returns the running maximum, the sum of exp(score - maximum), and the same sum weighted by the values."""
        keys, values = repeat_heads(keys, heads, 1), repeat_heads(values, heads, 1)
        highest, total, attended = sums
        scores = jnp.where(filled, cap_scores(_block_scores(query, keys, wrote), soft_cap), MASKED)
        higher = jnp.maximum(highest, jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.where(filled, jnp.exp(scores - higher), 0.0)
        shrink = jnp.exp(highest - higher)
        total = total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
        return higher, total, attended * shrink + _block_sums(weights, values, wrote)

    zeros = jnp.zeros((sentences, heads, beams, 1), jnp.float32)
    sums = (zeros + MASKED, zeros, jnp.zeros((sentences, heads, beams, head_dim), jnp.float32))
    offset = 0
    for keys, values in zip(cache.keys, cache.values, strict=True):
        end = offset + keys.shape[4]
        slots, here = jnp.arange(offset, end)[None, None, None, :], positions[:, None, None, None]
        filled = slots <= here if window is None else (slots <= here) & (slots >= here - window)
        wrote = None
        if ancestors is not None:  # wrote[b, 0, i, j, c]: whether beam j wrote slot c of beam i's history
            wrote = ancestors[:, None, :, None, offset:end] == jnp.arange(beams)[None, None, None, :, None]
        block = (keys, values, filled, wrote)
        if offset == 0:
            sums = attend(sums, *block)
        else:
            sums = jax.lax.cond(furthest >= offset, attend, lambda sums, *_: sums, sums, *block)
        offset = end
    _, total, attended = sums
    return jnp.swapaxes(attended / total, 1, 2).astype(value.dtype), cache


# --- cross-attention


def cached_cross_attention(
    cache: CrossAttentionCache,
    query: Float[Array, "B K N H"],
    mask: AttentionMask,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> tuple[Float[Array, "B K N H"], Float[Array, "B N K S"]]:
    """Returns attention of each beam over the source, and its weights. Beams take the place of the query axis.

    The scores have no bias, unlike those of `attention`.

    Args:
        cache: keys and values of the source.
        query: projection of the token being decoded.
        mask: padding of the source, so that all beams see the same keys.
        scale: factor on the products; 1 / sqrt(H) when None.
        soft_cap: see `attention`.

    Raises:
        ValueError: the mask has query segments, an order or a window.
    """
    if not mask.is_padding_only:
        raise ValueError(
            "the mask of cached cross-attention must be of padding alone, since beams take the place of its queries; "
            "give AttentionMask(key_segments=...)."
        )
    dtype, heads = query.dtype, query.shape[2]
    query = jnp.swapaxes(scale_query(query, scale), 1, 2).astype(cache.keys.dtype)
    keys, values = repeat_heads(cache.keys, heads, 1), repeat_heads(cache.values, heads, 1)
    scores = jnp.einsum("bnqh,bnhs->bnqs", query, keys, preferred_element_type=jnp.float32)
    weights = masked_softmax(cap_scores(scores, soft_cap), mask.materialize(1, keys.shape[3]))
    attended = jnp.einsum("bnqs,bnsh->bnqh", weights.astype(values.dtype), values)
    return jnp.swapaxes(attended.astype(dtype), 1, 2), weights
