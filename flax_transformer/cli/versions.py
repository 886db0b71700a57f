"""versions: what a report of a defect needs to say of this installation and this machine."""

import contextlib
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from flax_transformer.user_cache import writable_cache

PACKAGES = (
    "flax-transformer", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "sentencepiece", "sacrebleu",
    "tyro", "matplotlib",
)  # fmt: skip
CACHES = ("compiled", "tokenizers", "tokens")

# Environment variables that change what a command does. Their values are no secrets.
VARIABLES = (
    "FLAX_TRANSFORMER_KERNELS", "GLIBC_TUNABLES", "JAX_COMPILATION_CACHE_DIR", "JAX_DEFAULT_MATMUL_PRECISION",
    "JAX_ENABLE_COMPILATION_CACHE", "JAX_ENABLE_X64", "JAX_NUM_CPU_DEVICES", "JAX_PLATFORMS", "XDG_CACHE_HOME",
    "XLA_FLAGS",
)  # fmt: skip


def main(arguments: list[str], program: str) -> int:
    """Prints versions, devices and caches, and returns the exit code."""
    print("\n".join((*_versions(), *_devices(), *_caches(), *_variables())))
    return 0


def _versions() -> list[str]:
    lines = []
    for name in PACKAGES:
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:  # a checkout that is not installed
            lines.append(f"{name} not installed")
    lines.insert(1, f"Python {platform.python_version()} ({sys.implementation.name})")
    lines.insert(
        2, f"system {platform.system()} {platform.release()} {platform.machine()} {' '.join(platform.libc_ver())}"
    )
    return lines


def _devices() -> list[str]:
    import jax

    from flax_transformer.parallel.memory import available_bytes
    from flax_transformer.parallel.mesh import MeshConfig, make_mesh

    try:
        devices = jax.devices()
    except RuntimeError as error:  # such as a driver that does not fit
        return [f"devices: none can be used: {error}"]
    memory = available_bytes(make_mesh(MeshConfig()))
    each = "" if memory is None else f", {memory / 2**30:.1f} GiB each"
    return [f"devices: {len(devices)} x {devices[0].device_kind} ({devices[0].platform}{each})"]


def _caches() -> list[str]:
    lines = []
    for name in CACHES:
        folder = writable_cache(name)
        if folder is None:
            lines.append(f"cache {name}: no folder can be written")
        else:
            number, size = files_of(Path(folder))
            lines.append(f"cache {name}: {folder}, {number:,} files, {size / 2**20:,.1f} MiB")
    return lines


def files_of(folder: Path) -> tuple[int, int]:
    """Returns the number of files in a folder and below it, and their bytes. Other processes may remove some."""
    sizes = []
    for inside, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                sizes.append(os.stat(os.path.join(inside, name)).st_size)
    return len(sizes), sum(sizes)


def _variables() -> list[str]:
    return [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
