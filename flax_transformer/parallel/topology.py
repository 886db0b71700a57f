"""Described hardware: devices to compile for that are not there, and facts read from a compiled program.

A compiler needs only a description of the chips. So a laptop can compile the program of a TPU slice or a node of GPUs.
The compiled program tells the memory of each device and the exchanges between devices. It cannot be run.

The compilers come with the extra `plan`. A topology has a name of the form NAME:LAYOUT:

    v5e:4x4      = a slice of 4 x 4 chips of a TPU generation, as Google Cloud names it
    h100_sxm:8   = 8 GPUs of one host, of a kind that the folder `devices` describes
    h100_sxm:4x8 = 4 such hosts
    cpu:2        = 2 cores of this machine

References:
    `jax.experimental.topologies`. TPU generations: cloud.google.com/tpu/docs/system-architecture-tpu-vm.
"""

import contextlib
import functools
import importlib.util
import math
import os
import re
import tempfile
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jax

from flax_transformer.errors import ConfigError, shown

# Memory of one chip in GiB, by the generation in a topology's name (see References).
TPU_MEMORY_GIB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
TPU_DEVICE_KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}

# Share of a GPU's memory that JAX takes by default; XLA_PYTHON_CLIENT_MEM_FRACTION changes it.
GPU_MEMORY_SHARE = 0.75

ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # libtpu asks no cloud for the kind of this machine
    "TPU_WORKER_HOSTNAMES": "localhost",  # this one and the next only avoid warnings of libtpu
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # no chip is used, so another process may use libtpu
}
NO_AUTOTUNING = "--xla_gpu_autotune_level=0"  # autotuning would run kernels

COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast",
    "ragged-all-to-all",
)  # fmt: skip

MAX_KEY_WORDS = 256  # random words that a derivation of keys draws at once; dropout draws thousands

REMATERIALIZATION = "Involuntary full rematerialization"  # in the compiler's log
TRIAL = "%fake_parameter"  # XLA's name for arrays of a trial; see `num_rematerializations`


# --- Hardware


def set_up_compilers(log_folder: Path) -> None:
    """Prepares this process to compile for described hardware. Call it before the first compilation.

    Args:
        log_folder: folder for libtpu's log, which `Program.of` reads.
    """
    jax.config.update("jax_platforms", "cpu")  # shapes and keys stay on the host
    os.environ["TPU_LOG_DIR"] = str(log_folder)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_autotune_level" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {NO_AUTOTUNING}".strip()


def gpu_descriptions() -> dict[str, str]:
    """Returns the description of each GPU, by its name."""
    files = resources.files("flax_transformer.parallel").joinpath("devices").iterdir()
    return {Path(f.name).stem: f.read_text(encoding="utf-8") for f in sorted(files, key=lambda f: f.name)}


def described_devices(topology: str) -> list[jax.Device]:
    """Returns the devices of a topology. A mesh of them serves to compile, and for nothing else.

    Args:
        topology: name such as "v5e:4x4", "h100_sxm:8" or "cpu:2".

    Raises:
        ConfigError: the name is unknown, the layout does not exist, or the compiler is not installed.
    """
    name, _, layout = topology.partition(":")
    descriptions = gpu_descriptions()
    if name == "cpu":
        if not re.fullmatch(r"[1-9]\d*", layout):
            raise ConfigError(f"cores of this machine are named by their number, such as cpu:2, got {shown(topology)}.")
        return _cores(int(layout))
    if name not in TPU_MEMORY_GIB and name not in descriptions:
        known = [*TPU_MEMORY_GIB, *descriptions, "cpu"]
        raise ConfigError(
            f"unknown hardware {shown(name)}. A topology is NAME:LAYOUT, such as v5e:4x4 or h100_sxm:8; the names are "
            f"{', '.join(known)}."
        )
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){0,2}", layout):
        raise ConfigError(
            f"the topology must be NAME:LAYOUT, such as v5e:4x4 (chips along each axis) or h100_sxm:8 (GPUs of a host) "
            f"or h100_sxm:4x8 (hosts x GPUs), got {shown(topology)}."
        )
    package = "libtpu" if name in TPU_MEMORY_GIB else "jax_plugins.xla_cuda13"
    if importlib.util.find_spec(package.split(".")[0]) is None or importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"compiling for {name} needs its compiler, and the package {package} is not there: "
            'pip install "flax-transformer[plan]".'
        )
    return _devices(name, layout, topology, descriptions)


def _cores(number: int) -> list[jax.Device]:
    devices = jax.devices("cpu")
    if number > len(devices):
        raise ConfigError(f"the topology cpu:{number} needs {number} CPU devices, and JAX has {len(devices)} here.")
    return devices[:number]


