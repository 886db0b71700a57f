"""Attention over long rows as JAX's splash kernels for a TPU: scores and weights stay in its fast memory.

The kernels come with JAX. They work in blocks of queries and keys, leave out blocks that a causal mask forbids, and
compute the weights again in the backward pass. Padding and packed pairs are segments. They have no dropout.

Legend: B batch, T query length, S key length, N query heads, M key-value heads, H head dim.

References:
    `jax.experimental.pallas.ops.tpu.splash_attention`.
    Dao et al. 2022, "FlashAttention", algorithms 1 and 4.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flax_transformer.parallel.sharding_rules import num_shards, per_shard

SMALLEST_BLOCK = 128  # lanes of a TPU
LARGEST_BLOCK = 512


def splash_serves(query_shape: tuple[int, ...], key_shape: tuple[int, ...]) -> bool:
    """Returns whether the kernels compute attention of queries [B, T, N, H] and keys [B, S, M, H] on each device."""
    batch, *lengths, heads, head_dim = query_shape[0], query_shape[1], *key_shape[1:]
    splits = batch % num_shards("batch") == 0 and heads % num_shards("heads") == 0
    channels_fit = head_dim % SMALLEST_BLOCK == 0 or head_dim == SMALLEST_BLOCK // 2
    return splits and channels_fit and all(length % SMALLEST_BLOCK == 0 for length in lengths)


def _block(length: int) -> int:
    """Returns the largest size of a block that divides a length."""
    size = LARGEST_BLOCK
    while length % size:
        size //= 2
    return size


def splash_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S M H"],
    value: Float[Array, "B S M H"],
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
    *,
    causal: bool,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Returns softmax(query key^T) value; each device computes its own sentences and heads.

    If a query may attend to no key, its result is finite.

    Args:
        query: N heads, scaled already.
        key, value: M heads; each serves N / M neighbouring query heads.
        query_segments, key_segments: a query attends to the keys of its own segment.
        causal: whether a query attends to no later position than its own.
        interpret: whether JAX runs the kernels as plain operations, as in tests.
    """
    heads, segments = ("batch", None, "heads", None), ("batch", None)

    def run(*arrays: jax.Array) -> tuple[jax.Array]:
        return (_attention(*arrays, causal=causal, interpret=interpret),)

    run = per_shard(run, (heads, heads, heads, segments, segments), (heads,))
    return run(query, key, value, query_segments, key_segments)[0]


def _attention(query, key, value, query_segments, key_segments, *, causal: bool, interpret: bool) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = query.shape[1], key.shape[1]
    mask = masks.CausalMask(shape) if causal else masks.FullMask(shape)
    rows, columns = map(_block, shape)
    sizes = kernels.BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_q_dkv=rows,
        block_kv_dkv=columns,
        block_q_dq=rows,
        block_kv_dq=columns,
    )
    attend = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * query.shape[2]),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def of_a_row(query, key, value, query_segments, key_segments) -> Any:
        return attend(query, key, value, kernels.SegmentIds(query_segments, key_segments))

    # [B, T, N, H] -> [B, N, T, H], as the kernels read it
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    made = jax.vmap(of_a_row)(query, key, value, query_segments, key_segments)
    return jnp.swapaxes(made, 1, 2).astype(value.dtype)
