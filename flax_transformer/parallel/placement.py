"""Arrays on the devices of a mesh that may belong to several processes.

Each process holds a part of a global array. It makes a global array from a NumPy array that all processes have.
"""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding

from flax_transformer.parallel.mesh import MeshConfig, make_mesh, replicated_sharding


def spans_processes(mesh: Mesh) -> bool:
    """Returns whether some devices of a mesh belong to another process."""
    return not replicated_sharding(mesh).is_fully_addressable


def local_mesh(mesh: Mesh) -> Mesh:
    """Returns the mesh of this process's devices in `mesh`, with all of them along "data"; `mesh` itself if all are."""
    if not spans_processes(mesh):
        return mesh
    return make_mesh(MeshConfig(), list(mesh.local_devices))


def put(tree: Any, sharding: Sharding) -> Any:
    """Returns NumPy arrays as arrays of JAX in a sharding. All processes have the same NumPy arrays."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    # `jax.device_put` would gather every array from all processes, and compare.
    return jax.tree.map(lambda a: jax.make_array_from_callback(a.shape, sharding, functools.partial(_part, a)), tree)


def _part(array: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
    return array[index]


def placed(tree: Any, shardings: Any) -> Any:
    """Returns arrays, or their shapes, in the shardings of a tree of the same structure."""

    def place(leaf: Any, sharding: NamedSharding) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return put(leaf, sharding) if isinstance(leaf, np.ndarray) else jax.device_put(leaf, sharding)

    return jax.tree.map(place, tree, shardings)


def replicated(tree: Any, mesh: Mesh) -> Any:
    """Returns arrays, or their shapes, with a copy on every device of a mesh.

    Args:
        tree: arrays on the devices of a mesh that has all devices of `mesh`, arrays of NumPy, or shapes.
        mesh: the devices. If it has only devices of this process, and the arrays have more, all processes must call.
    """
    sharding = replicated_sharding(mesh)

    def place(leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return put(leaf, sharding) if isinstance(leaf, np.ndarray) else jax.device_put(leaf, sharding)
        whole = _whole(leaf)
        if not sharding.is_fully_addressable:
            return whole
        parts = {shard.device: shard.data for shard in whole.addressable_shards}
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, [parts[d] for d in mesh.devices.flat])

    return jax.tree.map(place, tree)


def fetch(tree: Any) -> Any:
    """Returns arrays as NumPy arrays. All processes must call it for an array that spans processes."""

    def of(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = _whole(leaf).addressable_data(0)
        return np.asarray(leaf)

    return jax.tree.map(of, tree)


def _whole(array: jax.Array) -> jax.Array:
    """Returns a global array with a copy on every device."""
    if array.is_fully_replicated:
        return array
    assert isinstance(array.sharding, NamedSharding), "arrays of several processes lie on a mesh"
    return _copied(replicated_sharding(array.sharding.mesh))(array)


@functools.cache
def _copied(sharding: NamedSharding) -> Any:
    """Returns the jitted identity that copies an array to every device."""
    return jax.jit(lambda x: x, out_shardings=sharding)
