"""What has happened in a training since its last progress line."""

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

# Updates in a row that may be skipped before the training gives up.
MAX_SKIPPED_STEPS = 10


@dataclass
class LogWindow:
    """What has happened since the last progress line.

    Attributes:
        pending: metrics that may still be on the device, so that the host need not wait for each, and their batches.
        fetched: metrics on the host, of the updates that were not skipped.
        tokens: counts over all updates.
        warm_up: of them, those of the warm-up.
        learning_rate: of the last update.
        skipped: updates that were skipped.
        skipped_in_a_row: of them, those up to now without one between that was not; carried from window to window.
        started: when the window began, moved on by every pause.
        warm_up_seconds: how long the warm-up took.
        saved: whether the run has a checkpoint; carried from window to window.
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

    def end_warm_up(self) -> None:
        """Leaves what has happened so far out of the throughput."""
        self.warm_up, self.warm_up_seconds = self.tokens, time.monotonic() - self.started

    def fetch(self, step: int, log: RunLog, leave: int = 0) -> None:
        """Waits for the device and takes over its metrics, but for those of the newest updates.

        Args:
            step: the newest update.
            log: where updates that were skipped are told of.
            leave: updates that may stay under way.

        Raises:
            DivergenceError: `MAX_SKIPPED_STEPS` updates in a row were skipped; the last one's batch is kept in a file.
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
            step: the newest update.
            steps: updates in all.
            seconds_left: estimate for the rest of the training.
            flops: what the throughput is told by.
        """
        seconds = time.monotonic() - self.started
        timed, timed_seconds = self.tokens - self.warm_up, seconds - self.warm_up_seconds
        if not timed.padded:  # all of it was warm-up
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
