"""Signals and streams: what ends a training, what does not, and what is owed after it."""

import io
import os
import shutil
import signal
import threading
import time

import jax.numpy as jnp
import pytest

from flax_transformer.data.batching import Position
from flax_transformer.errors import RunFolderError
from flax_transformer.run_folder import RunFolder
from flax_transformer.standard_streams import lossy_standard_streams
from flax_transformer.training.checkpoint import Checkpoints
from flax_transformer.training.metrics_file import read_metrics
from flax_transformer.training.run_log import RunLog
from flax_transformer.training.state import TrainState
from flax_transformer.training.stopping import SECONDS_OF_COPIES, StopRequest


@pytest.fixture(autouse=True)
def handlers():
    """Leaves the process with the handlers that it had."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_asks_a_training_to_stop(number):
    with StopRequest() as stop:
        signal.raise_signal(number)
    assert stop.signal == number


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_is_ignored_stays_ignored(number):
    """As `nohup` has it with SIGHUP."""
    signal.signal(number, signal.SIG_IGN)
    with StopRequest() as stop:
        signal.raise_signal(number)
    assert stop.signal is None and signal.getsignal(number) is signal.SIG_IGN


def test_copies_of_a_signal_are_one_request_and_a_later_signal_acts_as_usual():
    usual = []
    signal.signal(signal.SIGHUP, lambda number, _: usual.append(number))
    with StopRequest() as stop:
        copies = threading.Timer(SECONDS_OF_COPIES / 5, lambda: os.kill(os.getpid(), signal.SIGHUP))
        copies.start()
        signal.raise_signal(signal.SIGHUP)
        copies.join()
        assert stop.signal == signal.SIGHUP and not usual
        signal.raise_signal(signal.SIGHUP)
        assert usual == [signal.SIGHUP]


def test_a_signal_interrupts_only_what_is_interruptible():
    with StopRequest() as stop:
        assert stop.interruptible(lambda a, b: a + b, 1, 2) == 3
        assert stop.interruptible(lambda: [signal.raise_signal(signal.SIGTERM), 1 / 0]) is None
        assert stop.interruptible(lambda: 1 / 0) is None  # it is not even begun
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0)  # goes on here


@pytest.fixture(params=["a pipe without a reader", "a full disk"])
def broken(request):
    """A stream that takes nothing more."""
    if request.param == "a full disk":
        stream = open("/dev/full", "w")
    else:
        reader, writer = os.pipe()
        os.close(reader)
        stream = open(writer, "w", encoding="ascii")
    yield stream
    stream.close()  # which flushes what it holds, as Python does at its end


def test_a_broken_stream_ends_no_training(broken, tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    monkeypatch.setattr("sys.stdout", broken)
    monkeypatch.setattr("sys.stderr", broken)
    with lossy_standard_streams(), RunLog(folder) as log:
        for number in range(1_000):  # more than a buffer takes
            log.say(f"line {number}: schön")
        print("a message", flush=True)
    assert (tmp_path / "run" / "train.log").read_text().count("\n") == 1_000


def test_a_process_without_streams_is_left_alone(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    with lossy_standard_streams():
        print("nobody reads this", flush=True)


def test_a_stream_loses_only_what_it_cannot_take(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    with lossy_standard_streams():
        print("schön", flush=True)
    assert stream.buffer.getvalue() == b"sch\\xf6n\n"


@pytest.mark.parametrize("lost", [shutil.rmtree, lambda path: path.rename(path.with_name("moved"))])
def test_a_training_ends_when_its_folder_is_removed_or_moved(tmp_path, lost):
    """Else its checkpoints would go to a folder without a configuration, or to another than its log."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    with pytest.raises(RunFolderError, match="run was removed or moved while it was trained.* --run FOLDER --resume"):
        with RunLog(folder) as log:
            log.record("train", {"step": 2, "loss": 1.5})
            lost(folder.path)
            folder.checkpoints.mkdir(parents=True)  # as Orbax does
            log.record("train", {"step": 4, "loss": 1.5})
    assert [path.name for path in folder.path.iterdir()] == ["checkpoints"]


# --- an evaluation that is owed


def test_a_checkpoint_gets_the_quality_that_its_evaluation_owed(tmp_path):
    folder, tree = tmp_path / "checkpoints", {"w": jnp.arange(4.0)}

    def save(checkpoints: Checkpoints, step: int, quality: float | None) -> None:
        checkpoints.save(TrainState(jnp.int32(step), tree, tree, None), Position(0, step), "", quality)

    with Checkpoints(folder, (1, 1)) as checkpoints:
        save(checkpoints, 1, None)
    with Checkpoints(folder, (1, 1)) as checkpoints:
        assert checkpoints.best_steps() == []
        save(checkpoints, 1, 0.9)
        assert checkpoints.best_steps() == [1]
        save(checkpoints, 2, 0.1)
        save(checkpoints, 3, None)
        assert (checkpoints.newest_steps(), checkpoints.best_steps()) == ([3, 1], [1])  # kept as the best
        save(checkpoints, 3, 1.0)
        assert checkpoints.newest_steps() == [3]  # which it is no longer
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.saved == [(1, 0.9), (2, 0.1), (3, 1.0)]


def test_what_a_kill_kept_from_its_removal_is_removed_by_the_next_start(tmp_path):
    """Otherwise the last checkpoints of a training would stay for good."""
    folder, tree = tmp_path / "checkpoints", {"w": jnp.arange(4.0)}
    for keep, removed in (((9, 9), False), ((2, 1), True)):
        with Checkpoints(folder, keep) as checkpoints:
            if not removed:
                for step, quality in ((1, 0.1), (2, 0.9), (3, 0.5), (4, None), (5, 0.2)):
                    state = TrainState(jnp.int32(step), tree, tree, None)
                    checkpoints.save(state, Position(0, step), "", quality)
            else:
                checkpoints.remove_superseded()
    assert sorted(path.name for path in folder.iterdir()) == ["2", "4", "5"]


def test_a_record_of_an_evaluation_that_is_made_again_is_dropped(tmp_path):
    folder = RunFolder(tmp_path)
    with RunLog(folder) as log:
        for kind, step in (("train", 2), ("validation", 2), ("train", 4), ("validation", 4), ("train", 6)):
            log.record(kind, {"step": step})
    with RunLog(folder, 4, owes_evaluation=True):
        pass
    kept = [(record["kind"], record["step"]) for record in read_metrics(folder.metrics_file)]
    assert kept == [("train", 2), ("validation", 2), ("train", 4)]
