"""Memory that a compiled program needs on each device, and memory that a device has."""

import math
import os
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from flax_transformer.errors import ConfigError
from flax_transformer.parallel.topology import described_memory_bytes

# Files of Linux with the memory limit of a container: control groups of version 2, and of version 1.
CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def needed_bytes(compiled: Any) -> int:
    """Returns the bytes of inputs, outputs, temporaries and code on one device. Donated arrays count once."""
    found = compiled.memory_analysis()
    return (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + found.temp_size_in_bytes
        + found.generated_code_size_in_bytes
    )


def stored_bytes(tree: Any) -> int:
    """Returns the bytes on one device of a tree of arrays, or of shapes with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def available_bytes(mesh: Mesh) -> int | None:
    """Returns the bytes of memory of one device of a mesh, or None if they are not known.

    The devices of a CPU have equal parts of the memory of the machine or the container. Other processes on the same
    machine are not considered.
    """
    own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    device = next(iter(own), mesh.devices.flat[0])  # described devices need not belong to this process
    if device.platform == "cpu":
        if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
            return None
        limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
        for path in CONTAINER_LIMITS:
            text = path.read_text().strip() if path.is_file() else "max"
            limits += [int(text)] if text.isdigit() else []  # "max" is no limit
        return min(limits) // max(len(own), 1)
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:  # a described device, which is not there
        return described_memory_bytes(device.device_kind)


def compile_checked(lowered: Any, mesh: Mesh, what: str, advice: str, reserved_bytes: int = 0) -> Any:
    """Returns a compiled program that fits the memory of its devices.

    Args:
        lowered: the program, as `jax.jit(...).lower(...)` returns it.
        mesh: the devices.
        what: name of the program in an error message.
        advice: advice in an error message on how to make the program smaller.
        reserved_bytes: bytes of other arrays on each device while the program runs.

    Raises:
        ConfigError: the program needs more memory than a device has.
    """
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ConfigError(f"{what} does not fit the memory of a device. {advice} The compiler says: {error}") from error
    needed, available = needed_bytes(program) + reserved_bytes, available_bytes(mesh)
    if available is not None and needed > available:
        raise ConfigError(
            f"{what} needs {needed / 2**30:.1f} GiB on each device, and there are {available / 2**30:.1f} GiB. {advice}"
        )
    return program
