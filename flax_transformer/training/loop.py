"""The training loop."""

import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from flax_transformer.config import TrainingConfig
from flax_transformer.data.batching import BatchShape, EpochPlan, Position, TokenizedPairs
from flax_transformer.data.loader import training_batches
from flax_transformer.parallel.mesh import batch_sharding
from flax_transformer.shapes import Batch
from flax_transformer.training.checkpoint import Checkpoints
from flax_transformer.training.metrics import LossSummary, TokenCounts
from flax_transformer.training.run_log import ProgressReport, RunLog
from flax_transformer.training.state import StateLayout, TrainState
from flax_transformer.training.step import StepMetrics

Evaluate = Callable[[Any, int], None]


@dataclass
class Window:
    """What has happened since the last progress line; metrics stay on the device until it is written."""

    metrics: list[StepMetrics] = dataclasses.field(default_factory=list)
    tokens: TokenCounts = dataclasses.field(default_factory=TokenCounts)
    seconds: float = 0.0


class StopRequest:
    """Turns SIGTERM and SIGINT into a flag while it is entered; a second signal acts as usual.

    Python delivers signals to the main thread alone; in any other this does nothing.
    """

    def __init__(self):
        self.signal: int | None = None
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

    def _note(self, number: int, _frame: Any) -> None:
        self.signal = number
        for each, handler in self._previous.items():
            signal.signal(each, handler)


def compile_steps(
    step: Any,
    layout: StateLayout,
    shapes: list[BatchShape],
    mesh: Mesh,
) -> dict[tuple[int, ...], Any]:
    """Returns the compiled form of a jitted step for each batch shape, by (rows, source length, target length).

    Nothing is compiled once training has begun: a batch of any other shape is an error, not a pause.
    """
    sharding = batch_sharding(mesh)
    compiled = {}
    for shape in shapes:
        source = jax.ShapeDtypeStruct((shape.rows, shape.source_length), "int32", sharding=sharding)
        target = jax.ShapeDtypeStruct((shape.rows, shape.target_length), "int32", sharding=sharding)
        batch = Batch(source, source, source, target, target, target)
        with jax.set_mesh(mesh):
            compiled[tuple(shape)] = step.lower(layout.abstract, batch).compile()
    return compiled


def _shape_of(batch: Batch) -> tuple[int, ...]:
    return (*batch.source_tokens.shape, batch.target_tokens.shape[1])


def train_loop(
    state: TrainState,
    compiled: dict[tuple[int, ...], Any],
    pairs: TokenizedPairs,
    plan: EpochPlan,
    position: Position,
    config: TrainingConfig,
    mesh: Mesh,
    checkpoints: Checkpoints,
    log: RunLog,
    evaluate: Evaluate,
) -> tuple[TrainState, int | None]:
    """Trains until `config.steps`, and returns the last state.

    Args:
        state: to go on from; it is donated.
        compiled: as `compile_steps` returns.
        pairs, plan: the data.
        position: the first batch to take.
        config: how long, and what on the way.
        mesh: devices.
        checkpoints: where states are saved.
        log: where progress goes.
        evaluate: called with (parameters, step) at intervals and after the last step.

    Returns:
        The state, and the signal that stopped the training early, or None. In both cases the state is saved.
    """
    batches: Iterator[tuple[Batch, Position]] = training_batches(pairs, plan, position)
    sharding = batch_sharding(mesh)
    step, first_step = int(state.step), int(state.step)
    window, window_start = Window(), time.monotonic()
    loop_start = time.monotonic()

    with StopRequest() as stop:
        while step < config.steps and stop.signal is None:
            # --- one update; the host runs ahead and makes the next batch while the device computes
            batch, position = next(batches)
            window.tokens += TokenCounts.of(batch)
            state, metrics = compiled[_shape_of(batch)](state, jax.device_put(batch, sharding))
            window.metrics.append(metrics)
            step += 1
            last = step == config.steps

            # --- report
            if step % config.log_every_steps == 0 or last:
                fetched = jax.device_get(window.metrics)  # waits for the device
                window.seconds = time.monotonic() - window_start
                pace = (time.monotonic() - loop_start) / (step - first_step)
                log.progress(report(fetched, window, step, config.steps, pace * (config.steps - step)))
                window, window_start = Window(), time.monotonic()

            # --- evaluate and save; neither counts as training time
            pause = time.monotonic()
            if step % config.evaluate_every_steps == 0 or last:
                jax.block_until_ready(state)
                evaluate(state.params, step)
            if step % config.checkpoint_every_steps == 0 or last:
                jax.block_until_ready(state)
                checkpoints.save(state, position, config.seed)
            window_start += time.monotonic() - pause

        if stop.signal is not None:
            checkpoints.save(state, position, config.seed)
        checkpoints.wait()
    return state, stop.signal


def report(metrics: list[StepMetrics], window: Window, step: int, steps: int, seconds_left: float) -> ProgressReport:
    """Returns the figures of a progress line from the fetched metrics of its updates."""
    sums = [float(sum(values)) for values in zip(*(m.sums for m in metrics), strict=True)]
    return ProgressReport(
        step=step,
        steps=steps,
        loss=LossSummary.of(*sums),
        learning_rate=float(metrics[-1].learning_rate),
        gradient_norm=float(sum(m.gradient_norm for m in metrics) / len(metrics)),
        tokens=window.tokens,
        seconds=window.seconds,
        seconds_left=seconds_left,
    )
