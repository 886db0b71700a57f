"""What a program is compiled for: read from the mesh in context, by one function.

A mesh knows the platform of its devices, whether they are there or are only described. So a process on a laptop traces
the program of a TPU as a TPU's process would. Choices by platform are made in `ops` alone, while a program is traced.
"""

import contextlib
from collections.abc import Generator
from typing import Literal

import jax
from jax._src.mesh import AbstractDevice  # no public name; this file alone knows it
from jax.sharding import AbstractMesh, AxisType

Platform = Literal["cpu", "gpu", "tpu"]

# What JAX's devices call their platform, and ours; GPUs are named by their maker in some places.
_PLATFORMS: dict[str, Platform] = {"cpu": "cpu", "gpu": "gpu", "cuda": "gpu", "rocm": "gpu", "tpu": "tpu"}


def platform() -> Platform | None:
    """Returns the platform of the program that is being traced, or None when no mesh is in context.

    The mesh in context is that of `jax.set_mesh`, or of the `jax.shard_map` that surrounds the caller. Without one the
    reference forms of `ops` run, as they do on a platform that has no name here.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return None if device is None else _PLATFORMS.get(device.platform)


def abstract_device(name: Platform) -> AbstractDevice:
    """Returns what stands for a device of a platform in an `AbstractMesh`; no such device need be there."""
    return AbstractDevice(device_kind=name, num_cores=None, platform=name)


@contextlib.contextmanager
def tracing_for(name: Platform) -> Generator[None, None, None]:
    """Makes `platform` return `name` inside a `with` block: for the export of a program of one device.

    Args:
        name: what the program will run on; such a device need not be there.
    """
    # The axis is manual, as inside `shard_map`: the program of one device has nothing that could be split.
    mesh = AbstractMesh((1,), ("device",), axis_types=(AxisType.Manual,), abstract_device=abstract_device(name))
    with jax.sharding.use_abstract_mesh(mesh):
        yield
