"""How much memory a compiled program needs on each device, and how much there is."""

import os
from typing import Any

import jax
from jax.sharding import Mesh


def needed_bytes(compiled: Any) -> int:
    """Returns what a compiled program needs on one device to read, write and work with; donated arrays once."""
    found = compiled.memory_analysis()
    return (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + found.temp_size_in_bytes
        + found.generated_code_size_in_bytes
    )


def available_bytes(mesh: Mesh) -> int | None:
    """Returns the memory of one device of a mesh, or None when nobody says.

    The devices of a CPU share the machine's memory, each with an equal part.
    """
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
            return None
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // mesh.size
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:  # a device that is described but not there, to compile for
        return None