def _devices(name: str, layout: str, topology: str, descriptions: dict[str, str]) -> list[jax.Device]:
    from jax.experimental import topologies

    try:
        if name in TPU_MEMORY_GIB:
            # By default the two cores of a v4 chip are two devices; on a real slice JAX has one.
            options: dict[str, Any] = {"chip_config_name": "megacore"} if name == "v4" else {}
            if set(layout.split("x")) == {"1"}:  # a host of one chip; others have four at least
                options["chips_per_host_bounds"] = (1, 1, 1)
            found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
        else:  # slices x hosts of each x GPUs of each
            shape = "x".join(["1"] * (2 - layout.count("x")) + [layout])
            found = topologies.get_topology_desc(platform="cuda", target_config=descriptions[name], topology=shape)
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"the compiler describes no topology {topology}. It says: {error}") from error
    return list(found.devices)


def hardware_name(device_kind: str) -> str | None:
    """Returns the name in a topology of a kind of device, or None for an unknown kind.

    Args:
        device_kind: JAX's name of the kind.
    """
    if device_kind in TPU_DEVICE_KINDS:
        return TPU_DEVICE_KINDS[device_kind]
    described = (
        name for name, text in gpu_descriptions().items() if f'device_description_str: "{device_kind}"' in text
    )
    return next(described, None)


def described_memory_bytes(device_kind: str) -> int | None:
    """Returns the bytes that a program may use on a described device, or None for an unknown kind of device.

    Args:
        device_kind: JAX's name of the kind.
    """
    name = hardware_name(device_kind)
    if name is None:
        return None
    if name in TPU_MEMORY_GIB:
        return TPU_MEMORY_GIB[name] * 2**30
    found = re.search(r"device_memory_size: (\d+)", gpu_descriptions()[name])
    assert found is not None, f"the description of {device_kind} has no device_memory_size"
    return int(GPU_MEMORY_SHARE * int(found[1]))


# --- Facts of a compiled program


@dataclass(frozen=True)
class Instruction:
    """One line of an optimised program.

    Attributes:
        computation: name of the computation that contains it.
        result: type of its result, such as "bf16[32,64,512]{2,1,0}", or a tuple of types.
        opcode: name of its operation, such as "xor", or "all-gather-start" for the first half of an all-gather.
        text: the whole line.
        root: whether its computation returns its result.
    """

    computation: str
    result: str
    opcode: str
    text: str
    root: bool


@dataclass(frozen=True)
class Program:
    """A compiled program, with the complaints of its compiler.

    Attributes:
        name: name in a report.
        compiled: program as JAX returns it.
        rematerializations: number of whole arrays that the partitioner copied to every device. It does so when it finds
            no way from one sharding to another.
    """

    name: str
    compiled: Any
    rematerializations: int = 0

    @classmethod
    def of(cls, name: str, compile_program: Callable[[], Any]) -> "Program":
        """Returns the program that `compile_program` compiles; counts the complaints in the compiler's log."""
        with compiler_log() as read:
            compiled = compile_program()
            return cls(name, compiled, num_rematerializations(read()))

    @functools.cached_property
    def instructions(self) -> list[Instruction]:
        """All instructions of one device's program, from all its computations."""
        return list(parse_instructions(self.compiled.as_text()))

    @property
    def flops(self) -> float | None:
        """Operations on one device, or None if the compiler does not tell them. The body of a loop counts once."""
        cost = self.compiled.cost_analysis()
        return None if not cost else cost.get("flops")

    @property
    def num_conditionals(self) -> int:
        """Number of branches that the running program chooses."""
        return sum(i.opcode == "conditional" for i in self.instructions)

    @property
    def num_dynamic_loops(self) -> int:
        """Number of loops whose number of iterations the compiler does not know."""
        return sum(i.opcode == "while" and not is_counted(i, self.instructions) for i in self.instructions)


def num_rematerializations(log: str) -> int:
    """Returns the number of whole arrays that the partitioner copied to every device, as it complains of them in a log.

    For a gather or a scatter the partitioner tries several ways on a copy of the program, and keeps the cheapest. It
    complains of the others, too. If it keeps one with such a copy, it complains again, and then names the real array.

    References:
        XLA, `FakePartitionedHlo` and `EvaluatePartitionCost` in spmd_partitioner_util.h.
    """
    return sum(REMATERIALIZATION in line and TRIAL not in line for line in log.splitlines())


