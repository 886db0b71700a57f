"""The kernels of a program: how long each took, read from a profile of JAX."""

import csv
import gzip
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import Report

MOST_ROWS = 40


@dataclass(frozen=True)
class KernelTime:
    """All runs of one kernel for one instruction of the program.

    Attributes:
        kernel: name of the kernel.
        instruction: name of the instruction of the optimised program, or "".
        origin: operation that the instruction comes from, as JAX names it, or "".
        count: number of runs.
        seconds: their sum.
    """

    kernel: str
    instruction: str
    origin: str
    count: int
    seconds: float


def profiled(work: Callable[[], Any], program_text: str) -> tuple[list[KernelTime], float]:
    """Runs `work` under the profiler; returns its kernels, longest first, and the seconds in which any ran.

    Args:
        work: waits for its own results.
        program_text: the optimised program, which names each instruction's origin.

    Raises:
        LookupError: the profile has no events of a device.
    """
    import jax

    work()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            work()
        (path,) = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(path))
        events = list(device_events(profile))
    if not events:
        raise LookupError(f"no events of a device in {[(p.name, [x.name for x in p.lines]) for p in profile.planes]}")
    origins = origins_of(program_text)
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0])
    for name, instruction, start, end in events:
        found = sums[name, instruction]
        found[0] += 1
        found[1] += (end - start) * 1e-9
    kernels = [
        KernelTime(kernel, instruction, origins.get(instruction, ""), int(count), seconds)
        for (kernel, instruction), (count, seconds) in sums.items()
    ]
    return sorted(kernels, key=lambda k: -k.seconds), covered([(start, end) for _, _, start, end in events]) * 1e-9


def device_events(profile: Any) -> Iterator[tuple[str, str, float, float]]:
    """Yields (kernel, instruction, start, end) of each event of a device; times are in nanoseconds.

    A GPU has a line for each stream. On a CPU the events of the program's instructions stand in for kernels.
    """
    planes = list(profile.planes)
    on_gpu = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    lines = [line for plane in on_gpu or planes for line in plane.lines]
    streams = [line for line in lines if line.name.startswith("Stream")] if on_gpu else []
    for line in streams or lines:
        for event in line.events:
            instruction = str(dict(event.stats).get("hlo_op", ""))
            if on_gpu or instruction:
                yield event.name, instruction, event.start_ns, event.end_ns


def origins_of(program_text: str) -> dict[str, str]:
    """Returns the origin of each instruction of an optimised program.

    An origin is the innermost line of this package's code, or JAX's own name for the operation where there is none.
    """
    functions, backward = functions_of_frames(program_text), "transpose("
    found = {}
    pattern = r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"(?:.*?stack_frame_id=(\d+))?'
    for name, operation, frame in re.findall(pattern, program_text, flags=re.MULTILINE):
        function = functions.get(int(frame or 0))
        found[name] = f"{function}{', backward' if backward in operation else ''}" if function else operation
    return found


def functions_of_frames(program_text: str) -> dict[int, str]:
    """Returns "file:line function" of this package for each stack frame of a program, from the tables at its top."""

    def table(name: str, pattern: str) -> dict[int, tuple[str, ...]]:
        section = re.search(rf"^{name}\n((?:\d+ .*\n)+)", program_text, flags=re.MULTILINE)
        rows = re.findall(rf"^(\d+) {pattern}", section[1] if section else "", flags=re.MULTILINE)
        return {int(number): tuple(values) for number, *values in rows}

    files, names = table("FileNames", '"(.*)"'), table("FunctionNames", '"(.*)"')
    places = table("FileLocations", r"{file_name_id=(\d+) function_name_id=(\d+) line=(\d+)")
    frames = table("StackFrames", r"{file_location_id=(\d+) parent_frame_id=(\d+)")
    found: dict[int, str] = {}
    for number, (place, parent) in sorted(frames.items()):
        file, function, line = places[int(place)]
        path = files[int(file)][0]
        if "flax_transformer/" in path.removesuffix("training/step.py"):
            found[number] = f"{path.rpartition('/')[2]}:{line} {names[int(function)][0]}"
        elif int(parent) - 1 in found:  # parents come first, and their numbers are written one too high
            found[number] = found[int(parent) - 1]
    return found


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Returns the length of the union of spans."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def without_numbers(name: str) -> str:
    """Returns the name of a kernel's group: its name without numbers at the end."""
    return re.sub(r"([._]\d+)+$", "", name)[:90]


def kernel_tables(report: Report, kernels: list[KernelTime], busy: float, steps: int) -> None:
    """Adds three tables: kernels by the beginning of their names, by their origins, and one by one."""
    total = sum(kernel.seconds for kernel in kernels)
    launches = sum(kernel.count for kernel in kernels) / steps
    report.say(
        f"profile of {steps} steps: kernels take {1e3 * total / steps:.3f} ms a step in {launches:,.0f} runs; some "
        f"kernel runs during {1e3 * busy / steps:.3f} ms\n"
    )
    keys = {"group of kernels": lambda k: without_numbers(k.kernel), "origin": lambda k: k.origin[-120:]}
    for title, key in keys.items():
        report.table([title, "runs a step", "ms a step", "% of the kernels"], grouped(kernels, key, total, steps))
    rows = [
        [k.kernel[:80], k.instruction, k.origin[-100:], f"{k.count / steps:g}", f"{1e3 * k.seconds / steps:.4f}"]
        for k in kernels[:MOST_ROWS]
    ]
    report.table(["kernel", "instruction", "origin", "runs a step", "ms a step"], map(cells, rows))


def grouped(kernels: list[KernelTime], key: Callable[[KernelTime], str], total: float, steps: int) -> list[list[str]]:
    """Returns the rows of the longest groups of kernels."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for kernel in kernels:
        found = sums[key(kernel)]
        found[0] += kernel.count
        found[1] += kernel.seconds
    longest = sorted(sums.items(), key=lambda item: -item[1][1])[:MOST_ROWS]
    return [
        cells([name, f"{count / steps:g}", f"{1e3 * seconds / steps:.4f}", f"{100 * seconds / total:.2f}"])
        for name, (count, seconds) in longest
    ]


def cells(row: list[str]) -> list[str]:
    """Returns a row whose words do not end its cells."""
    return [cell.replace("|", "/") for cell in row]


def save_kernels(path: Path, kernels: list[KernelTime], steps: int) -> None:
    """Writes all kernels, as comma-separated values."""
    with gzip.open(path, "wt", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["kernel", "instruction", "origin", "runs a step", "ms a step"])
        for k in kernels:
            writer.writerow([k.kernel, k.instruction, k.origin, k.count / steps, 1e3 * k.seconds / steps])
