"""Kernels for a GPU: residual connection, dropout and layer norm in one pass over the rows; see `residual_norm.py`.

A kernel reads all vectors as one array [3, D]: bias of the update, scale and bias of the norm. It writes the gradients
by them as one array, too. So few small kernels run beside it.

Legend: B batch, T length, D model dim, R rows of all sentences, W random words of a row, G groups of rows.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, UInt32

from flax_transformer.parallel.sharding_rules import per_shard

TILE_ELEMENTS = 1 << 13  # they fit the registers of one block of threads
TILES = 4  # tiles of one run of a kernel, whose sums over rows are written once
WIDEST = 2048


@dataclasses.dataclass(frozen=True)
class Settings:
    """The constants of a kernel.

    Attributes:
        epsilon: number that is added to the variance.
        threshold: number of the 256 values of a byte that keep an element; 256 keeps all.
        interpret: whether JAX runs the kernel as plain operations, as in tests.
    """

    epsilon: float
    threshold: int
    interpret: bool = False


def serves(dim: int) -> bool:
    """Returns whether the kernels compute rows of this length: a power of two, as Triton asks for."""
    return 64 <= dim <= WIDEST and dim & (dim - 1) == 0


@dataclasses.dataclass(frozen=True)
class _Tile:
    """Rows that are read at once.

    Attributes:
        first: their first row in the block.
        inside: [rows, D], whether the array has this row.
    """

    first: Any
    inside: jax.Array

    def load(self, ref: Any) -> jax.Array:
        """Returns the rows of an array; zeros beyond its end."""
        place = ref.at[pl.ds(self.first, self.inside.shape[0]), :]
        return triton.load(place, mask=self.inside, other=jnp.zeros((), ref.dtype))

    def store(self, ref: Any, x: jax.Array) -> None:
        """Writes the rows of an array."""
        triton.store(ref.at[pl.ds(self.first, self.inside.shape[0]), :], x.astype(ref.dtype), mask=self.inside)

    def drop(self, settings: Settings, words: Any, x: jax.Array) -> jax.Array:
        """Returns `x` after dropout. A word holds the bytes of four neighbouring elements."""
        if settings.threshold == 256:
            return x
        rows, columns = (jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in (0, 1))
        word = triton.load(words.at[self.first + rows, columns // 4], mask=self.inside, other=jnp.uint32(0))
        byte = (word >> (columns % 4 * 8).astype(jnp.uint32)) & jnp.uint32(255)
        kept = x * jnp.asarray(256 / settings.threshold, x.dtype)
        return jnp.where(byte < jnp.uint32(settings.threshold), kept, jnp.zeros((), x.dtype))


def _normalised(settings: Settings, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (x - mean) / deviation, and 1 / deviation with an axis of 1, of each row in float32."""
    wide = x.astype(jnp.float32)
    dim = x.shape[1]
    centred = wide - (jnp.sum(wide, axis=1) / dim)[:, None]
    inverse = jax.lax.rsqrt(jnp.sum(centred * centred, axis=1) / dim + settings.epsilon)[:, None]
    return centred * inverse, inverse


def _tile(number: int, num_rows: int, shape: tuple[int, int]) -> _Tile:
    """Returns a tile of this run.

    Args:
        number: its number in the run.
        num_rows: R.
        shape: its rows, and D.
    """
    first, left = number * shape[0], num_rows - pl.program_id(0) * TILES * shape[0]
    return _Tile(first, first + jax.lax.broadcasted_iota(jnp.int32, shape, 0) < left)


def _forward_kernel(settings: Settings, num_rows: int, shape: tuple[int, int], *refs: Any) -> None:
    x, update, vectors, words, residual, result = refs
    update_bias, scale, bias = (vectors[i, :][None, :] for i in range(3))
    for number in range(TILES):
        tile = _tile(number, num_rows, shape)
        sums = tile.load(x) + tile.drop(settings, words, tile.load(update) + update_bias.astype(x.dtype))
        tile.store(residual, sums)
        tile.store(result, _normalised(settings, sums)[0] * scale + bias)