@contextlib.contextmanager
def compiler_log() -> Generator[Callable[[], str], None, None]:
    """Yields a function that returns the compilers' messages since then, from standard error and libtpu's log."""
    folder = Path(os.environ.get("TPU_LOG_DIR", os.devnull))

    def of_libtpu() -> dict[Path, str]:  # the folder has links and other logs, too
        return {path: path.read_text(errors="replace") for path in folder.glob("*.WARNING.*")}

    before, kept = of_libtpu(), os.dup(2)
    with tempfile.TemporaryFile("w+", errors="replace") as written:

        def read() -> str:
            written.seek(0)
            libtpu = "".join(text.removeprefix(before.get(path, "")) for path, text in of_libtpu().items())
            return written.read() + libtpu

        os.dup2(written.fileno(), 2)
        try:
            yield read
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            written.seek(0)
            for line in written:
                os.write(2, line.encode(errors="replace"))


def parse_instructions(text: str) -> Iterator[Instruction]:
    """Yields the instructions of a program in XLA's text form, where a computation starts in the first column."""
    computation = ""
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            computation = header[1]
        elif found := re.match(r"\s+(ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(", line):
            yield Instruction(computation, found[2], found[3], line, found[1] is not None)


def largest_shape(result: str) -> tuple[int, ...]:
    """Returns the shape of the largest array of a type; of "(u64[2]{0}, u32[32,64]{1,0})" it is (32, 64)."""
    shapes = [tuple(int(n) for n in sizes.split(",") if n) for sizes in re.findall(r"\w\[([\d,]*)\]", result)]
    return max(shapes, key=math.prod, default=())


def is_counted(loop: Instruction, instructions: list[Instruction]) -> bool:
    """Returns whether the compiler knows a loop's number of iterations.

    XLA for GPU writes that number beside the loop. libtpu does not, but there the loop's condition compares with a
    constant.
    """
    if "known_trip_count" in loop.text:
        return True
    condition = re.search(r"condition=%?([\w.\-]+)", loop.text)
    lines = [i for i in instructions if condition is not None and i.computation == condition[1]]
    constants = {name[1] for i in lines if i.opcode == "constant" and (name := re.search(r"(%[\w.\-]+) =", i.text))}
    compared = {name for i in lines if i.root and i.opcode == "compare" for name in re.findall(r"%[\w.\-]+", i.text)}
    return bool(constants & compared)


def called_from_loops(instructions: list[Instruction]) -> set[str]:
    """Returns the computations that a loop runs in each of its iterations."""
    calls: dict[str, set[str]] = {}
    reached: set[str] = set()
    names = {i.computation for i in instructions}
    for instruction in instructions:
        named = names & set(re.findall(r"%([\w.\-]+)", instruction.text))
        calls.setdefault(instruction.computation, set()).update(named)
        if instruction.opcode == "while":
            reached |= named
    frontier = set(reached)
    while frontier:
        frontier = set().union(*(calls.get(name, set()) for name in frontier)) - reached
        reached |= frontier
    return reached


def collectives(instructions: list[Instruction]) -> list[tuple[str, str]]:
    """Returns (kind, computation) of each exchange between devices, each once.

    libtpu overlaps an exchange with arithmetic. It then writes the exchange into several fused computations, which
    share its channel. If a computation returns only a slice of its all-reduce, libtpu runs a reduce-scatter.
    """
    sliced = {i.computation for i in instructions if i.root and i.opcode == "dynamic-slice"}
    found: dict[str, tuple[str, str]] = {}
    for number, instruction in enumerate(instructions):
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            if kind == "all-reduce" and instruction.computation in sliced:
                kind = "reduce-scatter"
            channel = re.search(r"channel_id=(\d+)", instruction.text)
            found.setdefault(f"channel {channel[1]}" if channel else f"line {number}", (kind, instruction.computation))
    return list(found.values())


def random_shapes(instructions: list[Instruction]) -> list[tuple[int, ...]]:
    """Returns the shapes of the random bits that one device draws for dropout.

    Threefry is twenty rounds of add, rotate and exclusive-or. Nothing else in a step takes the exclusive-or of words.
    So each large `xor` is a round, in the shape of this device's draw. Small ones derive keys, which are the same on
    every device. A random generator that is a single instruction is counted, too.
    """
    drawn = set()
    for instruction in instructions:
        is_round = instruction.opcode == "xor" and instruction.result.startswith("u32[")
        if is_round or instruction.opcode in ("rng", "rng-bit-generator"):
            drawn.add(largest_shape(instruction.result))
    return sorted(shape for shape in drawn if math.prod(shape) > MAX_KEY_WORDS)
