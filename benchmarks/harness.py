"""What every benchmark shares: its command line, its result in Markdown, and systems that take turns.

Whatever slows the machine slows all systems that take turns. So the ratio of two turns that follow each other counts.

Systems that are compared live in processes of their own, since jax and torch both start threads when they are imported.
Neither is imported here.
"""

import abc
import dataclasses
import inspect
import multiprocessing
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import tyro

from flax_transformer.cli.main import KEPT_MEMORY, keep_memory  # which imports no jax

# --- The command line


@dataclasses.dataclass(frozen=True)
class Benchmark(abc.ABC):
    """One comparison; its fields are its command line.

    Attributes:
        rounds: turns of each system, after one to warm up.
        threads: CPUs that each system may use.
        output: file for the result, in Markdown; None writes none.
    """

    packages: ClassVar[tuple[str, ...]] = ("jax", "flax")

    rounds: int = 5
    threads: int = 2
    output: Path | None = None

    @abc.abstractmethod
    def measure(self, report: "Report") -> None:
        """Measures, and adds to the report."""


@dataclasses.dataclass(frozen=True)
class RecipeBenchmark(Benchmark):
    """A comparison on the text of a recipe.

    Attributes:
        config: the recipe.
        data: folder that holds its text; None takes the folder that the recipe names.
    """

    config: Path = Path("configs/multi30k_en_de_tiny.yaml")
    data: Path | None = None

    def recipe(self) -> Any:
        """Returns the configuration; this imports jax."""
        from flax_transformer.config.command_line import override
        from flax_transformer.config.reading import read_config

        config = read_config(self.config)
        return config if self.data is None else override(config, ["--data.folder", str(self.data)])


def run(benchmarks: dict[str, Any]) -> None:
    """Runs the benchmark that the command line names, one of these classes."""
    keep_memory()
    chosen = tyro.extras.subcommand_cli_from_dict(benchmarks)
    set_threads(chosen.threads)
    report = Report(chosen.output)
    title = (inspect.getdoc(type(chosen)) or "").splitlines()[0].rstrip(".")
    report.head(title, f"Commit {commit()}. {machine(*chosen.packages)}")
    chosen.measure(report)


def commit() -> str:
    """Returns the commit of the files, marked where they were changed; "unknown" outside a clone or without git."""
    if shutil.which("git") is None:
        return "unknown"
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


# --- The machine


def set_threads(count: int) -> None:
    """Keeps this process, and what it starts, on the first `count` CPUs that it may use."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:count]))
    os.environ["OMP_NUM_THREADS"] = str(count)


def machine(*packages: str) -> str:
    """Returns processor, cores in use and versions in one line."""
    processor, info = platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        processor = names[0] if names else processor
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{processor}, {cores} cores, Python {platform.python_version()}, {versions}"


def user_environment(cache: Path) -> dict[str, str]:
    """Returns the environment of a command as a user starts it, with a cache folder of its own."""
    kept = {name: value for name, value in os.environ.items() if (name, value) != ("GLIBC_TUNABLES", KEPT_MEMORY)}
    return kept | {"XDG_CACHE_HOME": str(cache)}


# --- The result


class Report:
    """A result in Markdown, which is printed as it grows.

    Args:
        output: file that gets the same text; None writes none.
    """

    def __init__(self, output: Path | None):
        self.output = output
        if output is not None:
            output.write_text("", encoding="utf-8")

    def say(self, text: str) -> None:
        """Adds lines."""
        print(text, flush=True)
        if self.output is not None:
            with self.output.open("a", encoding="utf-8") as file:
                file.write(f"{text}\n")

    def head(self, title: str, about: str) -> None:
        """Adds the title, the day, what the result depends on, and the command line without the machine's folders."""
        words = [f".../{Path(word).name}" if os.path.isabs(word) else word for word in sys.argv]
        self.say(f"# {title}\n\n{datetime.now(UTC):%Y-%m-%d}. {about}.\n\n    {shlex.join(['python', *words])}\n")

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Adds a table, each row as soon as it is known."""
        for row in (columns, ["---"] * len(columns)):
            self.say(f"| {' | '.join(row)} |")
        for row in rows:
            self.say(f"| {' | '.join(map(str, row))} |")
        self.say("")


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Returns the median, and the least and the most."""
    median, least, most = (f"{f(values):,.{digits}f}" for f in (statistics.median, min, max))
    return f"{median} ({least} to {most})"


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Returns the spread of how many times as fast ours is, from the seconds of turns that follow each other."""
    return spread([b / a for a, b in zip(ours, theirs, strict=True)], 2)


# --- Taking turns


def take_turns(systems: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of each system's turns in this process, after one turn of each to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for turn in range(rounds + 1):
        for name, work in systems.items():
            started = time.perf_counter()
            work()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


@dataclasses.dataclass(frozen=True)
class Built:
    """A system that is ready.

    Attributes:
        work: does the work of one turn, and returns when all is done.
        facts: what the other side must or may know; picklable.
    """

    work: Callable[[], Any]
    facts: dict[str, Any]


_built: Built | None = None  # in a worker: its system


def _build(build: Callable[..., Built], arguments: tuple) -> dict[str, Any]:
    global _built
    _built = build(*arguments)
    _built.work()  # to warm up
    return _built.facts


def _turn() -> float:
    assert _built is not None
    started = time.perf_counter()
    _built.work()
    return time.perf_counter() - started


def process() -> ProcessPoolExecutor:
    """Returns a process of its own, which begins with its first call."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


class Systems:
    """Systems in processes of their own, all with the allocator's settings of the command `flax-transformer`.

    An environment that has GLIBC_TUNABLES keeps its own settings; an empty value is how it is without any.
    """

    def __init__(self) -> None:
        self.processes: dict[str, ProcessPoolExecutor] = {}

    def start(self, name: str, build: Callable[..., Built], *arguments: Any) -> dict[str, Any]:
        """Builds a system by `build(*arguments)`, a module's function, and returns its facts."""
        self.processes[name] = process()
        return self.call(name, _build, build, arguments)

    def call(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Returns the result of `function(*arguments)`, a module's function, in the process of a system."""
        return self.processes[name].submit(function, *arguments).result()

    def turns(self, rounds: int) -> dict[str, list[float]]:
        """Returns the seconds of each system's turns."""
        seconds: dict[str, list[float]] = {name: [] for name in self.processes}
        for _ in range(rounds):
            for name in self.processes:
                seconds[name].append(self.call(name, _turn))
        return seconds

    def end(self, name: str) -> None:
        """Ends a system."""
        self.processes.pop(name).shutdown()

    def take_turns(self, rounds: int) -> dict[str, list[float]]:
        """Returns the seconds of each system's turns, and ends all."""
        seconds = self.turns(rounds)
        for name in seconds:
            self.end(name)
        return seconds
