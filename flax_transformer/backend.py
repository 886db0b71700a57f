"""The platform that a program is compiled for, read from the mesh in context.

A mesh knows the platform of its devices, whether they are present or only described. So a laptop traces the program of
a TPU as a TPU's process would. Choices by platform are made in `ops` alone, while a program is traced.
"""

import contextlib
from collections.abc import Generator
from typing import Literal

import jax
from jax._src.mesh import AbstractDevice  # no public name; this file alone knows it
from jax.sharding import AbstractMesh, AxisType

Platform = Literal["cpu", "gpu", "tpu"]

# JAX's names of platforms and ours. In some places JAX names a GPU by its maker.
_PLATFORMS: dict[str, Platform] = {"cpu": "cpu", "gpu": "gpu", "cuda": "gpu", "rocm": "gpu", "tpu": "tpu"}


def platform() -> Platform | None:
    """Returns the platform of the program that is being traced, or None when no mesh is in context.

    The mesh in context is that of `jax.set_mesh`, or of the `jax.shard_map` that surrounds the caller. Without a mesh
    the reference forms of `ops` run, as they do on a platform that has no name here.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return None if device is None else _PLATFORMS.get(device.platform)


def abstract_device(name: Platform) -> AbstractDevice:
    """Returns the description of a platform's device for an `AbstractMesh`; the device need not be present."""
    return AbstractDevice(device_kind=name, num_cores=None, platform=name)


@contextlib.contextmanager
def tracing_for(name: Platform) -> Generator[None, None, None]:
    """Makes `platform` return `name` inside a `with` block, to export the program of one device.

    Args:
        name: platform that the program will run on; such a device need not be present.
    """
    # The axis is manual, as inside `shard_map`: nothing in the program of one device can be split.
    mesh = AbstractMesh((1,), ("device",), axis_types=(AxisType.Manual,), abstract_device=abstract_device(name))
    with jax.sharding.use_abstract_mesh(mesh):
        yield
