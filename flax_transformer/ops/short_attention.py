"""Attention over short rows as one kernel for a GPU: scores and weights never leave the chip.

The plain form writes and reads arrays of [B, N, T, S] several times in each direction. It also turns queries, keys and
values round before each product. These kernels read projections as they were written, and write only the result. One
run of a kernel computes one head of one sentence, with all its scores at once; see `serves` for the sizes. The
backward kernel computes the weights again (docs/lab_book.md, "Attention over short rows as one kernel").

Random bits are drawn outside, in the order of `dropout`, so the results equal those of the reference with the same key.
The kernels add the biases of the projections, and sum their gradients over each row.

Legend: B batch, T query length, S key length, N heads, H head dim, P projections in one array, W random words of a row
of weights.

References:
    Dao et al. 2022, "FlashAttention", algorithms 1 and 4, for one block of queries and one of keys.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int, UInt32

from flax_transformer.parallel.sharding_rules import per_shard
from flax_transformer.shapes import MASKED

LONGEST = 128  # a tile of scores and its gradient fit the registers of one block of threads
SHORTEST = 16  # the least size of a side in a product of tensor cores


@dataclasses.dataclass(frozen=True)
class Settings:
    """The constants of a kernel.

    Attributes:
        causal: whether a query attends to no later position than its own.
        scale: factor on the products of queries and keys.
        threshold: number of the 256 values of a byte that keep a weight; 256 keeps all.
        interpret: whether JAX runs the kernel as plain operations, as in tests.
    """

    causal: bool
    scale: float
    threshold: int
    interpret: bool = False


def serves(query_length: int, key_length: int, head_dim: int) -> bool:
    """Returns whether the kernels compute attention of these sizes."""
    sizes_fit = max(query_length, key_length) <= LONGEST and SHORTEST <= head_dim <= LONGEST
    return sizes_fit and head_dim & (head_dim - 1) == 0


# --- Kernels


def _side(length: int) -> int:
    """Returns the length of a tile's side: a power of two, as Triton asks for."""
    return max(SHORTEST, 1 << (length - 1).bit_length())


def _load(ref: Any, length: int, part: int | None = None) -> jax.Array:
    """Returns a tile whose rows from `length` on are zeros; of an array of projections one `part`."""
    place = ref if part is None else ref.at[:, pl.ds(part, 1), :]
    inside = jax.lax.broadcasted_iota(jnp.int32, place.shape, 0) < length
    x = triton.load(place, mask=inside, other=jnp.zeros((), ref.dtype))
    return x if part is None else x.reshape(x.shape[0], x.shape[2])


def _store(ref: Any, x: jax.Array, length: int, part: int | None = None) -> jax.Array:
    """Writes the first `length` rows of a tile. Returns the sum over them, in float32."""
    place = ref if part is None else ref.at[:, pl.ds(part, 1), :]
    x = x.astype(ref.dtype)
    stored = x.reshape(place.shape)
    triton.store(place, stored, mask=jax.lax.broadcasted_iota(jnp.int32, stored.shape, 0) < length)
    inside = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) < length
    return jnp.sum(jnp.where(inside, x, jnp.zeros((), x.dtype)).astype(jnp.float32), axis=0)


def _parts(refs: Any) -> list[tuple[Any, int]]:
    """Returns array and place of query, key and value, or of their biases, in one array of all or in two."""
    return [(ref, part) for ref in refs for part in range(ref.shape[-2])]


class _Tiles:
    """What both kernels read first: queries, keys and values with their biases, weights, and dropout.

    Attributes:
        query, key, value: tiles of one head.
        weights: softmax of the scores, in float32.
        kept: factor of dropout on each weight, or None.
    """

    def __init__(self, settings: Settings, lengths: tuple[int, int], refs: list[Any]):
        projections, (query_segments, key_segments, words) = refs[:-3], refs[-3:]
        half = len(projections) // 2
        tiles, biases = _parts(projections[:half]), _parts(projections[half:])
        self.query, self.key, self.value = (
            _load(ref, length, part) + bias[of_bias, :].astype(ref.dtype)[None, :]
            for (ref, part), (bias, of_bias), length in zip(tiles, biases, (*lengths, lengths[1]), strict=True)
        )
        segments = _load(query_segments, lengths[0]), _load(key_segments, lengths[1])
        self.weights = _weights(settings, self.query, self.key, *segments)
        self.kept = None
        if settings.threshold < 256:
            self.kept = _kept(settings, words, (self.query.shape[0], self.key.shape[0]), lengths)

    def dropped(self, x: jax.Array) -> jax.Array:
        """Returns `x` after dropout."""
        return x if self.kept is None else x * self.kept


