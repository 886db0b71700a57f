"""A full disk ends a training within seconds, with what to do, and takes nothing that was saved."""

import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer.cli import main as cli
from flax_transformer.data.batching import Position
from flax_transformer.errors import RunFolderError
from flax_transformer.run_folder import RunFolder
from flax_transformer.training.checkpoint import Checkpoints
from flax_transformer.training.metrics_file import read_metrics
from flax_transformer.training.run_log import RunLog
from flax_transformer.training.state import TrainState
from tests import tiny
from tests.faults.full_disk import FullDisk, small_disk
from tests.small_run import checkpoint_params, command

# TensorStore goes on with other arrays when the disk is full, and their callbacks find no event loop. A command is
# silent about them until its process ends; the process of these tests does not end.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(params=["the best", "the fallback"])
def disk(request, tmp_path, capsys, monkeypatch):
    """The disk of this machine, and the one of a machine where nothing can be mounted."""
    if request.param == "the fallback":
        monkeypatch.setattr("os.geteuid", lambda: 1)
    with small_disk(tmp_path / "disk") as disk:
        yield disk


def test_a_log_on_a_full_disk_raises_and_never_waits(disk: FullDisk):
    """TensorBoard's writer once waited for a thread that the disk had ended."""
    folder = RunFolder(disk.folder / "run")
    folder.path.mkdir()
    with pytest.raises(RunFolderError, match=r"cannot be written: .+\. Make room, or mend the file system"):
        with RunLog(folder) as log:
            log.record("train", {"step": 1, "loss": 1.0})
            disk.fill()
            for step in range(2, 1_000):
                log.record("train", {"step": step, "loss": 1.0})
    with pytest.raises(RunFolderError, match="cannot be written"):
        folder.write_card({"steps": "1" * 10_000})
    with pytest.raises(RunFolderError, match="cannot be written"):
        folder.write_test(["one"] * 10_000, ["eins"] * 10_000, ["eins"] * 10_000)
    disk.empty()
    with RunLog(folder, 1) as log:
        log.record("train", {"step": 2, "loss": 0.5})
        log.keep_batch(tiny.batch([4], [4]))
    assert [(r["step"], r["loss"]) for r in read_metrics(folder.metrics_file)] == [(1, 1.0), (2, 0.5)]


def test_a_checkpoint_on_a_full_disk_is_noticed_at_once_and_said_in_one_paragraph(disk: FullDisk, capsys):
    folder, tree = disk.folder / "checkpoints", {"w": jnp.arange(4.0)}

    def fill_while_saving(_arguments, _program) -> int:
        with Checkpoints(folder, (1, 1)) as checkpoints:
            for step in (1, 2):
                checkpoints.save(TrainState(jnp.int32(step), tree, tree, None), Position(0, step), "")
                if step == 1:
                    checkpoints.best_steps()  # waits until it is written
                    disk.fill()
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                checkpoints.check_saved()
        return 0

    assert cli.run_verb(fill_while_saving, [], "") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: a checkpoint could not be written to {folder}: ") and error.count("\n") == 1
    assert "Those before it are whole. Make room, or mend the file system, and go on by --resume." in error
    disk.empty()
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.newest_steps() == [1]
        found = checkpoints.restore_params(1, {"w": jax.ShapeDtypeStruct((4,), jnp.float32)})
    np.testing.assert_array_equal(found["w"], np.arange(4.0))


@pytest.mark.slow
def test_a_training_that_met_a_full_disk_goes_on_where_it_was(disk: FullDisk, run, recipe, monkeypatch, capsys):
    folder, save, full_at = disk.folder / "run", Checkpoints.save, 0.0

    def save_on_a_full_disk(self, state, *arguments) -> None:
        nonlocal full_at
        if int(state.step) == 6:
            self._manager.wait_until_finished()  # so that the earlier ones are written
            disk.fill()
            full_at = time.monotonic()
        save(self, state, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_on_a_full_disk)
        arguments = ["--config", str(recipe), "--run", str(folder), "--training.steps", "400"]
        assert command("train", *arguments, "--training.evaluate-every-steps", "4") == 2
    assert time.monotonic() - full_at < 10
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and str(folder) in error

    disk.empty()
    assert command("train", "--run", str(folder), "--resume", "--training.steps", "8") == 0
    assert "resumed at step 4, " in (folder / "train.log").read_text()
    chex.assert_trees_all_equal(checkpoint_params(folder, 8), checkpoint_params(run, 8))
    found, expected = (
        [(r["kind"], r["step"], r["loss"]) for r in read_metrics(f / "metrics.jsonl")] for f in (folder, run)
    )
    assert found == expected
