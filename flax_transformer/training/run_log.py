"""The log of a run: progress lines on the terminal, train.log, metrics.jsonl, and TensorBoard events."""

import contextlib
import io
import json
import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from flax_transformer.errors import RunFolderError
from flax_transformer.object_storage import AnyPath
from flax_transformer.run_folder import RunFolder
from flax_transformer.shapes import Batch
from flax_transformer.small_files import write_atomically
from flax_transformer.training.event_file import EventFile
from flax_transformer.training.growing_file import GrowingFile
from flax_transformer.training.metrics import LossSummary, TokenCounts
from flax_transformer.training.metrics_file import records_and_lines
from flax_transformer.training.throughput import Throughput

BAR_WIDTH = 20


@dataclass(frozen=True)
class ProgressReport:
    """Figures of a progress line, over the updates since the line before.

    Attributes:
        step: number of updates so far.
        steps: number of updates of the whole training.
        loss: means over target tokens.
        learning_rate: learning rate of the last update.
        gradient_norm: mean norm of the gradient before clipping.
        tokens: token counts.
        skipped: number of skipped updates, whose loss, gradient or update was not finite.
        throughput: throughput without the first updates after a start.
        flops_per_step: mean number of operations of the model's products in one update; see `ModelFlops`.
        seconds: time of the updates, without compilation, evaluations and checkpoints.
        seconds_left: estimate for the rest of the training, with evaluations.
    """

    step: int
    steps: int
    loss: LossSummary
    learning_rate: float
    gradient_norm: float
    tokens: TokenCounts
    skipped: int
    throughput: Throughput
    flops_per_step: float
    seconds: float
    seconds_left: float

    @property
    def text(self) -> str:
        """The line without its bar."""
        minutes, seconds = divmod(round(self.seconds_left), 60)
        return (
            f"{self.step}/{self.steps} loss {self.loss.loss:.3f} ppl {self.loss.perplexity:.2f} "
            f"acc {100 * self.loss.accuracy:.1f}% lr {self.learning_rate:.2e} |g| {self.gradient_norm:.2f} "
            f"{self.throughput.text} pad {100 * self.tokens.padding_share:.0f}% "
            f"left {minutes}:{seconds:02d}" + (f" skipped {self.skipped}" if self.skipped else "")
        )

    @property
    def record(self) -> dict[str, Any]:
        """Figures for metrics.jsonl."""
        return {
            "step": self.step,
            "loss": self.loss.loss,
            "perplexity": self.loss.perplexity,
            "accuracy": self.loss.accuracy,
            "learning_rate": self.learning_rate,
            "gradient_norm": self.gradient_norm,
            "source_tokens": self.tokens.source,
            "target_tokens": self.tokens.target,
            "padding_share": self.tokens.padding_share,
            "skipped": self.skipped,
            "source_tokens_per_second": self.throughput.source_tokens,
            "target_tokens_per_second": self.throughput.target_tokens,
            "flops_per_step": self.flops_per_step,
            "flops_per_second": self.throughput.flops,
            "mfu": self.throughput.mfu,
            "seconds": self.seconds,
        }


