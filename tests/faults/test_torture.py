"""Three kills of the torture script, in one training: what it leaves equals a training that nobody killed."""

import shutil
import signal

import jax

from benchmarks.torture import check_stopped, differences, finish, train
from tests.faults.kills import Moment

# What conftest.py sets, so that a process of its own computes the same bits as the tests.
SETTINGS = ("jax_num_cpu_devices", "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


def test_a_training_that_was_killed_three_times_equals_one_that_was_not(run, recipe, tmp_path):
    """The last kill meets what the signal before it asked for: a grace period may end too early."""
    killed, settings = tmp_path / "killed", {name: getattr(jax.config, name) for name in SETTINGS}
    log = killed.with_suffix(".log")
    command = train(recipe, killed, settings)
    assert command.kill_at(Moment("start", 1, 0.5), signal.SIGKILL)
    command = train(recipe, killed, settings)
    assert command.signal_at(Moment("evaluation", 1, 0.01), signal.SIGHUP)
    assert command.kill_at(Moment("checkpoint write", 2), signal.SIGKILL)
    check_stopped(command, signal.SIGKILL, log)
    assert "the evaluation at step 4 was stopped" in log.read_text() and "saved" not in log.read_text()
    finish(train(recipe, killed, settings), log)
    assert differences(run, killed) == []
    # The comparison sees a figure that is missing, and one bit of an array.
    metrics = killed / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if '"validation"' not in line))
    shutil.rmtree(killed / "checkpoints" / "8" / "params")
    wrong = differences(run, killed)
    assert any(text.startswith("arrays of one alone") for text in wrong)
    assert any(text.startswith("validation up to step 8") for text in wrong)
