"""The training loop."""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh

from flax_transformer.config.recipe import TrainingConfig
from flax_transformer.data.batching import BatchShape, Position
from flax_transformer.errors import DivergenceError
from flax_transformer.parallel.memory import compiled_within_memory
from flax_transformer.parallel.mesh import batch_sharding
from flax_transformer.shapes import Batch
from flax_transformer.training.metrics import LossSummary, TokenCounts
from flax_transformer.training.run_log import ProgressReport, RunLog
from flax_transformer.training.state import TrainState
from flax_transformer.training.step import StepMetrics
from flax_transformer.training.throughput import ProductCost, Throughput

Save = Callable[[TrainState, Position, float | None], None]
Evaluate = Callable[[Any, int], float]


# Updates in a row that may be skipped before the training gives up.
MOST_SKIPPED = 10

# Updates that may be under way at the same time. A few keep the devices busy; with 32 XLA for CPU comes to a stop for
# good when it has several devices (docs/lab_book.md, 2026-11-24).
MOST_UNDER_WAY = 8

# Updates after a start that are not counted in the throughput.
WARM_UP_STEPS = 5


@dataclass
class Window:
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
            DivergenceError: `MOST_SKIPPED` updates in a row were skipped; the batch of the last one is kept in a file.
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
            if self.skipped_in_a_row == MOST_SKIPPED:
                kept = log.keep_batch(batch)
                raise DivergenceError(
                    f"training diverged: {MOST_SKIPPED} steps in a row were skipped, the last is step {number}: "
                    f"{what}. Its batch is kept in {kept}. "
                    f"{'The last checkpoint is whole' if self.saved else 'No checkpoint had been saved'}. Try a lower "
                    "learning rate (section optimizer), more optimizer.warmup_steps, or model.norm_order: pre."
                )

    def report(
        self, step: int, steps: int, seconds_left: float, cost: ProductCost, peak: float | None
    ) -> ProgressReport:
        """Returns the figures of a progress line; `cost` and `peak` as for `Throughput.of`."""
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
            throughput=Throughput.of(timed, timed_seconds, cost, peak),
            flops_per_step=cost.total(self.tokens) / max(len(self.fetched) + self.skipped, 1),
            seconds=seconds,
            seconds_left=seconds_left,
        )


class Patience:
    """Says when evaluations have not become better for too long.

    Args:
        limit: evaluations in a row without a new best; 0 is for ever.
        history: qualities of earlier evaluations, when a run goes on.
    """

    def __init__(self, limit: int, history: list[float]):
        self.limit = limit
        self.best = -math.inf
        self.since_best = 0
        for quality in history:
            self.note(quality)

    def note(self, quality: float) -> None:
        """Takes over one more evaluation; the higher the better."""
        better = quality > self.best
        self.since_best = 0 if better else self.since_best + 1
        self.best = max(self.best, quality)

    @property
    def exhausted(self) -> bool:
        """Whether it is time to stop."""
        return 0 < self.limit <= self.since_best


class _Stopped(BaseException):
    """What `StopRequest.interrupting` ends by: no error, so that nothing on the way takes it for one."""


class StopRequest:
    """Turns SIGTERM and SIGINT into a flag while it is entered; a second signal acts as usual.

    Python delivers signals to the main thread alone; in any other this does nothing.
    """

    def __init__(self):
        self.signal: int | None = None
        self._interrupts = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def interrupting(self) -> Generator[None, None, None]:
        """Ends what is done inside it at the signal; it must be something that can be left half done."""
        self._interrupts = True
        try:
            yield
        except _Stopped:
            pass
        finally:
            self._interrupts = False

    def _note(self, number: int, _frame: Any) -> None:
        self.signal = number
        for each, handler in self._previous.items():
            signal.signal(each, handler)
        if self._interrupts:
            raise _Stopped


def compile_steps(
    step: Any,
    state: Any,
    shapes: list[BatchShape],
    mesh: Mesh,
    held: int = 0,
) -> dict[tuple[int, ...], Any]:
    """Returns the compiled form of a jitted step for each batch shape, by (rows, source length, target length).

    Nothing is compiled once training has begun: a batch of any other shape is an error, not a pause.

    Args:
        step: of training or evaluation, (state or parameters, batch) -> ...
        state: shapes of the first of these.
        shapes: of the batches.
        mesh: the devices.
        held: bytes on each device that are kept beside what the step reads.

    Raises:
        ConfigError: a step needs more memory than a device has.
    """
    sharding = batch_sharding(mesh)
    compiled = {}
    for shape in shapes:
        source = jax.ShapeDtypeStruct((shape.rows, shape.source_length), "int32", sharding=sharding)
        target = jax.ShapeDtypeStruct((shape.rows, shape.target_length), "int32", sharding=sharding)
        batch = Batch(source, source, source, target, target, target)
        with jax.set_mesh(mesh):
            compiled[tuple(shape)] = compiled_within_memory(
                step.lower(state, batch),
                mesh,
                f"a step on batches of {shape.rows} rows x {shape.source_length}/{shape.target_length} tokens",
                "Raise batching.micro_batches, lower batching.tokens_per_batch, set model.rematerialize (on a CPU with "
                "model.scan_layers), or split the parameters over more devices by mesh.fsdp.",
                held=held,
            )
    return compiled


