"""Logical axis names of parameters and activations, and the table that maps them to mesh axes.

Layers name their axes "embed", "heads" and so on. Only this table knows the axes of the mesh. A parameter is a
`flax.nnx.Param` with the metadata `logical_axes`. A stack of layers has a leading axis "layers", which is added here.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Generator, Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from flax_transformer.errors import ConfigError

P = jax.P

# Batches are split over data and fsdp. Parameters are split over fsdp along the model dim, and over tensor along their
# wide dimension.
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

# A step of a search has few rows. So rows move to the parameters, and no parameter is gathered.
STATIONARY_WEIGHTS = MESH_AXES_OF | {"batch": "data", "activation_embed": "fsdp"}

_table: contextvars.ContextVar[Mapping[str, str | tuple[str, ...] | None]] = contextvars.ContextVar(
    "table", default=MESH_AXES_OF
)


@contextlib.contextmanager
def stationary_weights() -> Generator[None, None, None]:
    """Shards activations by the table `STATIONARY_WEIGHTS` inside a `with` block, while a program is traced.

    References:
        Pope et al. 2022, "Efficiently Scaling Transformer Inference", section 3.2.2.
    """
    token = _table.set(STATIONARY_WEIGHTS)
    try:
        yield
    finally:
        _table.reset(token)


def partition_spec(logical_axes: tuple[str | None, ...]) -> jax.P:
    """Returns the mesh axes for a tuple of logical axis names. An axis with the name `None` is not sharded.

    Raises:
        KeyError: a name is not in the table, which is a defect of a layer.
    """
    table = _table.get()
    return P(*(None if name is None else table[name] for name in logical_axes))


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Returns `x` with the sharding of `logical_axes`, as a constraint for the compiler.

    It is the identity outside a mesh. It is so inside `jax.shard_map`, too, where a program sees only its own shard.
    """
    return jax.lax.with_sharding_constraint(x, partition_spec(logical_axes)) if _partitioned() else x


def num_shards(logical_axis: str) -> int:
    """Returns the number of shards that `constrain` splits an axis of this name into; 1 where it does nothing."""
    axes = _table.get()[logical_axis]
    if axes is None or not _partitioned():
        return 1
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def per_shard(
    function: Callable[..., Any],
    in_axes: tuple[tuple[str | None, ...], ...],
    out_axes: tuple[tuple[str | None, ...], ...],
) -> Callable[..., Any]:
    """Returns a function that each device applies to its own shards, for what the compiler cannot partition.

    Args:
        function: maps arrays to a tuple of arrays. It must not mix the parts of a sharded axis.
        in_axes: logical axes of each argument.
        out_axes: logical axes of each result.
    """
    if not _partitioned() or jax.sharding.get_abstract_mesh().size == 1:
        return function
    specs, results = (tuple(partition_spec(names) for names in axes) for axes in (in_axes, out_axes))
    return jax.shard_map(function, in_specs=specs, out_specs=results, check_vma=False)


def _partitioned() -> bool:
    """Returns whether the program being traced is one for all devices, which the compiler partitions."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and all(kind == AxisType.Auto for kind in mesh.axis_types)


def logical_axes_of(path: tuple[Any, ...], parameter: nnx.Variable) -> tuple[str | None, ...]:
    """Returns the logical name of each dimension of a parameter. In a stack of layers the first is "layers".

    The metadata names the axes of one layer. A loop over a stack gives each layer its part of a parameter, with the
    same metadata. So only the number of dimensions tells a stack from a part.

    Args:
        path: path of the parameter in its model.
        parameter: parameter with the metadata `logical_axes`.

    Raises:
        ValueError: the parameter has no `logical_axes`, or names for another number of dimensions.
    """
    axes = parameter.get_metadata().get("logical_axes")
    shape = parameter.get_value().shape
    name = "/".join(map(str, path))
    if axes is None:
        raise ValueError(f"parameter {name} has no logical_axes metadata")
    if len(axes) + 1 == len(shape):  # a parameter of a stack of layers
        axes = ("layers", *axes)
    if len(axes) != len(shape):
        raise ValueError(f"parameter {name} has shape {shape} but logical axes {axes}")
    return axes


def parameter_specs(abstract_params: Any) -> dict[str, Any]:
    """Returns a nested dict of partition specs for the parameters, in the form of `nnx.to_pure_dict`.

    Args:
        abstract_params: the `nnx.State` of a model, with arrays or shapes, and with the metadata `logical_axes`.

    Raises:
        ValueError: as `logical_axes_of`.
    """
    flat = [
        (path, partition_spec(logical_axes_of(path, variable))) for path, variable in nnx.to_flat_state(abstract_params)
    ]
    return nnx.to_pure_dict(nnx.from_flat_state(flat))


def parameter_shardings(abstract_params: Any, mesh: Mesh | AbstractMesh) -> dict[str, Any]:
    """Returns a nested dict with the `NamedSharding` of each parameter.

    Raises:
        ConfigError: a mesh axis does not divide a dimension. The message names the parameter and both sizes.
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
