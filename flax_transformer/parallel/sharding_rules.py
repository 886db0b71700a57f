"""Logical axis names of parameters and activations, and the one table that maps them to mesh axes.

Layers name their axes ("embed", "heads", ...); only this table knows what the mesh calls them. A parameter is a
`flax.nnx.Param` created with `logical_axes=(...)` metadata; layers stacked on a leading axis gain "layers" here.
"""

import math
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from flax_transformer.errors import ConfigError

P = jax.P

# Batches are split over data and fsdp; parameters over fsdp (along the model dim) and tensor (along what is wide).
MESH_AXES_OF: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "lookup_batch": "data",
    "length": None,
    "embed": "fsdp",
    "activation_embed": None,
    "mlp": "tensor",
    "heads": "tensor",
    "head_dim": None,
    "vocab": "tensor",
    "position": None,
    "norm": None,
    "layers": None,
    "gates": None,
    "recurrent": None,
}


def partition_spec(logical_axes: tuple[str | None, ...]) -> jax.P:
    """Returns the mesh axes for a tuple of logical axis names; `None` stays unsharded.

    Raises:
        KeyError: a name that the table does not have (a defect of a layer, never of the user's input).
    """
    return P(*(None if name is None else MESH_AXES_OF[name] for name in logical_axes))


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Returns `x`, told to the compiler to be sharded along `logical_axes`.

    The identity outside a mesh, and inside `jax.shard_map`, where the program of one device sees only its own share.
    """
    return jax.lax.with_sharding_constraint(x, partition_spec(logical_axes)) if _partitioned() else x


def num_shards(logical_axis: str) -> int:
    """Returns into how many parts `constrain` splits an axis of this name; 1 where it does nothing."""
    axes = MESH_AXES_OF[logical_axis]
    if axes is None or not _partitioned():
        return 1
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def _partitioned() -> bool:
    """Whether the program being traced is one for all devices, that the compiler splits."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and all(kind == AxisType.Auto for kind in mesh.axis_types)


def logical_axes_of(path: tuple[Any, ...], parameter: nnx.Variable) -> tuple[str | None, ...]:
    """Returns the logical name of each dimension of a parameter; "layers" stands first in a stack of layers.

    Args:
        path: where it stands in its model.
        parameter: with the metadata `logical_axes`.

    Raises:
        ValueError: the parameter has no `logical_axes`, or names for another number of dimensions.
    """
    axes = parameter.get_metadata().get("logical_axes")
    shape = parameter.get_value().shape
    name = "/".join(map(str, path))
    if axes is None:
        raise ValueError(f"parameter {name} has no logical_axes metadata")
    if len(axes) + 1 == len(shape):  # one of a stack of layers
        axes = ("layers", *axes)
    if len(axes) != len(shape):
        raise ValueError(f"parameter {name} has shape {shape} but logical axes {axes}")
    return axes


def parameter_specs(abstract_params: Any) -> dict[str, Any]:
    """Returns a nested dict of partition specs for the parameters, in the form of `nnx.to_pure_dict`.

    Args:
        abstract_params: the `nnx.State` of a model, of arrays or of shapes, whose variables carry `logical_axes`.

    Raises:
        ValueError: as `logical_axes_of`.
    """
    flat = [
        (path, partition_spec(logical_axes_of(path, variable))) for path, variable in nnx.to_flat_state(abstract_params)
    ]
    return nnx.to_pure_dict(nnx.from_flat_state(flat))


def parameter_shardings(abstract_params: Any, mesh: Mesh | AbstractMesh) -> dict[str, Any]:
    """Returns a nested dict of `NamedSharding`s, after checking that every sharded dimension divides evenly.

    Raises:
        ConfigError: a dimension that its mesh axis does not divide; names the parameter and both sizes.
    """
    specs = parameter_specs(abstract_params)
    shapes = nnx.to_pure_dict(abstract_params)

    def check(path, spec, array):
        for size, axes in zip(array.shape, spec, strict=True):
            axes = () if axes is None else (axes,) if isinstance(axes, str) else axes
            for axis in axes:
                if size % mesh.shape[axis]:
                    name = jax.tree_util.keystr(path, simple=True, separator="/")
                    raise ConfigError(
                        f"mesh.{axis} ({mesh.shape[axis]}) must divide every dimension that it shards, but parameter "
                        f"{name} has shape {tuple(array.shape)} and is sharded over {axis} in the dimension of size "
                        f"{size}. Choose mesh.{axis} among the divisors of {size}, or change the model's size."
                    )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(check, specs, shapes, is_leaf=lambda x: isinstance(x, P))