def _backward_kernel(settings: Settings, num_rows: int, shape: tuple[int, int], *refs: Any) -> None:
    residual, vectors, words, cotangent, by_x, by_update, by_vectors = refs
    scale, dim = vectors[1, :][None, :], shape[1]
    totals = [jnp.zeros((dim,), jnp.float32)] * 3
    for number in range(TILES):
        tile = _tile(number, num_rows, shape)
        normalised, inverse = _normalised(settings, tile.load(residual))
        by_result = tile.load(cotangent).astype(jnp.float32)
        scaled = by_result * scale
        mean, inner = (jnp.sum(part, axis=1) / dim for part in (scaled, scaled * normalised))
        by_sums = ((scaled - mean[:, None] - normalised * inner[:, None]) * inverse).astype(by_x.dtype)
        dropped = tile.drop(settings, words, by_sums)
        tile.store(by_x, by_sums)
        tile.store(by_update, dropped)
        parts = (jnp.where(tile.inside, dropped.astype(jnp.float32), 0.0), by_result * normalised, by_result)
        totals = [total + jnp.sum(part, axis=0) for total, part in zip(totals, parts, strict=True)]
    for i, total in enumerate(totals):
        by_vectors[i, :] = total


def _call(settings: Settings, kernel: Any, name: str, arrays: tuple[jax.Array, ...], sums: bool) -> Any:
    """Runs a kernel over all rows. Returns the two arrays like the first one that it wrote, and the sums.

    Args:
        settings: constants.
        kernel: a kernel.
        name: its name in a profile.
        arrays: rows [B, T, _], and vectors [3, D].
        sums: whether it also writes an array of sums over rows, [G, 3, D].
    """
    shape, dim = arrays[0].shape, arrays[0].shape[2]
    num_rows, rows = shape[0] * shape[1], TILE_ELEMENTS // dim
    block, grid = rows * TILES, -(-num_rows // (rows * TILES))
    flat = [x.reshape(-1, x.shape[-1]) if x.ndim == 3 else x for x in arrays]

    def spec(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((block, width), lambda i: (i, 0))

    vectors, part = pl.BlockSpec((3, dim), lambda i: (0, 0)), pl.BlockSpec((None, 3, dim), lambda i: (i, 0, 0))
    made = pl.pallas_call(
        functools.partial(kernel, settings, num_rows, (rows, dim)),
        grid=(grid,),
        in_specs=[spec(x.shape[-1]) if x.ndim == 3 else vectors for x in arrays],
        out_specs=[*(spec(dim),) * 2, *(part,) * sums],
        out_shape=[
            *(jax.ShapeDtypeStruct(flat[0].shape, flat[0].dtype),) * 2,
            *(jax.ShapeDtypeStruct((grid, 3, dim), jnp.float32),) * sums,
        ],
        compiler_params=None if settings.interpret else triton.CompilerParams(num_warps=8, num_stages=1),
        interpret=settings.interpret,
        name=name,
    )(*flat)
    return tuple(x.reshape(shape) if i < 2 else x for i, x in enumerate(made))


_ROWS, _VECTORS, _GROUPS = ("batch", None, None), (None, None), ("batch", None, None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _residual_norm(settings: Settings, *arrays: jax.Array) -> jax.Array:
    return _forward(settings, *arrays)[0]


def _forward(settings, x, update, vectors, words):
    run = per_shard(
        lambda *arrays: _call(settings, _forward_kernel, "residual_norm", arrays, sums=False),
        (_ROWS, _ROWS, _VECTORS, _ROWS),
        (_ROWS, _ROWS),
    )
    sums, result = run(x, update, vectors, words)
    return result, (sums, vectors, words)


def _backward(settings, kept, cotangent):
    run = per_shard(
        lambda *arrays: _call(settings, _backward_kernel, "residual_norm_backward", arrays, sums=True),
        (_ROWS, _VECTORS, _ROWS, _ROWS),
        (_ROWS, _ROWS, _GROUPS),
    )
    by_x, by_update, parts = run(*kept, cotangent)
    return by_x, by_update, jnp.sum(parts, axis=0), None


_residual_norm.defvjp(_forward, _backward)


def residual_norm(
    settings: Settings,
    x: Float[Array, "B T D"],
    update: Float[Array, "B T D"],
    update_bias: Float[Array, "D"],
    scale: Float[Array, "D"],
    bias: Float[Array, "D"],
    words: UInt32[Array, "B T W"],
) -> Float[Array, "B T D"]:
    """Returns the result of `residual_norm.residual_norm`; gradients by vectors are summed in float32.

    Args:
        settings: constants.
        x, update, update_bias, scale, bias: as there.
        words: random words of dropout on the update; unread if all elements are kept.
    """
    vectors = jnp.stack([vector.astype(jnp.float32) for vector in (update_bias, scale, bias)])
    return _residual_norm(settings, x, update, vectors, words)
