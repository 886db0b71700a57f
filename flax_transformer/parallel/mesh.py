"""The mesh of devices. There always is one; with a single device it is 1 x 1 x 1."""

from dataclasses import dataclass

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from flax_transformer.errors import ConfigError, check_fields

# Highest number of CPU devices that each get a search program of their own.
MOST_SEARCH_MESHES = 4


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the axes of a mesh. Their product is the number of devices used.

    Attributes:
        data: number of devices that split the rows of a batch, with copies of the parameters; -1 takes all devices that
            are left.
        fsdp: number of devices that split the rows of a batch and the parameters (fully sharded data parallelism).
        tensor: number of devices that split attention heads, feed-forward units and the vocabulary.

    Example:
        >>> MeshConfig(data=4, fsdp=2).tensor
        1
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        check_fields("mesh", self)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Returns a mesh with the axes "data", "fsdp" and "tensor", in automatic sharding mode.

    Args:
        config: sizes of the axes.
        devices: devices to choose from; None means all devices of JAX.

    Raises:
        ConfigError: a size is below 1, or the product of the sizes is not an available number of devices. With several
            processes all devices must be used, so that each process has some.

    Example:
        >>> mesh = make_mesh(MeshConfig(data=1))
        >>> dict(mesh.shape)
        {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    all_of_processes = devices is None and jax.process_count() > 1
    devices = jax.devices() if devices is None else devices
    fixed = config.fsdp * config.tensor
    if config.fsdp < 1 or config.tensor < 1 or (config.data < 1 and config.data != -1):
        raise ConfigError(f"mesh axes must be at least 1 (mesh.data may be -1 for 'all that are left'), got {config}.")
    data = max(len(devices) // fixed, 1) if config.data == -1 else config.data
    exact = config.data == -1 or all_of_processes
    if data * fixed > len(devices) or (exact and data * fixed != len(devices)):
        processes = f" in {jax.process_count()} processes" if all_of_processes else ""
        raise ConfigError(
            f"the mesh needs data x fsdp x tensor = {data} x {config.fsdp} x {config.tensor} = {data * fixed} devices, "
            f"but JAX has {len(devices)} ({devices[0].platform}){processes}. Choose sizes whose product is "
            f"{len(devices)}."
        )
    # A mesh axis may be a part of an axis of the torus, such as 2 of 8 chips. `jax.make_mesh` allows that on v5e only.
    arranged = mesh_utils.create_device_mesh(
        (data, config.fsdp, config.tensor), devices[: data * fixed], allow_split_physical_axes=True
    )
    return Mesh(arranged, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def search_meshes(mesh: Mesh) -> list[Mesh]:
    """Returns the meshes that search side by side. Each takes work when it is free. Together they are `mesh`.

    On a CPU with few devices each device is a mesh. Cores may differ in speed or have other work to do. A program of
    several CPU devices starts only when all of them are free. But each mesh needs its own compiled program. Elsewhere
    the only mesh is `mesh` itself (docs/lab_book.md, "Programs of several CPU devices").
    """
    devices = list(mesh.devices.flat)
    if devices[0].platform != "cpu" or len(devices) > MOST_SEARCH_MESHES:
        return [mesh]
    return [make_mesh(MeshConfig(), [device]) for device in devices]


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding of a training batch, whose rows are split over data and fsdp."""
    return NamedSharding(mesh, jax.P(("data", "fsdp")))


def all_devices_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding of a decoding batch, whose rows are split over all axes of the mesh."""
    return NamedSharding(mesh, jax.P(("data", "fsdp", "tensor")))


def replicated_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding of an array with a whole copy on every device."""
    return NamedSharding(mesh, jax.P())


def check_rows(num_rows: int, mesh: Mesh | AbstractMesh, axes: tuple[str, ...], what: str, advice: str = "") -> None:
    """Raises a `ConfigError`, with `advice`, unless the product of the sizes of `axes` divides `num_rows`."""
    product = 1
    for axis in axes:
        product *= mesh.shape[axis]
    if num_rows % product:
        raise ConfigError(
            f"{what} ({num_rows} rows) must divide evenly over the mesh axes {' x '.join(axes)} = {product}; "
            f"nearest: {max(product, num_rows // product * product)}, {(num_rows // product + 1) * product}.{advice}"
        )
