"""What a compiled program costs: kernels, bytes, products and a least time, read from its text.

A kernel is what a device is told to do at once: a fusion, a copy, a sort, a call of a library. Each kernel is counted
as often as it runs: a loop times its turns, with the computations that it calls. Its bytes are the operands that it
reads and the results that it writes. Nothing stays in a cache between two kernels. Its time is

    max(bytes / bandwidth, FLOPs of products / peak, latency)

The sum of these times is the least time of a program; see `Speed`.

A TPU copies between its main memory and a fast one while other kernels run. Such copies overlap: their bytes count, and
the least time is at least all bytes / bandwidth. A TPU also runs parts of one exchange inside several fusions. The
exchange counts once. The time that links between devices take is left out.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator

from flax_transformer.parallel.kernel_cost import (
    Fusion,
    call_target,
    called_bytes,
    convolution_flops,
    dot_flops,
    is_in_place,
    library_flops,
    overlapping_bytes,
    sizes_of,
    sort_passes,
    updated_bytes,
)
from flax_transformer.parallel.program_text import (
    BYTES,
    Computation,
    Line,
    all_arrays,
    first_shape,
    loop_turns,
    num_bytes,
    num_elements,
    parse,
)
from flax_transformer.parallel.topology import COLLECTIVES

# Instructions that name memory, and run nothing.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "add-dependency", "copy-done", "async-done", "async-update", "slice-done", "all-reduce-done",
    "all-gather-done", "collective-permute-done", "send-done", "recv-done", "domain",
}  # fmt: skip
# Instructions without arithmetic of their own.
MOVES = {
    "bitcast", "reshape", "transpose", "broadcast", "slice", "concatenate", "pad", "copy", "parameter", "constant",
    "iota", "tuple", "get-tuple-element", "dynamic-slice", "dynamic-update-slice", "gather", "scatter", "reverse",
    "dot", "fusion", "convolution", "sort", "bitcast-convert", "custom-call", "call",
}  # fmt: skip
# Calls by which libtpu joins names or marks an exchange.
FREE_CALLS = {
    "ConcatBitcast",
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
    "AsyncCollectiveStart",
    "AsyncCollectiveDone",
}
OVERLAPPING = ("copy-start", "slice-start")  # libtpu's copies between its memories


@dataclasses.dataclass(frozen=True)
class Speed:
    """The speed of a device.

    Attributes:
        bandwidth: bytes of its memory that it reads or writes in a second.
        peak: multiplications and additions of bfloat16 products in a second, each counted.
        float32_peak: the same for float32 products.
        latency: seconds that even the smallest kernel takes.
    """

    bandwidth: float
    peak: float
    float32_peak: float
    latency: float = 2e-6


# libtpu's own estimate for its smallest fusions, about 1,850 cycles of v5e at 1.5 GHz.
TPU_LATENCY = 1.2e-6
# By the name in a topology: NVIDIA's data sheets (dense products), and Google Cloud's pages of each TPU generation.
SPEEDS = {
    "a100_sxm_80": Speed(2.039e12, 312e12, 19.5e12),
    "h100_sxm": Speed(3.35e12, 989e12, 67e12),
    "h200": Speed(4.8e12, 989e12, 67e12),
    "b200": Speed(8.0e12, 2250e12, 80e12),
    "v4": Speed(1.228e12, 275e12, 69e12, TPU_LATENCY),
    "v5e": Speed(0.819e12, 197e12, 49e12, TPU_LATENCY),
    "v5p": Speed(2.765e12, 459e12, 115e12, TPU_LATENCY),
    "v6e": Speed(1.64e12, 918e12, 230e12, TPU_LATENCY),
}


# --- The kernels of a program


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel, as often as it runs.

    Attributes:
        name: its name in the program.
        label: path of its operation in the source program.
        launches: how often the device is told to run something for it, in one run.
        bytes: bytes read and written in one run.
        flops: operations of products in one run.
        vector_ops: other operations in one run, one for each element.
        narrow: whether its products have operands of at most 16 bits.
        collective: kind of the exchange between devices, or None.
        exchanged: bytes that the exchange takes and gives on a device, in any memory.
        cycles: the compiler's own estimate of one run, if it writes one, as libtpu does; otherwise 0.
        runs: number of runs.
        loops: names of the loops around it, the outermost first.
    """

    name: str
    label: str
    launches: int
    bytes: int
    flops: float
    vector_ops: float
    narrow: bool
    collective: str | None
    exchanged: int
    cycles: int
    runs: int
    loops: tuple[str, ...]

    @property
    def loop(self) -> str:
        """Name of the innermost loop around it, or ""."""
        return self.loops[-1] if self.loops else ""

    def seconds(self, speed: Speed) -> float:
        """Returns the least time of all runs. A kernel that launches nothing overlaps with others."""
        peak = speed.peak if self.narrow else speed.float32_peak
        return self.runs * max(self.bytes / speed.bandwidth, self.flops / peak, self.launches * speed.latency)


