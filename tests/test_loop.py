"""The training loop by itself: how far the host runs ahead of the devices, and what is said when it gives up."""

import signal
from typing import Any
from unittest.mock import MagicMock

import jax
import jax.numpy as jnp
import pytest

from flax_transformer.config.recipe import TrainingConfig
from flax_transformer.data.batching import Position
from flax_transformer.errors import DivergenceError, RunFolderError
from flax_transformer.ops.cross_entropy import LossSums
from flax_transformer.training import loop, stopping
from flax_transformer.training.run_log import RunLog
from flax_transformer.training.state import TrainState
from flax_transformer.training.step import StepMetrics
from flax_transformer.training.throughput import FlopFigures, ModelFlops
from tests import tiny


def train(
    step,
    mesh,
    first_step: int = 0,
    log_every_steps: int = 60,
    log=None,
    owes_evaluation: bool = False,
    profile_steps: int = 0,
    **callbacks: Any,
) -> loop.Trained:
    """Runs the loop up to step 60 with a made-up step; unless `callbacks` say more, nothing is evaluated or saved."""
    nothing: dict[str, Any] = {
        "save": lambda state, position, quality: None,
        "check_saved": lambda: None,
        "evaluate": lambda params, step: 0.0,
    }
    batch = tiny.batch([4] * 8, [4] * 8, source=8, target=8)
    return loop.train_loop(
        loop.TrainingStart(TrainState(jnp.int32(first_step), {}, {}, None), Position(0, 0), owes_evaluation),
        iter([(batch, Position(0, number)) for number in range(60)]),
        TrainingConfig(
            steps=60,
            log_every_steps=log_every_steps,
            evaluate_every_steps=60,
            checkpoint_every_steps=60,
            profile_steps=profile_steps,
        ),
        loop.CompiledSteps({(8, 8, 8): step}, mesh),
        loop.Callbacks(log or MagicMock(spec=RunLog), history=[], **nothing | callbacks),
        FlopFigures(ModelFlops(1, 1), None),
    )


def test_the_first_steps_after_a_start_are_left_out_of_the_throughput(one_device, monkeypatch):
    """They take 100 seconds each here, and all others one, of 32 target tokens."""
    now, log = 0.0, MagicMock(spec=RunLog)
    monkeypatch.setattr(loop.time, "monotonic", lambda: now)

    def step(state: TrainState, _batch) -> tuple[TrainState, StepMetrics]:
        nonlocal now
        now += 100.0 if int(state.step) < 20 + loop.WARM_UP_STEPS else 1.0
        one = jnp.float32(1.0)
        return TrainState(state.step + 1, {}, {}, None), StepMetrics(
            LossSums(one, one, one, one), one, one, jnp.asarray(False)
        )

    train(step, one_device, first_step=20, log_every_steps=20, log=log)
    assert log.progress.call_args_list[0].args[0].throughput.target_tokens == 32.0


def test_a_training_too_short_for_its_profile_says_so(one_device, tmp_path):
    def step(state: TrainState, _batch) -> tuple[TrainState, StepMetrics]:
        one = jnp.float32(1.0)
        return TrainState(state.step + 1, {}, {}, None), StepMetrics(
            LossSums(one, one, one, one), one, one, jnp.asarray(False)
        )

    for asked, said in ((3, []), (4, ["the training ends at step 60: the profile of steps 58 to 61 is not complete"])):
        log = MagicMock(spec=RunLog)
        train(step, one_device, 52, log=log, profile_steps=asked, profile_folder=tmp_path)
        assert [call.args[0] for call in log.say.call_args_list] == said
    log = MagicMock(spec=RunLog)
    train(step, one_device, 60, log=log, profile_steps=4, profile_folder=tmp_path)  # a resumed run without a step left
    log.say.assert_not_called()


def test_an_update_that_is_too_large_is_said_to_be(one_device):
    def step(state: TrainState, _batch) -> tuple[TrainState, StepMetrics]:
        one = jnp.float32(1.0)
        return TrainState(state.step + 1, {}, {}, None), StepMetrics(
            LossSums(one, one, one, one), one, one, jnp.asarray(True)
        )

    message = "the last is step 10: loss 1.0, gradient norm 1.0, and the norm of the update is not finite. Its batch"
    with pytest.raises(DivergenceError, match=message):
        train(step, one_device)


@pytest.mark.parametrize("saved_before", [False, True])
def test_divergence_says_whether_there_is_a_checkpoint(one_device, saved_before):
    def step(state: TrainState, _batch) -> tuple[TrainState, StepMetrics]:
        one = jnp.float32(1.0)
        metrics = StepMetrics(LossSums(jnp.float32(jnp.nan), one, one, one), one, one, jnp.asarray(True))
        return TrainState(state.step + 1, {}, {}, None), metrics

    first = 20 if saved_before else 0
    message = "The last checkpoint is whole. Try" if saved_before else "No checkpoint had been saved. Try"
    with pytest.raises(DivergenceError, match=message):
        train(step, one_device, first_step=first, log_every_steps=10)