class RunLog:
    """Log that writes to the terminal and to the run folder. Each call returns after its lines are in their files.

    On object storage they are there a little later; see `GrowingFile`.

    A terminal shows one progress line that changes. Elsewhere each progress line is printed.

    Args:
        folder: the run folder.
        first_step: step at which the training starts. Records of later steps are dropped.
        owes_evaluation: whether the training starts with the evaluation of that step. A record of it is dropped, too.

    Raises:
        RunFolderError: a file cannot be written. The methods raise it, too.
    """

    def __init__(self, folder: RunFolder, first_step: int = 0, owes_evaluation: bool = False):
        self._folder = folder
        with folder.writing(), contextlib.ExitStack() as files:
            _keep_records(folder.metrics_file, first_step, owes_evaluation)
            self._metrics = files.enter_context(contextlib.closing(GrowingFile(folder.metrics_file)))
            self._log = files.enter_context(contextlib.closing(GrowingFile(folder.log_file)))
            self._events = files.enter_context(contextlib.closing(EventFile(folder.tensorboard, first_step + 1)))
            self._files = files.pop_all()
        self._console = Console(soft_wrap=True, highlight=False, emoji=False)
        self._progress: Progress | None = None
        self._started = time.monotonic()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: Any, *_) -> None:
        self.stop_progress()
        # An error that is already raised must not be hidden by another.
        with contextlib.suppress(OSError) if kind is not None else self._folder.writing():
            self._files.close()

    def say(self, text: str) -> None:
        """Prints `text` and logs it."""
        self._console.print(text, markup=False)
        self._write_log(text)

    def progress(self, report: ProgressReport) -> None:
        """Shows a progress line and records its figures."""
        bar = _bar(report.step, report.steps)
        if self._console.is_terminal:
            self._live(report)
        else:
            self._console.print(f"{bar} {report.text}", markup=False)
        self._write_log(f"{bar} {report.text}")
        self.record("train", report.record)

    def record(self, kind: str, values: dict[str, Any]) -> None:
        """Appends figures to metrics.jsonl and to TensorBoard; JSON's null stands for a number that is not finite.

        Args:
            kind: kind of the record, "train" or "validation".
            values: figures by their names, among them the step.

        Raises:
            RunFolderError: the run folder was removed or moved. Checkpoints would go to a new folder in its place.
        """
        with self._folder.writing():
            found = self._folder.metrics_file.exists()
        if not found:
            raise RunFolderError(
                f"the run folder {self._folder.path} was removed or moved while it was trained, so the training ends. "
                "If it was moved, go on from its new place by --run FOLDER --resume."
            )
        numbers = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        elapsed = time.monotonic() - self._started
        line = json.dumps({"kind": kind, "elapsed_seconds": elapsed, **numbers}, allow_nan=False)
        scalars = {f"{kind}/{n}": v for n, v in values.items() if n != "step" and isinstance(v, int | float)}
        with self._folder.writing():
            self._metrics.append(f"{line}\n")
            self._events.add(values["step"], scalars)

    def show(self, step: int, texts: dict[str, str], pictures: dict[str, bytes]) -> None:
        """Adds texts in Markdown, and pictures as PNG, to TensorBoard, by their tags."""
        with self._folder.writing():
            for tag, text in texts.items():
                self._events.add_text(step, tag, text)
            for tag, picture in pictures.items():
                self._events.add_picture(step, tag, picture)

    def flush(self) -> None:
        """Returns when all lines and records are in their files."""
        with self._folder.writing():
            self._metrics.flush()
            self._log.flush()

    def keep_batch(self, batch: Batch) -> AnyPath:
        """Writes the arrays of a batch to a file, for the user to look at, and returns its path."""
        content = io.BytesIO()
        np.savez(content, **batch._asdict())
        with self._folder.writing():
            write_atomically(self._folder.bad_batch, content.getvalue())
        return self._folder.bad_batch

    def stop_progress(self) -> None:
        """Ends the changing progress line; its last state stays on the terminal."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _live(self, report: ProgressReport) -> None:
        if self._progress is None:
            self._progress = Progress(
                BarColumn(bar_width=BAR_WIDTH), TextColumn("{task.description}", markup=False), console=self._console
            )
            self._progress.add_task("", total=report.steps)
            self._progress.start()
        self._progress.update(self._progress.task_ids[0], completed=report.step, description=report.text)

    def _write_log(self, text: str) -> None:
        with self._folder.writing():
            self._log.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


class SilentLog(RunLog):
    """The log of a process whose training another process logs. It writes nothing."""

    def __init__(self, folder: RunFolder):
        self._folder = folder

    def __exit__(self, kind: Any, *_) -> None:
        pass

    def say(self, text: str) -> None:
        """Does nothing."""

    def progress(self, report: ProgressReport) -> None:
        """Does nothing."""

    def record(self, kind: str, values: dict[str, Any]) -> None:
        """Does nothing."""

    def show(self, step: int, texts: dict[str, str], pictures: dict[str, bytes]) -> None:
        """Does nothing."""

    def flush(self) -> None:
        """Does nothing."""

    def keep_batch(self, batch: Batch) -> AnyPath:
        """Returns the path of the file that the other process writes."""
        return self._folder.bad_batch

    def stop_progress(self) -> None:
        """Does nothing."""


def _bar(done: int, total: int) -> str:
    filled = BAR_WIDTH * done // total
    return f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}]"


def _keep_records(path: AnyPath, first_step: int, owes_evaluation: bool) -> None:
    if not path.exists():
        return

    def owed(record: dict[str, Any]) -> bool:
        return owes_evaluation and record["step"] == first_step and record["kind"] == "validation"

    records = records_and_lines(path)
    kept = [line for record, line in records if record["step"] <= first_step and not owed(record)]
    write_atomically(path, "".join(f"{line}\n" for line in kept))
