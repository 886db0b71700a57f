"""The device mesh: always there, 1x1x1 on a laptop."""

from dataclasses import dataclass

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from flax_transformer.errors import ConfigError

# With more devices than this a search has one program for all of them.
MOST_SEARCH_MESHES = 4


@dataclass(frozen=True)
class MeshConfig:
    """How many devices along each axis; their product is the number of devices used.

    Attributes:
        data: rows of the batch are split over it, parameters are copied. -1 takes all devices that are left.
        fsdp: rows of the batch and parameters are split over it (fully sharded data parallel).
        tensor: heads, feed-forward units and vocabulary rows are split over it.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Returns a mesh with the axes "data", "fsdp" and "tensor", in automatic sharding mode.

    Args:
        config: sizes of the axes.
        devices: devices of the mesh; None uses all of JAX's.

    Raises:
        ConfigError: sizes below 1, or sizes whose product is not an available number of devices.
    """
    devices = jax.devices() if devices is None else devices
    fixed = config.fsdp * config.tensor
    if config.fsdp < 1 or config.tensor < 1 or (config.data < 1 and config.data != -1):
        raise ConfigError(f"mesh axes must be at least 1 (mesh.data may be -1 for 'all that are left'), got {config}.")
    data = max(len(devices) // fixed, 1) if config.data == -1 else config.data
    if data * fixed > len(devices) or (config.data == -1 and data * fixed != len(devices)):
        raise ConfigError(
            f"the mesh needs data x fsdp x tensor = {data} x {config.fsdp} x {config.tensor} = {data * fixed} devices, "
            f"but JAX has {len(devices)} ({devices[0].platform}). Choose sizes whose product is {len(devices)}."
        )
    shape = (data, config.fsdp, config.tensor)
    return jax.make_mesh(
        shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices[: data * fixed]
    )


def search_meshes(mesh: Mesh) -> list[Mesh]:
    """Returns the meshes that search side by side. Each takes work when it is free. Together they are `mesh`.

    On a CPU each device is a mesh, if there are few. Cores may differ in speed or have other work to do. JAX runs a
    program of several CPU devices only when all have ended the one before. But each mesh needs its own compiled
    program. Elsewhere the only mesh is `mesh` itself (docs/lab_book.md, "Programs of several CPU devices").
    """
    devices = list(mesh.devices.flat)
    if devices[0].platform != "cpu" or len(devices) > MOST_SEARCH_MESHES:
        return [mesh]
    return [make_mesh(MeshConfig(), [device]) for device in devices]


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding of a training batch: rows split over data and fsdp."""
    return NamedSharding(mesh, jax.P(("data", "fsdp")))


def all_devices_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding of a decoding batch: rows split over every axis of the mesh."""
    return NamedSharding(mesh, jax.P(("data", "fsdp", "tensor")))


def replicated_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, jax.P())


def check_rows(num_rows: int, mesh: Mesh | AbstractMesh, axes: tuple[str, ...], what: str, advice: str = "") -> None:
    """Raises a `ConfigError`, with `advice`, unless `num_rows` divides evenly over the product of `axes`."""
    product = 1
    for axis in axes:
        product *= mesh.shape[axis]
    if num_rows % product:
        raise ConfigError(
            f"{what} ({num_rows} rows) must divide evenly over the mesh axes {' x '.join(axes)} = {product}; "
            f"nearest: {max(product, num_rows // product * product)}, {(num_rows // product + 1) * product}.{advice}"
        )
