"""The machine, and what its device can do at best: the ceilings that other figures are compared with."""

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from harness import Report, spread

from accelerator.measurement import Measurement, gibibytes, median_of, seconds_of_calls

QUERY = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,clocks.sm,power.limit,temperature.gpu"
PACKAGES = (
    "jax", "jaxlib", "jax-cuda13-plugin", "flax", "optax", "orbax-checkpoint", "numpy", "torch", "triton",
    "transformers", "ctranslate2", "nvidia-cudnn-cu13", "nvidia-cublas", "sentencepiece", "tyro", "pytest",
)  # fmt: skip


@dataclass(frozen=True)
class Ceilings(Measurement):
    """The machine, its copy bandwidth and its rate of bfloat16 products."""

    def measure(self, report: Report) -> None:
        """Adds facts, and a table of ceilings."""
        import jax

        report.say(f"nvidia-smi: {QUERY}\n\n    {smi()}\n")
        found = {name: version_of(name) for name in PACKAGES}
        self.note("versions", smi=smi(), **found)
        report.say(", ".join(f"{name} {number}" for name, number in found.items()) + "\n")
        device = jax.devices()[0]
        limit = (device.memory_stats() or {}).get("bytes_limit")
        report.say(f"JAX: {device.platform}, {device.device_kind}, may use {gibibytes(limit)} GiB\n")
        report.table(["ceiling", "figure", "ms a call"], self.rows())

    def rows(self) -> Iterator[list[str]]:
        """Yields a row for each ceiling."""
        yield self.row("launch of a tiny program", *tiny_program(), 1.0, "calls/s", 200)
        yield self.row("copy, bytes read and written", *copy(1 << (20 if self.tiny else 30)), "B/s", 10)
        sizes = [(8192, 8192, 8192), (25_600, 512, 2048), (25_600, 2048, 512), (25_600, 512, 32_000)]
        for m, k, n in [(64, 64, 64)] if self.tiny else sizes:
            yield self.row(f"product [{m}, {k}] x [{k}, {n}] in bfloat16", *product(m, k, n), "FLOP/s", 20)

    def row(self, name: str, call: Any, work: float, unit: str, num_calls: int) -> list[str]:
        """Returns the row of a program that does `work` in each call."""
        import jax

        seconds = seconds_of_calls(call, jax.block_until_ready, 2 if self.tiny else num_calls, self.rounds)
        rate = work / median_of(seconds)
        self.note(name, unit=unit, rate=rate, seconds=seconds)
        return [name, f"{rate:.4g} {unit}", spread([1e3 * value for value in seconds], 4)]


def smi() -> str:
    """Returns what nvidia-smi says of the device, or why it says nothing."""
    try:
        command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        return (done.stdout or done.stderr).strip()
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)


def version_of(package: str) -> str:
    """Returns the version of a package, or "none"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def tiny_program() -> tuple[Any]:
    """Returns a program whose time is that of its launch."""
    import jax
    import jax.numpy as jnp

    add, x = jax.jit(lambda x: x + 1), jnp.zeros((8,), jnp.float32)
    return (lambda: add(x),)


def copy(num_elements: int) -> tuple[Any, float]:
    """Returns a program that reads and writes an array of bfloat16, and the bytes that it moves."""
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (num_elements,), jnp.bfloat16)
    negate = jax.jit(lambda x: -x)
    return lambda: negate(x), 2.0 * x.nbytes


def product(m: int, k: int, n: int) -> tuple[Any, float]:
    """Returns a product of random matrices, and its operations."""
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, ((m, k), (k, n)), strict=True))
    multiply = jax.jit(lambda a, b: a @ b)
    return lambda: multiply(a, b), 2.0 * m * k * n
