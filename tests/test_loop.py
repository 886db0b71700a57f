"""The training loop by itself: how far the host runs ahead of the devices, and what is said when it gives up."""

from unittest.mock import MagicMock

import jax
import jax.numpy as jnp
import pytest

from flax_transformer.config.recipe import TrainingConfig
from flax_transformer.data.batching import Position
from flax_transformer.errors import DivergenceError
from flax_transformer.ops.cross_entropy import LossSums
from flax_transformer.training import loop
from flax_transformer.training.run_log import RunLog
from flax_transformer.training.state import TrainState
from flax_transformer.training.step import StepMetrics
from flax_transformer.training.throughput import FlopFigures, ModelFlops
from tests import tiny


def train(step, mesh, first_step: int = 0, log_every_steps: int = 60, log=None) -> loop.Trained:
    """Runs the loop up to step 60 with a made-up step; nothing is evaluated, saved or logged."""
    batch = tiny.batch([4] * 8, [4] * 8, source=8, target=8)
    return loop.train_loop(
        TrainState(jnp.int32(first_step), {}, {}, None),
        iter([(batch, Position(0, number)) for number in range(60)]),
        TrainingConfig(steps=60, log_every_steps=log_every_steps, evaluate_every_steps=60, checkpoint_every_steps=60),
        loop.CompiledSteps({(8, 8, 8): step}, mesh),
        loop.Callbacks(
            log or MagicMock(spec=RunLog),
            save=lambda state, position, quality: None,
            check_saved=lambda: None,
            evaluate=lambda params, step: 0.0,
            history=[],
        ),
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