def shape_of(batch: Batch) -> tuple[int, ...]:
    """Returns the key that `compile_steps` gives the step for a batch."""
    return (*batch.source_tokens.shape, batch.target_tokens.shape[1])


def train_loop(
    state: TrainState,
    compiled: dict[tuple[int, ...], Any],
    batches: Iterator[tuple[Batch, Position]],
    config: TrainingConfig,
    mesh: Mesh,
    log: RunLog,
    save: Save,
    evaluate: Evaluate,
    history: list[float],
    cost: ProductCost,
    peak: float | None,
) -> tuple[TrainState, int | None]:
    """Trains until `config.steps`, or until patience is exhausted, and returns the last state.

    Args:
        state: to go on from; it is donated.
        compiled: as `compile_steps` returns.
        batches: the data, each with the position after it.
        config: how long, and what on the way.
        mesh: devices.
        log: where progress goes.
        save: called with (state, position, quality or None) at intervals, after each evaluation and when a signal stops
            the training, which an evaluation does not hold up.
        evaluate: called with (parameters, step) at intervals and after the last step; returns the quality, the higher
            the better.
        history: qualities of the evaluations before, when a run goes on.
        cost: of the model's products.
        peak: FLOP/s that all devices together can do at most, or None.

    Returns:
        The state, and the signal that stopped the training early, or None. In both cases the state was saved, if there
        was a step.

    Raises:
        DivergenceError: `MOST_SKIPPED` steps in a row had a loss or gradient that is not finite; none of them changed
            the parameters.
    """
    sharding = batch_sharding(mesh)
    step = first_step = int(state.step)
    position = None
    window, loop_start = Window(saved=first_step > 0), time.monotonic()
    patience = Patience(config.patience, history)

    with StopRequest() as stop:
        while step < config.steps and stop.signal is None and not patience.exhausted:
            # --- one update; the host runs ahead and makes the next batch while the device computes
            batch, position = next(batches)
            window.tokens += TokenCounts.of(batch)
            state, metrics = compiled[shape_of(batch)](state, jax.device_put(batch, sharding))
            window.pending.append((metrics, batch))
            step += 1
            if len(window.pending) > MOST_UNDER_WAY:
                window.fetch(step, log, leave=MOST_UNDER_WAY)
            last = step == config.steps
            to_evaluate = step % config.evaluate_every_steps == 0 or last
            to_save = step % config.checkpoint_every_steps == 0 or to_evaluate
            to_log = step % config.log_every_steps == 0 or to_save  # a run that goes on from here has counted all

            # --- report
            if step == first_step + WARM_UP_STEPS and not to_log:
                window.fetch(step, log)
                window.end_warm_up()
            if to_log:
                window.fetch(step, log)
                pace = (time.monotonic() - loop_start) / (step - first_step)
                log.progress(window.report(step, config.steps, pace * (config.steps - step), cost, peak))
                window = Window(skipped_in_a_row=window.skipped_in_a_row, saved=window.saved)

            # --- evaluate, then save with what came out; neither counts as training time
            pause, quality = time.monotonic(), None
            if to_evaluate and stop.signal is None:
                with stop.interrupting():
                    quality = evaluate(state.usable, step)
            if to_evaluate and quality is None:
                log.say(f"the evaluation at step {step} was stopped: its checkpoint can be the newest, not the best")
            elif quality is not None:
                patience.note(quality)
            if to_save:
                save(state, position, quality)
                window.saved = True
            window.started += time.monotonic() - pause

        if patience.exhausted:
            log.say(f"no better evaluation for {patience.since_best} in a row: the training ends at step {step}")
        if stop.signal is not None and position is not None:
            if window.pending:
                window.fetch(step, log)
                log.progress(window.report(step, config.steps, 0.0, cost, peak))
            save(state, position, None)
    return state, stop.signal