class _Reader:
    """Reads the kernels of a program; see `read_kernels`."""

    def __init__(self, text: str, unknown_turns: int):
        self.computations, self.entry = parse(text)
        self.unknown_turns = unknown_turns
        self.channels: set[str] = set()  # exchanges that were counted

    def kernels(self, name: str, runs: int, loops: tuple[str, ...] = ()) -> Iterator[Kernel]:
        """Yields the kernels of a computation that runs `runs` times, in loops of these names."""
        computation = self.computations[name]
        for line in computation.lines.values():
            if line.opcode in FREE or call_target(line) in FREE_CALLS:
                continue
            if line.opcode == "while":
                turns = loop_turns(self.computations, line, self.unknown_turns)
                for inner in (line.called("condition"), line.called("body")):
                    if inner is not None:
                        yield from self.kernels(inner, runs * turns, (*loops, line.name))
            elif line.opcode == "conditional":
                yield from self.dearest_branch(line, runs, loops)
            elif line.opcode in ("call", "async-start") and (inner := line.called()) in self.computations:
                yield from self.kernels(inner, runs, loops)
            else:
                yield self.kernel(computation, line, runs, loops)

    def dearest_branch(self, line: Line, runs: int, loops: tuple[str, ...]) -> list[Kernel]:
        """Returns the kernels of the branch that moves most bytes."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", line.attributes)
        names = re.findall(r"%?([\w.\-]+)", listed[1]) if listed else []
        names += [name for part in ("true_computation", "false_computation") if (name := line.called(part))]
        branches = [list(self.kernels(name, runs, loops)) for name in names]
        return max(branches, key=lambda kernels: sum(k.bytes * k.runs for k in kernels), default=[])

    def kernel(self, computation: Computation, line: Line, runs: int, loops: tuple[str, ...]) -> Kernel:
        """Returns the kernel of one line."""
        operands = [computation.lines[name].result for name in line.operands if name in computation.lines]
        moved = num_bytes(line.result) + sum(map(num_bytes, operands))
        flops, vector, narrow, launches = 0.0, 0.0, True, 1
        inner = line.called() if line.opcode == "fusion" else None
        if inner is not None:
            moved = Fusion(self.computations, inner).total(line)
            flops, vector, narrow = self.arithmetic(inner)
            if sort := next((x for x in self.computations[inner].lines.values() if x.opcode == "sort"), None):
                launches, moved = self.sort_cost(sort)
        elif line.opcode == "dot":
            flops, narrow = dot_flops(computation, line), self.is_narrow(computation, line)
        elif line.opcode == "convolution":
            flops, narrow = convolution_flops(computation, line), self.is_narrow(computation, line)
        elif line.opcode == "sort":
            launches, moved = self.sort_cost(line)
        elif line.opcode == "custom-call":
            moved = called_bytes(line, operands)
            flops = library_flops(f"{call_target(line)} {line.name} {line.label}", operands, line.result)
        elif is_in_place(line):
            moved = 2 * updated_bytes(computation.lines, line)
        elif line.opcode in OVERLAPPING:
            launches, moved = 0, overlapping_bytes(computation, line)
        elif line.opcode in ("all-gather-start", "collective-permute-start"):
            moved = 2 * sum(map(num_bytes, operands))
        kind, exchanged = self.exchange(computation, line, inner)
        estimate = re.search(r'estimated_cycles":"(\d+)"', line.attributes)
        cycles = int(estimate[1]) if estimate else 0
        return Kernel(
            line.name, line.label, launches, moved, flops, vector, narrow, kind, exchanged, cycles, runs, loops
        )

    def exchange(self, computation: Computation, line: Line, inner: str | None) -> tuple[str | None, int]:
        """Returns the kind of the exchange between devices that a line starts, and its bytes on this device."""
        if inner is not None:
            computation = self.computations[inner]
            line = next((x for x in computation.lines.values() if x.opcode in COLLECTIVES), line)
        kind = line.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            return None, 0
        if channel := re.search(r"channel_id=(\d+)", line.attributes):
            if channel[1] in self.channels:
                return None, 0
            self.channels.add(channel[1])
        texts = [line.result] if line.opcode != kind else []  # the first half of an exchange returns its operand, too
        texts = texts or [line.result, *(computation.lines[name].result for name in line.operands)]
        if inner is not None and kind == "all-reduce" and computation.root.opcode == "dynamic-slice":
            kind = "reduce-scatter"
        return kind, sum(array.num_bytes for text in texts for array in all_arrays(text))

    def sort_cost(self, line: Line) -> tuple[int, int]:
        """Returns launches and bytes of a sort."""
        axis = sizes_of(line, "dimensions")
        passes = sort_passes(first_shape(line.result)[axis[0] if axis else -1])
        return passes, 2 * passes * num_bytes(line.result)

    def is_narrow(self, computation: Computation, line: Line) -> bool:
        """Returns whether a product's operands have at most 16 bits."""
        sides = [side for name in line.operands[:2] for side in all_arrays(computation.lines[name].result)]
        return all(BYTES[side.kind] <= 2 for side in sides)

    def arithmetic(self, name: str) -> tuple[float, float, bool]:
        """Returns operations of products and of the rest of a fusion, and whether the products are narrow."""
        computation = self.computations[name]
        flops, vector, narrow = 0.0, 0.0, True
        for line in computation.lines.values():
            if line.opcode in ("dot", "convolution"):
                make: Callable[[Computation, Line], float] = dot_flops if line.opcode == "dot" else convolution_flops
                flops += make(computation, line)
                narrow = narrow and self.is_narrow(computation, line)
            elif line.opcode == "fusion" and (inner := line.called()) is not None:
                more = self.arithmetic(inner)
                flops, vector, narrow = flops + more[0], vector + more[1], narrow and more[2]
            elif line.opcode == "reduce":
                vector += num_elements(computation.lines[line.operands[0]].result)
            elif line.opcode not in MOVES:
                vector += num_elements(line.result)
        return flops, vector, narrow


