"""Watches a long training and a long translation: memory, open files and speed must not change with their length.

    python -m benchmarks.long_run training [--steps 200000] [--output FILE.md] [--picture FILE.png]
    python -m benchmarks.long_run translation [--lines 1000000]

The command runs in a process of its own, and Linux tells what it holds. Other work on the machine changes the time of
a step, but hardly its CPU time.
"""

import abc
import contextlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import harness
from benchmarks.harness import Benchmark, Report

RECIPE = """
data: {kind: number_words, num_train: 4000, num_validation: 64, num_test: 64}
tokenizer: {vocab_size: 60}
model: {model_dim: 16, num_heads: 2, feed_forward_dim: 32, num_encoder_layers: 1, num_decoder_layers: 1,
        max_source_length: 24, max_target_length: 24}
batching: {tokens_per_batch: 192, num_buckets: 1}
optimizer: {warmup_steps: 1000}
training: {log_every_steps: 500, evaluate_every_steps: 10000, checkpoint_every_steps: 2500}
decoding: {beam_size: 1, batch_size: 512, max_length_factor: 1.0, max_length_offset: 4}
evaluation: {bleu_tokenizer: char}
mesh: {data: 1}
"""
STEPS_OF_A_TRANSLATOR = 4_000

# Most growth of memory over the last half that counts as none.
MOST_MEBIBYTES = 8.0


class Sample(NamedTuple):
    """What a process held at a moment.

    Attributes:
        done: number of steps or lines so far.
        seconds: time since its start.
        cpu_seconds: CPU time of all its threads.
        mebibytes: resident memory.
        files: number of open file handles.
    """

    done: int
    seconds: float
    cpu_seconds: float
    mebibytes: float
    files: int


def watch(command: list[str], environment: dict[str, str], done: Callable[[], int], every: float) -> list[Sample]:
    """Returns samples of a command of `flax-transformer`, until its end.

    Args:
        command: the command line, verb first.
        environment: its environment.
        done: returns the number of steps or lines so far.
        every: seconds between samples.
    """
    samples, started = [], time.monotonic()
    program = [sys.executable, "-m", "flax_transformer.cli.main", *command]
    process = subprocess.Popen(program, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    facts = Path("/proc") / str(process.pid)
    while process.poll() is None:
        try:
            pages = int((facts / "statm").read_text().split()[1])
            ticks = (facts / "stat").read_text().rpartition(")")[2].split()[11:13]
            files = len(list((facts / "fd").iterdir()))
        except OSError:  # it has just ended
            continue
        cpu = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
        memory = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
        samples.append(Sample(done(), time.monotonic() - started, cpu, memory, files))
        time.sleep(every)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode} of {' '.join(command)}")
    return samples


class Course(NamedTuple):
    """Properties of a part of a run.

    Attributes:
        growth: growth of resident memory in MiB, by a straight line through the samples.
        mebibytes: least and most resident memory.
        files: fewest and most open file handles.
        seconds: time for 1,000 steps or lines.
        cpu_seconds: CPU time for 1,000 steps or lines.
    """

    growth: float
    mebibytes: tuple[float, float]
    files: tuple[int, int]
    seconds: float
    cpu_seconds: float

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> "Course":
        """Returns the properties of some samples."""
        done = np.array([sample.done for sample in samples], float)
        memory = [sample.mebibytes for sample in samples]
        slope = float(np.polyfit(done, memory, 1)[0])
        files = [sample.files for sample in samples]
        first, last = samples[0], samples[-1]
        thousands = (last.done - first.done) / 1_000
        return cls(
            slope * (last.done - first.done),
            (min(memory), max(memory)),
            (min(files), max(files)),
            (last.seconds - first.seconds) / thousands,
            (last.cpu_seconds - first.cpu_seconds) / thousands,
        )


def plot(samples: Sequence[Sample], unit: str, title: str, output: Path) -> None:
    """Writes a picture of memory, open files and time over steps or lines."""
    from matplotlib.figure import Figure

    from flax_transformer.plots.picture import set_title, write_picture

    figure = Figure(figsize=(8, 7), layout="constrained")
    set_title(figure, title)
    memory, files, speed = figure.subplots(3, 1, sharex=True)
    done = [sample.done for sample in samples]
    memory.plot(done, [sample.mebibytes for sample in samples])
    memory.set(ylabel="resident memory, MiB", ylim=(0, None))
    files.plot(done, [sample.files for sample in samples])
    files.set(ylabel="open files", ylim=(0, None))
    parts = [(a, b, (b.done - a.done) / 1_000) for a, b in itertools.pairwise(samples) if b.done > a.done]
    ends = [b.done for _, b, _ in parts]
    speed.plot(ends, [(b.seconds - a.seconds) / n for a, b, n in parts], label="time", linewidth=0.8)
    speed.plot(ends, [(b.cpu_seconds - a.cpu_seconds) / n for a, b, n in parts], label="CPU time", linewidth=0.8)
    speed.set(ylabel=f"seconds for 1,000 {unit}", xlabel=unit, ylim=(0, None))
    speed.legend()
    for axes in (memory, files, speed):
        axes.grid(alpha=0.3)
    write_picture(figure, output)