def test_divergence_is_noticed_however_far_apart_progress_lines_are(one_device):
    """And no more batches are kept for it than are under way."""
    log, started = MagicMock(spec=RunLog), 0

    def step(state: TrainState, _batch) -> tuple[TrainState, StepMetrics]:
        nonlocal started
        started += 1
        one = jnp.float32(1.0)
        metrics = StepMetrics(LossSums(one, one, one, one), one, one, jnp.asarray(started > 20))
        return TrainState(state.step + 1, {}, {}, None), metrics

    with pytest.raises(DivergenceError, match="10 steps in a row were skipped, the last is step 30: "):
        train(step, one_device, log=log)
    assert started <= 30 + loop.MAX_STEPS_IN_FLIGHT
    assert [int(call.args[0].split()[2]) for call in log.say.call_args_list] == list(range(21, 31))


def test_only_a_few_steps_are_under_way_at_the_same_time(one_device, monkeypatch):
    """However far apart progress lines are: XLA for CPU stops for good when 32 programs of several devices wait."""
    started, waited_for, most = 0, 0, 0
    real = jax.device_get

    def step(state: TrainState, _batch) -> tuple[TrainState, StepMetrics]:
        nonlocal started, most
        started += 1
        most = max(most, started - waited_for)
        one = jnp.float32(1.0)
        metrics = StepMetrics(LossSums(one, one, one, one), one, jnp.float32(started), jnp.asarray(False))
        return TrainState(state.step + 1, {}, {}, None), metrics

    def wait(tree):
        nonlocal waited_for
        if tree:
            waited_for = int(tree[-1].learning_rate)
        return real(tree)

    monkeypatch.setattr(loop.jax, "device_get", wait)
    trained = train(step, one_device)
    assert (int(trained.state.step), trained.signal) == (60, None)
    assert most == loop.MAX_STEPS_IN_FLIGHT + 1


def one_step(state: TrainState, _batch) -> tuple[TrainState, StepMetrics]:
    one = jnp.float32(1.0)
    return TrainState(state.step + 1, {}, {}, None), StepMetrics(
        LossSums(one, one, one, one), one, one, jnp.asarray(False)
    )


@pytest.fixture
def no_copies(monkeypatch):
    monkeypatch.setattr(stopping, "SECONDS_OF_COPIES", 0.0)


@pytest.mark.parametrize("steps_before", [1, loop.WARM_UP_STEPS - 1, loop.WARM_UP_STEPS, loop.WARM_UP_STEPS + 1, 13])
def test_a_stop_records_every_step_before_it(one_device, no_copies, steps_before):
    """Also at the end of the warm-up, where no metrics are pending."""
    log = MagicMock(spec=RunLog)

    def step(state: TrainState, batch) -> tuple[TrainState, StepMetrics]:
        if int(state.step) == steps_before - 1:
            signal.raise_signal(signal.SIGTERM)
        return one_step(state, batch)

    trained = train(step, one_device, log=log)
    (report,) = (call.args[0] for call in log.progress.call_args_list)
    assert (int(trained.state.step), report.step, report.tokens.target) == (
        steps_before,
        steps_before,
        32 * steps_before,
    )
    assert report.loss.loss == 1.0


def test_an_evaluation_that_a_signal_stopped_comes_first_after_a_start(one_device, no_copies):
    saved, evaluated = [], []

    def evaluate(_params, step: int) -> float:
        evaluated.append(step)
        if len(evaluated) == 1:
            signal.raise_signal(signal.SIGHUP)
        return float(step)

    start = 59
    callbacks = {"save": lambda state, _, quality: saved.append((int(state.step), quality)), "evaluate": evaluate}
    stopped = train(one_step, one_device, first_step=start, **callbacks)
    assert (stopped.signal, saved) == (signal.SIGHUP, [(60, None), (60, None)])
    finished = train(one_step, one_device, first_step=60, owes_evaluation=True, **callbacks)
    assert (finished.signal, evaluated, saved[2:]) == (None, [60, 60], [(60, 60.0)])


def test_a_checkpoint_that_could_not_be_written_ends_a_training_at_the_next_step(one_device):
    done = []

    def check_saved() -> None:
        done.append(1)
        if len(done) == 7:
            raise RunFolderError("a checkpoint could not be written")

    with pytest.raises(RunFolderError, match="could not be written"):
        train(one_step, one_device, check_saved=check_saved)
    assert len(done) == 7
