"""The platform that a program is compiled for, read from the mesh in context.

A mesh knows the platform of its devices, even if they are only described. So a laptop traces the same program for a TPU
as the TPU's host. Only `ops` makes choices by platform, while a program is traced.
"""

import contextlib
import os
from collections.abc import Generator
from typing import Literal

import jax
from jax._src.mesh import AbstractDevice  # no public name; this file alone uses it
from jax.sharding import AbstractMesh, AxisType

from flax_transformer.errors import ConfigError, shown

KERNELS = "FLAX_TRANSFORMER_KERNELS"

Platform = Literal["cpu", "gpu", "tpu"]

# Platforms by JAX's names. In some places JAX names a GPU by its maker.
_PLATFORMS: dict[str, Platform] = {"cpu": "cpu", "gpu": "gpu", "cuda": "gpu", "rocm": "gpu", "tpu": "tpu"}


def platform() -> Platform | None:
    """Returns the platform of the program being traced, or None without a mesh and on a platform unknown here.

    The mesh in context is that of `jax.set_mesh`, or of the `jax.shard_map` around the caller. With None the reference
    forms of `ops` run.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return None if device is None else _PLATFORMS.get(device.platform)


def uses_kernels(name: Platform) -> bool:
    """Returns whether the program being traced is for a platform, and may have fused kernels for it.

    The environment variable FLAX_TRANSFORMER_KERNELS=off leaves them out, and the plain forms run.

    Raises:
        ConfigError: the variable has another value than "on" and "off".
    """
    if platform() != name:
        return False
    value = os.environ.get(KERNELS, "on")
    if value not in ("on", "off"):
        raise ConfigError(f"the environment variable {KERNELS} must be on or off, got {shown(value)}.")
    return value == "on"


def abstract_device(name: Platform, device_kind: str | None = None) -> AbstractDevice:
    """Returns the description of a platform's device, for an `AbstractMesh`. The device need not be present.

    Args:
        name: platform of the device.
        device_kind: JAX's name of its kind, such as NVIDIA H100. The name of the platform when None.
    """
    return AbstractDevice(device_kind=name if device_kind is None else device_kind, num_cores=None, platform=name)


@contextlib.contextmanager
def tracing_for(name: Platform, device_kind: str | None = None) -> Generator[None, None, None]:
    """Makes `platform` return `name` inside a `with` block, to export the program of one device.

    Programs of the package have a mesh instead. `jax.export` refuses kernels written by hand, unless its caller allows
    them by `disabled_checks`.

    Args:
        name: platform of the program. Its device need not be present.
        device_kind: JAX's name of its kind, such as NVIDIA H100. Newer versions of JAX export a kernel only with it.

    Example:
        >>> with tracing_for("tpu"):
        ...     exported = jax.export.export(jax.jit(jnp.sin), platforms=["tpu"])(jnp.ones(3))
        >>> exported.platforms
        ('tpu',)
    """
    # The axis is manual, as inside `shard_map`, since nothing in the program of one device can be split.
    mesh = AbstractMesh(
        (1,), ("device",), axis_types=(AxisType.Manual,), abstract_device=abstract_device(name, device_kind)
    )
    with jax.sharding.use_abstract_mesh(mesh):
        yield
