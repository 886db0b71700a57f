"""Attention of a decoding step over a cache as one kernel for a GPU.

One run of the kernel computes one head of one beam, and writes its new key and value. The table of ancestors says which
beam's key to read at each slot. So only keys and values of the beam's own history are read, and only as far as its
sentence has come. The plain form reads the whole cache, and multiplies each query with the keys of all beams.

Legend: B sentences, K beams, N query heads, M key-value heads, T cache slots, H head dim.

References:
    Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", algorithm 3.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from flax_transformer.parallel.sharding_rules import num_shards, per_shard
from flax_transformer.shapes import MASKED

SLOTS = 32  # read in one turn of the loop
NUM_WARPS = 2


def serves(query_shape: tuple[int, ...], num_key_heads: int) -> bool:
    """Returns whether the kernel computes attention of queries [B, K, N, H] on each device."""
    head_dim = query_shape[3]
    splits = query_shape[0] % num_shards("batch") == 0 and num_key_heads % num_shards("heads") == 0
    return splits and 16 <= head_dim <= 256 and head_dim & (head_dim - 1) == 0


def _kernel(length: int, *refs: Any) -> None:
    position_ref, ancestors, query, key, value, keys, values, result, new_keys, new_values = refs
    position, beam = position_ref[0], pl.program_id(2)
    own = query[:].astype(jnp.float32)
    head_dim = own.shape[0]
    channels = jax.lax.broadcasted_iota(jnp.int32, (head_dim, SLOTS), 0)

    def turn(block: jax.Array, sums: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        highest, total, attended = sums
        slots = block * SLOTS + jax.lax.broadcasted_iota(jnp.int32, (SLOTS,), 0)
        filled = (slots < position) & (slots < length)
        wrote = triton.load(ancestors.at[slots], mask=filled, other=jnp.int32(0))
        beams, columns, read = (jnp.broadcast_to(x[None, :], (head_dim, SLOTS)) for x in (wrote, slots, filled))
        key = triton.load(keys.at[channels, beams, columns], mask=read, other=jnp.zeros((), keys.dtype))
        scores = jnp.where(filled, jnp.sum(own[:, None] * key.astype(jnp.float32), axis=0), MASKED)
        higher = jnp.maximum(highest, jnp.max(scores))
        weights = jnp.where(filled, jnp.exp(scores - higher), 0.0)
        shrink = jnp.exp(highest - higher)
        value = triton.load(values.at[beams, columns, channels], mask=read, other=jnp.zeros((), values.dtype))
        rounded = weights.astype(values.dtype).astype(jnp.float32)  # as in the product of the plain form
        attended = attended * shrink + jnp.sum(rounded[None, :] * value.astype(jnp.float32), axis=1)
        return higher, total * shrink + jnp.sum(weights), attended

    # The sums start with the token of this step, which each beam attends to.
    key, value = key[:].astype(keys.dtype), value[:].astype(values.dtype)
    start = (jnp.sum(own * key.astype(jnp.float32)), jnp.float32(1.0), value.astype(jnp.float32))
    num_blocks = (jnp.minimum(position, length) + SLOTS - 1) // SLOTS
    _, total, attended = jax.lax.fori_loop(0, num_blocks, turn, start)
    result[:] = (attended / total).astype(result.dtype)

    # Runs of the query heads that share a key-value head write the same numbers.
    row = jax.lax.broadcasted_iota(jnp.int32, (head_dim,), 0)
    inside = jnp.broadcast_to(position < length, (head_dim,))
    slot = jnp.broadcast_to(jnp.minimum(position, length - 1), (head_dim,))
    beams = jnp.broadcast_to(beam, (head_dim,))
    triton.store(new_keys.at[row, beams, slot], key, mask=inside)
    triton.store(new_values.at[beams, slot, row], value, mask=inside)


def decode_attention(
    query: Float[Array, "B K N H"],
    key: Float[Array, "B K M H"],
    value: Float[Array, "B K M H"],
    keys: Float[Array, "B M H K T"],
    values: Float[Array, "B M K T H"],
    positions: Int[Array, "B"],
    ancestors: Int[Array, "B K T"],
    interpret: bool = False,
) -> tuple[Float[Array, "B K N H"], Float[Array, "B M H K T"], Float[Array, "B M K T H"]]:
    """Returns attention of each beam over its history and its new token, and the cache with that token.

    The cache is changed in place. Each device computes its own sentences and heads.

    Args:
        query: scaled queries.
        key, value: of the token being decoded.
        keys, values: the cache of earlier tokens.
        positions: slot of the new token of each sentence; a slot beyond the cache is not written.
        ancestors: the beam that wrote each slot of each beam's history.
        interpret: whether JAX runs the kernel as plain operations, as in tests.
    """
    new, cache = ("batch", None, "heads", None), ("batch", "heads", None, None, None)

    def run(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(_run(*arrays, interpret=interpret))

    run = per_shard(run, (new, new, new, cache, cache, ("batch",), ("batch", None, None)), (new, cache, cache))
    return run(query, key, value, keys, values, positions, ancestors)


def _run(query, key, value, keys, values, positions, ancestors, *, interpret: bool) -> Any:
    sentences, beams, heads, head_dim = query.shape
    shared, length = heads // key.shape[2], keys.shape[4]
    of_query = pl.BlockSpec((None, None, None, head_dim), lambda b, n, k: (b, k, n, 0))
    of_key = pl.BlockSpec((None, None, None, head_dim), lambda b, n, k: (b, k, n // shared, 0))
    of_keys, of_values = (
        pl.BlockSpec((None, None, *x.shape[2:]), lambda b, n, k: (b, n // shared, 0, 0, 0)) for x in (keys, values)
    )
    run = pl.pallas_call(
        functools.partial(_kernel, length),
        grid=(sentences, heads, beams),
        in_specs=[
            pl.BlockSpec((1,), lambda b, n, k: (b,)),
            pl.BlockSpec((None, None, length), lambda b, n, k: (b, k, 0)),
            *(of_query, of_key, of_key, of_keys, of_values),
        ],
        out_specs=[of_query, of_keys, of_values],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, keys, values)],
        input_output_aliases={5: 1, 6: 2},
        compiler_params=None if interpret else triton.CompilerParams(num_warps=NUM_WARPS, num_stages=1),
        interpret=interpret,
        name="decode_attention",
    )
    return run(positions, ancestors, query, key, value, keys, values)