@dataclass(frozen=True)
class LongRun(Benchmark):
    """A long run whose process is watched.

    Attributes:
        every: seconds between two samples.
        picture: file for a picture; None draws none.
    """

    unit = ""

    every: float = 5.0
    picture: Path | None = None

    def measure(self, report: Report) -> None:
        """Runs, and reports what the halves of the run held."""
        folder = Path(tempfile.mkdtemp(prefix="long_run_"))
        (folder / "recipe.yaml").write_text(RECIPE)
        try:
            samples = self.samples(folder, harness.user_environment(folder / "cache"))
        finally:
            shutil.rmtree(folder)
        # Before and after its steps or lines a command does other work, such as the test and the pictures of a run.
        total, last = getattr(self, self.unit), max(sample.done for sample in samples)
        done = [sample for sample in samples if 0 < sample.done < last]
        halves = [[s for s in done if (s.done > done[-1].done / 2) == second] for second in (False, True)]
        courses = [Course.of(half) for half in halves]
        report.say(f"{total:,} {self.unit} in {samples[-1].seconds:,.0f} s, {len(done)} samples.\n")
        names = ("memory, MiB", "growth, MiB", "open files", f"s for 1,000 {self.unit}", f"CPU s for 1,000 {self.unit}")
        report.table(["", "first half", "last half"], zip(names, *map(self._cells, courses), strict=True))
        flat = courses[1].growth <= MOST_MEBIBYTES and courses[1].files[1] <= courses[0].files[1]
        medians = [statistics.median(sample.mebibytes for sample in half) for half in halves]
        report.say(
            f"Verdict: {'flat' if flat else 'NOT FLAT'}. Median memory of the halves: {medians[0]:,.0f} and "
            f"{medians[1]:,.0f} MiB. Flat means at most {MOST_MEBIBYTES:.0f} MiB more in the last half, and no more "
            "open files than in the first."
        )
        if self.picture is not None:
            plot(done, self.unit, f"{total:,} {self.unit} in one process", self.picture)

    @staticmethod
    def _cells(course: Course) -> list[str]:
        return [
            "{:,.0f} to {:,.0f}".format(*course.mebibytes),
            f"{course.growth:+.1f}",
            "{} to {}".format(*course.files),
            f"{course.seconds:.2f}",
            f"{course.cpu_seconds:.2f}",
        ]

    @abc.abstractmethod
    def samples(self, folder: Path, environment: dict[str, str]) -> list[Sample]:
        """Returns the samples of the run, whose files lie in `folder`."""


@dataclass(frozen=True)
class Training(LongRun):
    """A long training of a tiny model: memory, open files and step time.

    Attributes:
        steps: number of steps.
    """

    unit = "steps"

    steps: int = 200_000

    def samples(self, folder: Path, environment: dict[str, str]) -> list[Sample]:
        """Returns the samples of a training."""
        run = folder / "run"
        metrics = run / "metrics.jsonl"

        def step() -> int:
            lines = metrics.read_bytes().split(b"\n")[:-1] if metrics.exists() else []
            return max((json.loads(line)["step"] for line in lines), default=0)

        return watch(train(folder, run, self.steps), environment, step, self.every)


@dataclass(frozen=True)
class Translation(LongRun):
    """A long translation by a tiny model: memory, open files and time of a line.

    Attributes:
        lines: number of lines.
    """

    unit = "lines"

    lines: int = 1_000_000

    def samples(self, folder: Path, environment: dict[str, str]) -> list[Sample]:
        """Trains a model, and returns the samples of a translation by it."""
        from flax_transformer.data.synthetic import english_number_words

        run, text, output = folder / "run", folder / "text", folder / "output"
        watch(train(folder, run, STEPS_OF_A_TRANSLATOR), environment, lambda: 0, self.every)
        with text.open("w") as file:
            file.writelines(f"{english_number_words(number % 100)}\n" for number in range(self.lines))
        record = output.with_name("output.partial.json")

        def line() -> int:
            with contextlib.suppress(FileNotFoundError):  # before the first lines, and after the last ones
                return json.loads(record.read_text())["lines"]
            return 0

        command = ["translate", "--run", str(run), "--input", str(text), "--output", str(output)]
        return watch(command, environment, line, self.every)


def train(folder: Path, run: Path, steps: int) -> list[str]:
    """Returns the command line of a training."""
    return ["train", "--config", str(folder / "recipe.yaml"), "--run", str(run), "--training.steps", str(steps)]


if __name__ == "__main__":
    harness.run({"training": Training, "translation": Translation})
