"""Hardware that is described but not there: its devices to compile for, and what a compiled program says of itself.

A compiler needs only a description of the chips. So a laptop can compile the program of a TPU slice or a node of GPUs.
The compiled program tells the memory of each device and the exchanges between devices. It cannot be run.

The compilers come with the extra `plan`. A topology is named NAME:LAYOUT:

    v5e:4x4        a TPU generation, and the chips of a slice along each axis, as Google Cloud names them
    h100_sxm:8     a GPU of the folder `devices`, and how many of them one host has
    h100_sxm:4x8   the same on 4 hosts

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

from flax_transformer.errors import ConfigError, did_you_mean

# Memory of one chip in GiB, by the generation in a topology's name and by JAX's `device_kind` (see References).
TPU_MEMORY_GIB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
TPU_DEVICE_KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}

# JAX takes this share of a GPU's memory, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
GPU_MEMORY_SHARE = 0.75

ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # ask no cloud what machine this is
    "TPU_WORKER_HOSTNAMES": "localhost",  # these two only keep libtpu from complaining that nobody told it
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
}
NO_AUTOTUNING = "--xla_gpu_autotune_level=0"  # which would run kernels to choose the fastest

COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast",
    "ragged-all-to-all",
)  # fmt: skip

MAX_KEY_WORDS = 256  # random words drawn at once to derive keys; dropout draws thousands

REMATERIALIZATION = "Involuntary full rematerialization"  # in the compiler's log


# --- Hardware


def set_up_compilers(log_folder: Path) -> None:
    """Prepares this process to compile for hardware that is not there; call it before anything is compiled.

    Args:
        log_folder: where libtpu writes its log; `Program.of` reads it.
    """
    jax.config.update("jax_platforms", "cpu")  # shapes and keys live on the host
    os.environ["TPU_LOG_DIR"] = str(log_folder)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_autotune_level" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {NO_AUTOTUNING}".strip()


def gpu_descriptions() -> dict[str, str]:
    """Returns the text of each GPU's description, by its name."""
    files = resources.files("flax_transformer.parallel").joinpath("devices").iterdir()
    return {Path(f.name).stem: f.read_text(encoding="utf-8") for f in sorted(files, key=lambda f: f.name)}


def described_devices(topology: str) -> list[jax.Device]:
    """Returns the devices of a topology, to make a mesh of; they can be compiled for and nothing else.

    Args:
        topology: such as "v5e:4x4" or "h100_sxm:8".

    Raises:
        ConfigError: an unknown name, a layout that does not exist, or the compiler is not installed.
    """
    name, _, layout = topology.partition(":")
    descriptions = gpu_descriptions()
    if name not in TPU_MEMORY_GIB and name not in descriptions:
        known = [*TPU_MEMORY_GIB, *descriptions]
        raise ConfigError(f"unknown hardware {name!r}; known are {', '.join(known)}.{did_you_mean(name, known)}")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){0,2}", layout):
        raise ConfigError(
            f"the topology must be NAME:LAYOUT, such as v5e:4x4 (chips along each axis) or h100_sxm:8 (GPUs of a host) "
            f"or h100_sxm:4x8 (hosts x GPUs), got {topology!r}."
        )
    package = "libtpu" if name in TPU_MEMORY_GIB else "jax_plugins.xla_cuda13"
    if importlib.util.find_spec(package.split(".")[0]) is None or importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"compiling for {name} needs its compiler, and the package {package} is not there: "
            'pip install "flax-transformer[plan]".'
        )
    return _devices(name, layout, topology, descriptions)


def _devices(name: str, layout: str, topology: str, descriptions: dict[str, str]) -> list[jax.Device]:
    from jax.experimental import topologies

    try:
        if name in TPU_MEMORY_GIB:
            found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
        else:  # slices x hosts of each x GPUs of each
            shape = "x".join(["1"] * (2 - layout.count("x")) + [layout])
            found = topologies.get_topology_desc(platform="cuda", target_config=descriptions[name], topology=shape)
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"there is no topology {topology}. The compiler says: {error}") from error
    return list(found.devices)


def described_memory_bytes(device_kind: str) -> int | None:
    """Returns the memory that a program may use on a described device, or None for one that nobody has described.

    Args:
        device_kind: as JAX gives it.
    """
    if device_kind in TPU_DEVICE_KINDS:
        return TPU_MEMORY_GIB[TPU_DEVICE_KINDS[device_kind]] * 2**30
    for text in gpu_descriptions().values():
        if f'device_description_str: "{device_kind}"' in text:
            found = re.search(r"device_memory_size: (\d+)", text)
            assert found is not None, f"the description of {device_kind} has no device_memory_size"
            return int(GPU_MEMORY_SHARE * int(found[1]))
    return None


