"""The training loop."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from flax_transformer.config.recipe import TrainingConfig
from flax_transformer.data.batching import BatchShape, Position
from flax_transformer.object_storage import AnyPath
from flax_transformer.parallel.memory import compile_checked
from flax_transformer.parallel.mesh import batch_sharding
from flax_transformer.parallel.placement import put
from flax_transformer.progress import tracked
from flax_transformer.shapes import Batch
from flax_transformer.training.log_window import LogWindow
from flax_transformer.training.metrics import TokenCounts
from flax_transformer.training.run_log import RunLog
from flax_transformer.training.state import TrainState
from flax_transformer.training.step_profile import StepProfile
from flax_transformer.training.stopping import Patience, StopRequest, StopVote
from flax_transformer.training.throughput import FlopFigures

# Maximum number of updates that the devices have been given and not finished. A few keep the devices busy. With many,
# XLA for CPU deadlocks on several devices (docs/lab_book.md, "Steps in flight on several CPU devices").
MAX_STEPS_IN_FLIGHT = 8

# Number of updates after a start that do not count in the throughput.
WARM_UP_STEPS = 5


def compile_steps(
    step: Any,
    state: Any,
    shapes: list[BatchShape],
    mesh: Mesh,
    reserved_bytes: int = 0,
) -> dict[tuple[int, ...], Any]:
    """Returns the compiled form of a jitted step for each batch shape, by (rows, source length, target length).

    Nothing is compiled after the start of a training. A batch of another shape is an error.

    Args:
        step: jitted step of training or evaluation, a function of a state or parameters, and a batch.
        state: shapes of the first argument of the step.
        shapes: shapes of the batches.
        mesh: the devices.
        reserved_bytes: bytes of other arrays on each device while the step runs.

    Raises:
        ConfigError: a step needs more memory than a device has.

    Example:
        >>> import optax
        >>> from flax_transformer import TransformerConfig, VocabularyInfo
        >>> from flax_transformer.parallel.mesh import MeshConfig, make_mesh
        >>> from flax_transformer.training.state import make_layout
        >>> config = TransformerConfig(model_dim=8, num_heads=2, feed_forward_dim=8)
        >>> vocabulary = VocabularyInfo(source_size=20, target_size=20, start_token=1)
        >>> schedule, mesh = optax.constant_schedule(1e-2), make_mesh(MeshConfig(data=1))
        >>> layout = make_layout(config, vocabulary, optax.adam(schedule), mesh)
        >>> from flax_transformer.training.step import Objective, jit_evaluation_step
        >>> evaluation = jit_evaluation_step(layout, Objective(0.0), mesh)
        >>> list(compile_steps(evaluation, layout.abstract.params, [BatchShape(8, 4, 4)], mesh))
        [(8, 4, 4)]
    """
    sharding = batch_sharding(mesh)
    compiled = {}
    for shape in tracked(shapes, "compiling", len(shapes), "shapes of batches", only_on_terminals=True):
        source = jax.ShapeDtypeStruct((shape.rows, shape.source_length), "int32", sharding=sharding)
        target = jax.ShapeDtypeStruct((shape.rows, shape.target_length), "int32", sharding=sharding)
        batch = Batch(source, source, source, target, target, target)
        with jax.set_mesh(mesh):
            compiled[tuple(shape)] = compile_checked(
                step.lower(state, batch),
                mesh,
                f"a step on batches of {shape.rows} rows x {shape.source_length}/{shape.target_length} tokens",
                "Raise batching.gradient_accumulation_steps, lower batching.tokens_per_batch, set model.rematerialize "
                "(on a CPU with model.scan_layers), or split the parameters over more devices by mesh.fsdp.",
                reserved_bytes=reserved_bytes,
            )
    return compiled


def shape_of(batch: Batch) -> tuple[int, ...]:
    """Returns the key of the step for a batch in the result of `compile_steps`."""
    return (*batch.source_tokens.shape, batch.target_tokens.shape[1])


@dataclass(frozen=True)
class CompiledSteps:
    """The train step, compiled for each shape of batches.

    Attributes:
        programs: result of `compile_steps`.
        mesh: the devices.
    """

    programs: dict[tuple[int, ...], Any]
    mesh: Mesh


@dataclass(frozen=True)
class Callbacks:
    """Functions that a training loop calls.

    Attributes:
        log: log of the progress.
        save: function of (state, position, quality or None). The loop calls it at intervals, after each evaluation, and
            after a signal. The files may be written later, in the background. If the state is saved already, its
            checkpoint gets the quality.
        check_saved: function without arguments. The loop calls it after each step. It raises an error if a file could
            not be written in the background.
        evaluate: function of (parameters, step). The loop calls it at intervals and after the last step. It returns the
            quality; higher is better. A signal interrupts it.
        history: earlier results of `evaluate` if a run is resumed.
        profile_folder: folder for the profile of `TrainingConfig.profile_steps`; None makes none.
    """

    log: RunLog
    save: Callable[[TrainState, Position, float | None], None]
    check_saved: Callable[[], None]
    evaluate: Callable[[Any, int], float]
    history: list[float]
    profile_folder: AnyPath | None = None


@dataclass(frozen=True)
class TrainingStart:
    """The place at which a training loop starts.

    Attributes:
        state: state to start from, which is donated.
        position: next batch to train on.
        owes_evaluation: whether a signal stopped the evaluation of this state. The loop begins with it.
    """

    state: TrainState
    position: Position
    owes_evaluation: bool = False


@dataclass(frozen=True)
class Trained:
    """Result of a training loop.

    Attributes:
        state: last state. `Callbacks.save` was called with it if there was a step.
        signal: signal that stopped the training, or None.
    """

    state: TrainState
    signal: int | None


def evaluation_is_due(step: int, config: TrainingConfig) -> bool:
    """Returns whether a training evaluates its parameters after `step`."""
    return step > 0 and (step % config.evaluate_every_steps == 0 or step == config.steps)


def train_loop(
    start: TrainingStart,
    batches: Iterator[tuple[Batch, Position]],
    config: TrainingConfig,
    steps: CompiledSteps,
    callbacks: Callbacks,
    flops: FlopFigures,
) -> Trained:
    """Trains until `config.steps`, until patience is exhausted, or until a signal, and returns the last state.

    The loop is one function with banners, since its parts share the step, the window and the signal.

    Args:
        start: place to start at.
        batches: batches, each with the position after it.
        config: length of the training, and its intervals.
        steps: train step for every shape of `batches`.
        callbacks: functions that the loop calls.
        flops: costs for the throughput.

    Raises:
        DivergenceError: the loss, the gradient or the update was not finite in `MAX_SKIPPED_STEPS` steps in a row. The
            parameters are those before these steps.
        RunFolderError: a file of the run cannot be written.

    Example:
        >>> import itertools
        >>> import optax
        >>> from flax_transformer import TransformerConfig, VocabularyInfo
        >>> from flax_transformer.parallel.mesh import MeshConfig, make_mesh
        >>> from flax_transformer.training.state import init_state, make_layout
        >>> config = TransformerConfig(model_dim=8, num_heads=2, feed_forward_dim=8)
        >>> vocabulary = VocabularyInfo(source_size=20, target_size=20, start_token=1)
        >>> schedule, mesh = optax.constant_schedule(1e-2), make_mesh(MeshConfig(data=1))
        >>> layout = make_layout(config, vocabulary, optax.adam(schedule), mesh)
        >>> from flax_transformer.run_folder import RunFolder
        >>> from flax_transformer.training.run_log import SilentLog
        >>> from flax_transformer.training.step import Objective, jit_train_step
        >>> from flax_transformer.training.throughput import ModelFlops
        >>> step = jit_train_step(layout, schedule, Objective(0.1), seed=0, mesh=mesh)
        >>> programs = compile_steps(step, layout.abstract, [BatchShape(8, 4, 4)], mesh)
        >>> positions = np.tile(np.arange(4, dtype=np.int32), (8, 1))
        >>> batch = Batch(*[np.full((8, 4), 5, np.int32), positions, np.ones((8, 4), np.int32)] * 2)
        >>> callbacks = Callbacks(SilentLog(RunFolder("runs/loop")), save=lambda *_: None, check_saved=lambda: None,
        ...                       evaluate=lambda params, step: 0.0, history=[])
        >>> begin = TrainingStart(init_state(config, vocabulary, layout, seed=0), Position(0, 0))
        >>> trained = train_loop(begin, itertools.repeat((batch, Position(0, 1))), TrainingConfig(steps=3),
        ...                      CompiledSteps(programs, mesh), callbacks, FlopFigures(ModelFlops(1, 1), None))
        >>> int(trained.state.step), trained.signal
        (3, None)
    """
    log, sharding = callbacks.log, batch_sharding(steps.mesh)
    state, position = start.state, start.position
    step = first_step = int(state.step)
    window, loop_start = LogWindow(saved=first_step > 0), time.monotonic()
    patience = Patience(config.early_stopping_patience, callbacks.history)
    vote = StopVote(steps.mesh)

    profile = StepProfile(callbacks.profile_folder, config.profile_steps, after=first_step + WARM_UP_STEPS)
    with StopRequest() as stop, profile:

        def evaluate() -> float | None:
            """Returns the quality of the present state, or None if a signal came before it was known."""
            quality = stop.interruptible(callbacks.evaluate, state.eval_params, step)
            if quality is None:
                log.say(f"the evaluation at step {step} was stopped: --resume will begin with it")
            else:
                patience.note(quality)
            return quality

        # --- an evaluation that a signal stopped before
        if start.owes_evaluation and (quality := evaluate()) is not None:
            callbacks.save(state, position, quality)

        stopped_by = vote.result(step, stop.signal)
        while step < config.steps and stopped_by is None and not patience.exhausted:
            # --- one update; the host makes the next batch while the device computes
            batch, position = next(batches)
            window.tokens += TokenCounts.of(batch)
            with profile.step(step + 1):
                state, metrics = steps.programs[shape_of(batch)](state, put(batch, sharding))
            window.pending.append((metrics, batch))
            step += 1
            window.pause(profile.end_step(step, metrics))
            if len(window.pending) > MAX_STEPS_IN_FLIGHT:
                window.fetch(step, log, leave=MAX_STEPS_IN_FLIGHT)
            to_evaluate = evaluation_is_due(step, config)
            to_save = step % config.checkpoint_every_steps == 0 or to_evaluate
            to_log = step % config.log_every_steps == 0 or to_save  # so a run resumed here has all counts

            # --- report
            if step == first_step + WARM_UP_STEPS and not to_log:
                window.fetch(step, log)
                window.end_warm_up()
            if to_log:
                window.fetch(step, log)
                pace = (time.monotonic() - loop_start) / (step - first_step)
                log.progress(window.report(step, config.steps, pace * (config.steps - step), flops))
                window = window.next()

            # --- evaluate, then save with the quality; neither counts as training time
            paused = time.monotonic()
            quality = evaluate() if to_evaluate else None
            callbacks.check_saved()
            if to_save:
                callbacks.save(state, position, quality)
                window.saved = True
            window.pause(time.monotonic() - paused)
            stopped_by = vote.result(step, stop.signal)

        stopped_by = vote.last_result(stop.signal)
        if first_step < step < profile.last:
            log.say(f"the training ends at step {step}: the profile of {profile.steps_asked_for} is not complete")
        if patience.exhausted:
            log.say(f"no new best in {patience.since_best} evaluations in a row: the training ends at step {step}")
        if stopped_by is not None and step > first_step:
            if not window.empty:
                window.fetch(step, log)
                log.progress(window.report(step, config.steps, 0.0, flops))
            callbacks.save(state, position, None)
    return Trained(state, stopped_by)
