"""Counts and metrics of a training since its last progress line."""

import math
import time
from dataclasses import dataclass, field

import jax

from flax_transformer.errors import DivergenceError
from flax_transformer.shapes import Batch
from flax_transformer.training.metrics import LossSummary, TokenCounts
from flax_transformer.training.run_log import ProgressReport, RunLog
from flax_transformer.training.step import StepMetrics
from flax_transformer.training.throughput import FlopFigures, Throughput

# Number of skipped updates in a row that ends a training.
MAX_SKIPPED_STEPS = 10


@dataclass
class LogWindow:
    """Counts and metrics since the last progress line.

    Attributes:
        pending: metrics that may still be on the device, each with its batch. The host need not wait for them.
        fetched: metrics on the host, of all updates that were not skipped.
        tokens: token counts of all updates.
        warm_up: token counts of the warm-up.
        learning_rate: learning rate of the last update.
        skipped: number of skipped updates.
        skipped_in_a_row: number of skipped updates since the last other one. The next window goes on with it.
        started: time at which the window began, moved on by every pause.
        warm_up_seconds: duration of the warm-up.
        saved: whether the run has a checkpoint. The next window goes on with it.
    """

    pending: list[tuple[StepMetrics, Batch]] = field(default_factory=list)
    fetched: list[StepMetrics] = field(default_factory=list)
    tokens: TokenCounts = field(default_factory=TokenCounts)
    warm_up: TokenCounts = field(default_factory=TokenCounts)
    learning_rate: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    started: float = field(default_factory=time.monotonic)
    warm_up_seconds: float = 0.0
    saved: bool = False

    @property
    def empty(self) -> bool:
        """Whether there was no update since the last progress line."""
        return self.tokens.padded == 0

    def next(self) -> "LogWindow":
        """Returns the window that follows. It knows of skipped updates and of the checkpoint."""
        return LogWindow(skipped_in_a_row=self.skipped_in_a_row, saved=self.saved)

    def pause(self, seconds: float) -> None:
        """Leaves seconds out of the throughput, in which the training did something else."""
        self.started += seconds

    def end_warm_up(self) -> None:
        """Leaves the updates so far out of the throughput."""
        self.warm_up, self.warm_up_seconds = self.tokens, time.monotonic() - self.started

    def fetch(self, step: int, log: RunLog, leave: int = 0) -> None:
        """Waits for the device and fetches the pending metrics, except those of the newest updates.

        Args:
            step: number of the newest update.
            log: log for warnings of skipped updates.
            leave: number of the newest updates that stay pending.

        Raises:
            DivergenceError: `MAX_SKIPPED_STEPS` updates in a row were skipped. A file has the batch of the last one.
        """
        first = step - len(self.pending) + 1
        taken, self.pending = self.pending[: len(self.pending) - leave], self.pending[len(self.pending) - leave :]
        batches = [batch for _, batch in taken]
        all_metrics = jax.device_get([metrics for metrics, _ in taken])
        for number, (metrics, batch) in enumerate(zip(all_metrics, batches, strict=True), start=first):
            self.learning_rate = float(metrics.learning_rate)
            if not metrics.skipped:
                self.fetched.append(metrics)
                self.skipped_in_a_row = 0
                continue
            self.skipped += 1
            self.skipped_in_a_row += 1
            loss, norm = float(metrics.sums.loss), float(metrics.gradient_norm)
            what = f"loss {loss}, gradient norm {norm}"
            if math.isfinite(loss) and math.isfinite(norm):
                what += ", and the norm of the update is not finite"
            log.say(f"warning: step {number} was skipped: {what}")
            if self.skipped_in_a_row == MAX_SKIPPED_STEPS:
                kept = log.keep_batch(batch)
                raise DivergenceError(
                    f"training diverged: {MAX_SKIPPED_STEPS} steps in a row were skipped, the last is step {number}: "
                    f"{what}. Its batch is kept in {kept}. "
                    f"{'The last checkpoint is whole' if self.saved else 'No checkpoint had been saved'}. Try a lower "
                    "learning rate (section optimizer), more optimizer.warmup_steps, or model.norm_order: pre."
                )

    def report(self, step: int, steps: int, seconds_left: float, flops: FlopFigures) -> ProgressReport:
        """Returns the figures of a progress line.

        Args:
            step: number of the newest update.
            steps: number of updates of the whole training.
            seconds_left: estimate for the rest of the training.
            flops: costs for the throughput.
        """
        seconds = time.monotonic() - self.started
        timed, timed_seconds = self.tokens - self.warm_up, seconds - self.warm_up_seconds
        if not timed.padded:  # all updates are warm-up
            timed, timed_seconds = self.tokens, seconds
        sums = [float(sum(values)) for values in zip(*(m.sums for m in self.fetched), strict=True)]
        norms = [float(m.gradient_norm) for m in self.fetched]
        return ProgressReport(
            step=step,
            steps=steps,
            loss=LossSummary.of(*sums or [math.nan] * 4),
            learning_rate=self.learning_rate,
            gradient_norm=sum(norms) / len(norms) if norms else math.nan,
            tokens=self.tokens,
            skipped=self.skipped,
            throughput=Throughput.of(timed, timed_seconds, flops),
            flops_per_step=flops.cost.total(self.tokens) / max(len(self.fetched) + self.skipped, 1),
            seconds=seconds,
            seconds_left=seconds_left,
        )