def _weights(settings: Settings, query, key, query_segments, key_segments) -> jax.Array:
    """Returns the softmax of the scores; a row without an allowed key is zeros."""
    scores = triton.dot(query, key, trans_b=True) * settings.scale
    allowed = (query_segments[:, None] == key_segments[None, :]) & (key_segments > 0)[None, :]
    if settings.causal:
        rows, columns = (jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in (0, 1))
        allowed = allowed & (rows >= columns)
    scores = jnp.where(allowed, scores, MASKED)
    exponentials = jnp.where(allowed, jnp.exp(scores - jnp.max(scores, axis=1)[:, None]), 0.0)
    total = jnp.sum(exponentials, axis=1)
    return exponentials / jnp.where(total == 0.0, 1.0, total)[:, None]


def _kept(settings: Settings, words: Any, shape: tuple[int, int], lengths: tuple[int, int]) -> jax.Array:
    """Returns the factor of dropout on each weight. A word holds the bytes of four neighbouring keys."""
    rows, columns = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    inside = (rows < lengths[0]) & (columns < lengths[1])
    word = triton.load(words.at[rows, columns // 4], mask=inside, other=jnp.uint32(0))
    byte = (word >> (columns % 4 * 8).astype(jnp.uint32)) & jnp.uint32(255)
    return jnp.where(byte < jnp.uint32(settings.threshold), 256 / settings.threshold, 0.0)


def _forward_kernel(settings: Settings, lengths: tuple[int, int], *refs: Any) -> None:
    *read, result = refs
    tiles = _Tiles(settings, lengths, read)
    weights = tiles.dropped(tiles.weights).astype(tiles.value.dtype)
    _store(result, triton.dot(weights, tiles.value), lengths[0])


def _backward_kernel(settings: Settings, lengths: tuple[int, int], num_read: int, *refs: Any) -> None:
    tiles = _Tiles(settings, lengths, list(refs[: num_read - 1]))
    cotangent = _load(refs[num_read - 1], lengths[0])
    by_weights = tiles.dropped(triton.dot(cotangent, tiles.value, trans_b=True))
    inner = jnp.sum(tiles.weights * by_weights, axis=1)
    by_scores = (tiles.weights * (by_weights - inner[:, None]) * settings.scale).astype(tiles.query.dtype)
    weights = tiles.dropped(tiles.weights).astype(cotangent.dtype)
    made = (
        (triton.dot(by_scores, tiles.key), lengths[0]),
        (triton.dot(by_scores, tiles.query, trans_a=True), lengths[1]),
        (triton.dot(weights, cotangent, trans_a=True), lengths[1]),
    )
    written = refs[num_read:]
    places, sums = _parts(written[: len(written) // 2]), _parts(written[len(written) // 2 :])
    for (x, length), (ref, part), (total, of_total) in zip(made, places, sums, strict=True):
        total[of_total, :] = _store(ref, x, length, part)


# --- Calls of the kernels


class _Arguments(NamedTuple):
    """Arrays that the kernels read; see `short_attention`."""

    projections: Any
    biases: Any
    query_segments: Any
    key_segments: Any
    words: Any

    def specs(self) -> "_Arguments":
        """Returns the block that each run reads of each array."""
        head_dim = self.projections[0].shape[4]
        query, key = self.query_segments, self.key_segments
        lengths = [query.shape[1], key.shape[1]][-len(self.projections) :]
        return _Arguments(
            tuple(
                pl.BlockSpec((None, _side(length), x.shape[2], None, head_dim), lambda b, n: (b, 0, 0, n, 0))
                for x, length in zip(self.projections, lengths, strict=True)
            ),
            tuple(pl.BlockSpec((x.shape[0], None, head_dim), lambda b, n: (0, n, 0)) for x in self.biases),
            pl.BlockSpec((None, _side(query.shape[1])), lambda b, n: (b, 0)),
            pl.BlockSpec((None, _side(key.shape[1])), lambda b, n: (b, 0)),
            pl.BlockSpec((None, None, *self.words.shape[2:]), lambda b, n: (b, n, 0, 0)),
        )


def _run(settings: Settings, kernel: Any, grid: tuple[int, int], lengths: tuple[int, int], **options: Any) -> Any:
    """Returns the function of arrays that runs a kernel for each sentence and head."""
    num_warps = 4 if max(lengths) <= LONGEST // 2 else 8  # a thread holds a share of the tile in registers
    parameters = None if settings.interpret else triton.CompilerParams(num_warps=num_warps, num_stages=1)
    return pl.pallas_call(kernel, grid=grid, compiler_params=parameters, interpret=settings.interpret, **options)


def _result(arguments: _Arguments) -> tuple[tuple[int, int], jax.ShapeDtypeStruct, pl.BlockSpec]:
    """Returns sentences and heads; shape of the result; and the block that a run writes of it, or reads of its like."""
    query = arguments.projections[0]
    batch, length, _, heads, head_dim = query.shape
    spec = pl.BlockSpec((None, _side(length), None, head_dim), lambda b, n: (b, 0, n, 0))
    return (batch, heads), jax.ShapeDtypeStruct((batch, length, heads, head_dim), query.dtype), spec


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(settings: Settings, arguments: _Arguments) -> jax.Array:
    grid, made, spec = _result(arguments)
    lengths = arguments.query_segments.shape[1], arguments.key_segments.shape[1]
    run = _run(
        settings,
        functools.partial(_forward_kernel, settings, lengths),
        grid,
        lengths,
        in_specs=jax.tree.leaves(arguments.specs()),
        out_specs=spec,
        out_shape=made,
        name="short_attention",
    )
    return run(*jax.tree.leaves(arguments))


def _forward(settings, arguments):
    return _attention(settings, arguments), arguments


def _backward(settings, arguments, cotangent):
    grid, _, spec = _result(arguments)
    lengths = arguments.query_segments.shape[1], arguments.key_segments.shape[1]
    read, specs = (*jax.tree.leaves(arguments), cotangent), arguments.specs()
    batch, heads = grid
    sums = [jax.ShapeDtypeStruct((batch, len(x), heads, x.shape[2]), jnp.float32) for x in arguments.biases]
    of_sums = [pl.BlockSpec((None, x.shape[1], None, x.shape[3]), lambda b, n: (b, 0, n, 0)) for x in sums]
    run = _run(
        settings,
        functools.partial(_backward_kernel, settings, lengths, len(read)),
        grid,
        lengths,
        in_specs=[*jax.tree.leaves(specs), spec],
        out_specs=[*specs.projections, *of_sums],
        out_shape=[*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arguments.projections), *sums],
        name="short_attention_backward",
    )
    made = run(*read)
    half = len(made) // 2
    by_biases = (jnp.sum(x, axis=0).astype(bias.dtype) for x, bias in zip(made[half:], arguments.biases, strict=True))
    return (_Arguments(tuple(made[:half]), tuple(by_biases), None, None, None),)


_attention.defvjp(_forward, _backward)


def short_attention(
    settings: Settings,
    projections: tuple[Float[Array, "B _ _ N H"], ...],
    biases: tuple[Float[Array, "_ N H"], ...],
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
    words: UInt32[Array, "B N _ _"],
) -> Float[Array, "B T N H"]:
    """Returns attention as `reference_attention` does; each device computes its own sentences and heads.

    Args:
        settings: constants.
        projections: one array [B, T, 3, N, H] of queries, keys and values; or queries [B, T, 1, N, H] with keys and
            values [B, S, 2, N, H]. They are without their biases.
        biases: their biases, [P, N, H] for each array. Gradients by them are summed in float32.
        query_segments, key_segments: a query attends to the keys of its own segment, and to no key of segment 0.
        words: [B, N, T, W] random words of dropout on the weights; unread if all are kept.
    """
    rows, vector = ("batch", None, None, "heads", None), (None, "heads", None)
    num = len(projections)
    in_axes = (*(rows,) * num, *(vector,) * num, *(("batch", None),) * 2, ("batch", "heads", None, None))

    def run(*flat: jax.Array) -> tuple[jax.Array]:
        return (_attention(settings, _Arguments(flat[:num], flat[num : 2 * num], *flat[2 * num :])),)

    run = per_shard(run, in_axes, (("batch", None, "heads", None),))
    return run(*projections, *biases, query_segments, key_segments, words)[0]