# --- What a compiled program says


@dataclass(frozen=True)
class Instruction:
    """One line of an optimised program.

    Attributes:
        computation: name of the computation that holds it.
        result: its type, such as "bf16[32,64,512]{2,1,0}", or a tuple of types.
        opcode: such as "all-gather" or "xor"; of an operation in two halves, "all-gather-start" and "all-gather-done".
        text: the whole line.
        root: whether it is what its computation returns.
    """

    computation: str
    result: str
    opcode: str
    text: str
    root: bool


@dataclass(frozen=True)
class Program:
    """A compiled program and what was said while it was made.

    Attributes:
        name: for a report.
        compiled: what JAX returns.
        rematerializations: how often the partitioner found no way from one sharding to another, so that it copied a
            whole array to every device.
    """

    name: str
    compiled: Any
    rematerializations: int = 0

    @classmethod
    def of(cls, name: str, compile_program: Callable[[], Any]) -> "Program":
        """Returns what a function compiles, and counts the complaints in the compiler's log meanwhile."""
        with compiler_log() as read:
            compiled = compile_program()
            return cls(name, compiled, read().count(REMATERIALIZATION))

    @functools.cached_property
    def instructions(self) -> list[Instruction]:
        """All instructions of the program of one device, of all its computations."""
        return list(parse_instructions(self.compiled.as_text()))

    @property
    def flops(self) -> float | None:
        """Operations on one device, the body of a loop counted once; None where the compiler does not say."""
        cost = self.compiled.cost_analysis()
        return None if not cost else cost.get("flops")

    @property
    def num_conditionals(self) -> int:
        """Branches that are chosen while the program runs."""
        return sum(i.opcode == "conditional" for i in self.instructions)

    @property
    def num_dynamic_loops(self) -> int:
        """Loops whose number of turns is not known before the program runs."""
        return sum(i.opcode == "while" and not is_counted(i, self.instructions) for i in self.instructions)


@contextlib.contextmanager
def compiler_log() -> Generator[Callable[[], str], None, None]:
    """Yields a function that returns what compilers have written since, to standard error or to libtpu's log."""
    folder = Path(os.environ.get("TPU_LOG_DIR", os.devnull))

    def of_libtpu() -> dict[Path, str]:  # other names in the folder are links, and a log of warnings and more
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
    """Yields the instructions of a program in XLA's text form; a computation starts in the first column."""
    computation = ""
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            computation = header[1]
        elif found := re.match(r"\s+(ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(", line):
            yield Instruction(computation, found[2], found[3], line, found[1] is not None)


def largest_shape(result: str) -> tuple[int, ...]:
    """Returns the dimensions of the largest array of a type: "(u64[2]{0}, u32[32,64]{1,0})" gives (32, 64)."""
    shapes = [tuple(int(n) for n in sizes.split(",") if n) for sizes in re.findall(r"\w\[([\d,]*)\]", result)]
    return max(shapes, key=math.prod, default=())


def is_counted(loop: Instruction, instructions: list[Instruction]) -> bool:
    """Returns whether a loop has a number of turns that the compiler knows.

    XLA for GPU writes that number beside the loop. libtpu does not, but there the condition compares with a constant.
    """
    if "known_trip_count" in loop.text:
        return True
    condition = re.search(r"condition=%?([\w.\-]+)", loop.text)
    lines = [i for i in instructions if condition is not None and i.computation == condition[1]]
    constants = {name[1] for i in lines if i.opcode == "constant" and (name := re.search(r"(%[\w.\-]+) =", i.text))}
    compared = {name for i in lines if i.root and i.opcode == "compare" for name in re.findall(r"%[\w.\-]+", i.text)}
    return bool(constants & compared)


def called_from_loops(instructions: list[Instruction]) -> set[str]:
    """Returns the computations that a loop runs once in each of its turns."""
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
    """Returns (kind, computation) of each exchange between devices, each counted once.

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
    """Returns the shapes in which one device draws random bits for dropout.

    Threefry is twenty rounds of add, rotate and exclusive-or. Nothing else in a step takes the exclusive-or of words.
    So each large `xor` is a round, in the shape in which this device draws. Small ones derive keys, the same on every
    device. A generator that is a single instruction is counted too.
    """
    drawn = set()
    for instruction in instructions:
        is_round = instruction.opcode == "xor" and instruction.result.startswith("u32[")
        if is_round or instruction.opcode in ("rng", "rng-bit-generator"):
            drawn.add(largest_shape(instruction.result))
    return sorted(shape for shape in drawn if math.prod(shape) > MAX_KEY_WORDS)
