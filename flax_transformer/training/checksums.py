"""Checksums of arrays. The devices of an array compute its checksum, which does not depend on its sharding."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from flax_transformer.parallel.placement import fetch


@functools.cache
def _jit_leaf_checksum() -> Any:
    """Returns the checksum of one array, which is traced once for all arrays of a shape and a type."""
    return jax.jit(_leaf_checksum)


def _leaf_checksum(leaf: jax.Array) -> jax.Array:
    """Returns two uint32 sums over all elements, of a hash of each element's bits and place."""
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{leaf.dtype.itemsize * 8}")).astype(jnp.uint32)
    place = jnp.zeros(leaf.shape, jnp.uint32)
    for dim, size in enumerate(leaf.shape):  # indices by dimension keep a sharded leaf in its place
        place = place * jnp.uint32(size % (1 << 32)) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, dim)

    def mix(x):  # the finaliser of MurmurHash3, by Austin Appleby
        x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
        return x ^ (x >> 16)

    mixed = mix(bits ^ mix(place + jnp.uint32(0x9E3779B9)))
    return jnp.stack([jnp.sum(mixed, dtype=jnp.uint32), jnp.sum(mix(mixed + jnp.uint32(1)), dtype=jnp.uint32)])


@functools.cache
def _jit_checksums() -> Any:
    return jax.jit(lambda leaves: [_jit_leaf_checksum()(leaf) for leaf in leaves])


def checksums(tree: Any) -> dict[str, str]:
    """Returns a checksum of each array of a tree, by its path. It does not depend on sharding or device."""
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(tree), strict=True)
    sums = fetch(_jit_checksums()(list(leaves)))
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]
    return {name: f"{int(a):08x}{int(b):08x}" for name, (a, b) in zip(names, sums, strict=True)}
