"""What all parts share: the command line, the file of figures, and the facts of a device."""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import Benchmark


@dataclass(frozen=True)
class Measurement(Benchmark):
    """One part.

    Attributes:
        threads: CPUs that each system may use.
        folder: existing folder for `figures.jsonl` and for files of details; None writes none.
        tiny: whether sizes are small enough for any CPU, to try a part out.
    """

    threads: int = os.cpu_count() or 1
    folder: Path | None = None
    tiny: bool = False

    def note(self, name: str, **figures: Any) -> None:
        """Adds figures to the file."""
        if self.folder is not None:
            with (self.folder / "figures.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"part": type(self).__name__, "name": name, **figures}) + "\n")


def gibibytes(num_bytes: float | None) -> str:
    """Returns a number of bytes in GiB."""
    return "unknown" if num_bytes is None else f"{num_bytes / 2**30:.2f}"


def seconds_of_calls(call: Callable[[], Any], wait: Callable[[Any], Any], num_calls: int, rounds: int) -> list[float]:
    """Returns the seconds of one call in each round, after two calls to warm up.

    The calls of a round are launched one after the other, and the last result is waited for. So the time of a launch
    shows only where a call is shorter.
    """
    for _ in range(2):
        wait(call())
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(num_calls - 1):
            call()
        wait(call())
        seconds.append((time.perf_counter() - started) / num_calls)
    return seconds


def short(error: BaseException, length: int = 300) -> str:
    """Returns the class and the beginning of an error's message, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:length]


def median_of(values: Sequence[float]) -> float:
    """Returns the median of values."""
    return sorted(values)[len(values) // 2]