def read_kernels(text: str, unknown_turns: int = 1) -> list[Kernel]:
    """Returns the kernels of a program.

    Args:
        text: the program as `compiled.as_text()` returns it.
        unknown_turns: turns of a loop whose number the compiler does not know.
    """
    reader = _Reader(text, unknown_turns)
    return list(reader.kernels(reader.entry, 1))


# --- Sums


@dataclasses.dataclass(frozen=True)
class Cost:
    """The sums over the kernels of a program.

    Attributes:
        launches, bytes, flops, vector_ops, cycles: sums over all runs.
        seconds: the least time, summed over the kernels that run one after another. It is at least the time of all
            bytes.
        collectives: number and bytes of exchanges between devices, by kind.
    """

    launches: int
    bytes: int
    flops: float
    vector_ops: float
    cycles: int
    seconds: float
    collectives: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, kernels: list[Kernel], speed: Speed) -> "Cost":
        """Returns the sums over kernels."""
        counts, sizes = Counter(), Counter()
        for kernel in kernels:
            if kernel.collective is not None:
                counts[kernel.collective] += kernel.runs
                sizes[kernel.collective] += kernel.runs * kernel.exchanged
        return cls(
            sum(k.launches * k.runs for k in kernels),
            sum(k.bytes * k.runs for k in kernels),
            sum(k.flops * k.runs for k in kernels),
            sum(k.vector_ops * k.runs for k in kernels),
            sum(k.cycles * k.runs for k in kernels),
            max(
                sum(k.seconds(speed) for k in kernels if k.launches),
                sum(k.bytes * k.runs for k in kernels) / speed.bandwidth,
            ),
            {kind: (counts[kind], sizes[kind]) for kind in sorted(counts)},
        )

    def flops_utilization(self, speed: Speed) -> float:
        """Returns the share of the device's peak that products would reach in the least time."""
        return self.flops / speed.peak / self.seconds if self.seconds else 0.0


def largest_loop(kernels: list[Kernel]) -> tuple[str, list[Kernel]]:
    """Returns the loop with most kernels, and these: in a search, those of one step.

    The steps of a search are a loop inside the loop that gives free slots new sentences. So an outermost loop is chosen
    only if no loop has another inside.
    """
    inside = [kernel for kernel in kernels if len(kernel.loops) > 1] or [kernel for kernel in kernels if kernel.loops]
    name, _ = Counter(kernel.loop for kernel in inside).most_common(1)[0]
    return name, [kernel for kernel in kernels if kernel.loop == name]


def seconds_by(kernels: list[Kernel], speed: Speed, key: Callable[[Kernel], str]) -> list[tuple[str, float]]:
    """Returns the least time of groups of kernels, the longest first."""
    totals: dict[str, float] = {}
    for kernel in kernels:
        totals[key(kernel)] = totals.get(key(kernel), 0.0) + kernel.seconds(speed)
    return sorted(totals.items(), key=lambda item: -item[1])
