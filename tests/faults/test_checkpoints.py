"""Checkpoints whose files are damaged, missing or half removed."""

import gc
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_transformer.data.batching import Position
from flax_transformer.errors import RunFolderError
from flax_transformer.run_folder import RunFolder
from flax_transformer.training.averaging import average_checkpoints
from flax_transformer.training.checkpoint import DAMAGED, REMOVED, Checkpoints
from flax_transformer.training.checkpoint_errors import DamagedCheckpointError
from flax_transformer.training.state import StateLayout, TrainState
from tests.faults.damage import cut, empty, files_of, flip_bit, remove, replace
from tests.small_run import checkpoint_params, command

# What Orbax leaves behind it when a file is damaged.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning"),
]

QUALITIES = {2: 0.25, 4: 0.75, 6: None, 8: 0.5}
SHAPE = jax.ShapeDtypeStruct((4,), jnp.float32)


def layout(shape: jax.ShapeDtypeStruct = SHAPE) -> StateLayout:
    """The layout of a state of hardly anything."""
    shapes = TrainState(jax.ShapeDtypeStruct((), jnp.int32), {"w": shape}, {"w": shape}, None)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return StateLayout(None, shapes, jax.tree.map(lambda _: sharding, shapes), optax.identity(), 0.0)


def save(checkpoints: Checkpoints, step: int, quality: float | None) -> None:
    tree = {"w": jnp.arange(4.0) + step}
    checkpoints.save(TrainState(jnp.asarray(step, jnp.int32), tree, tree, None), Position(0, step), "text", quality)


@pytest.fixture(autouse=True, scope="module")
def collected():
    """Collects what Orbax leaves behind it where the warnings are known."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> Path:
    """Four checkpoints of hardly anything."""
    folder = tmp_path_factory.mktemp("four") / "checkpoints"
    with Checkpoints(folder, (9, 9)) as checkpoints:
        for step, quality in QUALITIES.items():
            save(checkpoints, step, quality)
    return folder


@pytest.fixture
def copy(four, tmp_path) -> Path:
    return Path(shutil.copytree(four, tmp_path / "checkpoints"))


def changed(file: Path, **entries) -> None:
    """Changes entries of a checkpoint's JSON object, as an earlier version may have written it: without checksum."""
    meta = json.loads(file.read_text()) | entries
    del meta["sha256"]
    file.write_text(json.dumps({name: value for name, value in meta.items() if value != "gone"}))


# --- removal


def test_every_prefix_of_a_removal_leaves_whole_checkpoints(tmp_path, monkeypatch):
    """Before each operation on files the folder is copied: a kill at this moment leaves what the copy has."""
    folder, copies = tmp_path / "checkpoints", []
    operations = {name: getattr(os, name) for name in ("unlink", "rmdir", "rename", "replace")}

    def before(name: str) -> Callable:
        def operation(*arguments, **keywords):
            if watched:
                copies.append(Path(shutil.copytree(folder, tmp_path / f"copy{len(copies)}")))
            return operations[name](*arguments, **keywords)

        return operation

    watched = False
    for name in operations:
        monkeypatch.setattr(os, name, before(name))
    with Checkpoints(folder, (1, 1)) as checkpoints:
        save(checkpoints, 2, None)
        save(checkpoints, 4, 0.5)
        checkpoints.best_steps()  # waits: nothing is being written or removed
        original = {path.relative_to(folder): path.read_bytes() for path in files_of(folder)}
        watched = True
        checkpoints._manager._checkpoint_deleter.delete(4)  # as Orbax does at the end of a save
        checkpoints._empty_removed()
        watched = False
    # It has lost its name before it loses a file, and there are many moments in between.
    whole = [copy for copy in copies if (copy / "4").exists()]
    assert whole == copies[:1] and len(copies) > 20 and not (folder / REMOVED).exists()
    for copy in copies:
        steps = [path for path in files_of(copy) if path.relative_to(copy).parts[0] != REMOVED]
        assert all(path.read_bytes() == original[path.relative_to(copy)] for path in steps)
        assert {path.relative_to(copy).parts[0] for path in steps} == {"4"} - ({"4"} if copy not in whole else set())
    with Checkpoints(copies[9], (1, 1)) as checkpoints:  # another start removes the rest
        assert checkpoints.newest_steps() == [] and not (copies[9] / REMOVED).exists()


def test_checkpoints_are_removed_as_they_always_were(tmp_path):
    """The newest two and the best one stay; one that was removed earlier does not stand in the way of the next."""
    folder = tmp_path / "checkpoints"
    (folder / REMOVED / "2" / "params").mkdir(parents=True)
    with Checkpoints(folder, (2, 1)) as checkpoints:
        for step, quality in ((2, 0.25), (4, 0.75), (6, None), (8, 0.75), (10, 0.5), (12, None)):
            save(checkpoints, step, quality)
        assert checkpoints.newest_steps() == [12, 10, 8]  # of equal qualities the later one is the best
    assert sorted(int(path.name) for path in folder.iterdir()) == [8, 10, 12]


# --- qualities


def test_the_best_checkpoint_does_not_depend_on_files_of_its_quality(copy):
    """Orbax keeps a file of the quality in each checkpoint of an earlier version; the newest meta knows them all."""
    for step in QUALITIES:
        (copy / str(step) / "metrics").mkdir()
        empty(copy / str(step) / "metrics" / "metrics")
    (copy / "4" / "metrics" / "metrics").unlink()
    with Checkpoints(copy) as checkpoints:
        assert checkpoints.best_steps() == [4, 8, 2] and checkpoints.choose("best") == 4
    with Checkpoints(copy, (1, 1)) as checkpoints:
        save(checkpoints, 10, 0.1)
        assert checkpoints.newest_steps() == [10, 4]


def test_qualities_of_the_first_version_are_read_from_their_files_and_damage_is_named(copy):
    for step, quality in QUALITIES.items():
        changed(copy / str(step) / "meta" / "metadata", saved="gone", quality="gone")
        (copy / str(step) / "metrics").mkdir()
        if quality is not None:
            replace(copy / str(step) / "metrics" / "metrics", json.dumps({"quality": quality}).encode())
    with Checkpoints(copy, (9, 9)) as checkpoints:
        assert checkpoints.saved is None and checkpoints.best_steps() == [4, 8, 2]
        save(checkpoints, 10, 0.6)
    with Checkpoints(copy) as checkpoints:
        assert checkpoints.saved is None and checkpoints.best_steps() == [4, 10, 8, 2]
    for content in (b"", b"{}", b"[" * 9999, b'{"quality": "x"}'):
        replace(copy / "4" / "metrics" / "metrics", content)
        with Checkpoints(copy) as checkpoints, pytest.raises(RunFolderError, match="checkpoints/4 cannot be read"):
            checkpoints.choose("best")


def test_a_quality_can_be_saved_later(copy):
    """The evaluation of a step that a signal stopped is made up when the run is resumed."""
    with Checkpoints(copy, (1, 1)) as checkpoints:
        save(checkpoints, 10, None)
        save(checkpoints, 10, 0.9)
        assert checkpoints.best_steps() == [10]  # which takes the place of step 4
    with Checkpoints(copy) as checkpoints:
        assert checkpoints.best_steps() == [10]
        assert checkpoints.saved is not None and checkpoints.saved[-2:] == [(8, 0.5), (10, 0.9)]
        np.testing.assert_array_equal(checkpoints.restore_params(10, {"w": SHAPE})["w"], np.arange(4.0) + 10)


def test_a_best_checkpoint_that_is_not_known_is_not_replaced_by_another(copy):
    """Only the newest checkpoint knows which one is the best, so nothing is chosen while it is damaged."""
    flip_bit(copy / "8" / "meta" / "metadata", 333)
    with Checkpoints(copy) as checkpoints, pytest.raises(RunFolderError, match="checkpoints/8 cannot be read.* delete"):
        checkpoints.choose("best")
    remove(copy / "8")
    with Checkpoints(copy) as checkpoints:
        assert checkpoints.choose("best") == 4


# --- readers beside a training


def test_a_checkpoint_that_a_training_removes_while_it_is_chosen_is_no_damage(copy):
    """A translation beside a training takes the one that is now the best or the newest."""
    seen = []

    def read() -> float:
        seen.append(checkpoints.choose("best"))
        if len(seen) == 1:
            with Checkpoints(copy, (1, 1)) as training:
                save(training, 10, 0.9)
        return float(checkpoints.restore_params(seen[-1], {"w": SHAPE})["w"][0])

    with Checkpoints(copy) as checkpoints:
        assert checkpoints.undisturbed(read) == 10 and seen == [4, 10]
    with Checkpoints(copy) as checkpoints:
        flip_bit(copy / "10" / "meta" / "metadata", 99)
        with pytest.raises(DamagedCheckpointError, match="checkpoints/10 cannot be read"):
            checkpoints.undisturbed(lambda: checkpoints.restore_params(10, {"w": SHAPE}))


# --- damage


DAMAGE = {
    "meta/metadata": lambda file: flip_bit(file, 999),
    "params/d/*": lambda file: cut(file, 0.5),
    "params/_METADATA": empty,
    "optimizer/manifest.ocdbt": empty,
    "optimizer": remove,
    "meta": remove,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_run_goes_on_from_the_newest_checkpoint_that_can_be_read(copy, name):
    (path,) = (copy / "8").glob(name)
    DAMAGE[name](path)
    left = [path.relative_to(copy / "8") for path in files_of(copy / "8")]
    with Checkpoints(copy, (9, 9)) as checkpoints:
        checkpoints.check_tokenizers()
        restored = checkpoints.restore(layout())
        np.testing.assert_array_equal(restored.state.params["w"], np.arange(4.0) + 6)
        assert (int(restored.state.step), restored.position, restored.data) == (6, Position(0, 6), "text")
        (note,) = restored.notes
        assert note.startswith("warning: the checkpoint ") and f"It was moved to {copy / DAMAGED / '8'}, and" in note
        assert [path.relative_to(copy / DAMAGED / "8") for path in files_of(copy / DAMAGED)] == left
        # The step can be saved again, and the history is that of the checkpoint which was read.
        save(checkpoints, 8, 0.9)
        assert checkpoints.newest_steps() == [8, 6, 4, 2] and checkpoints.best_steps() == [8, 4, 2]
    with Checkpoints(copy) as checkpoints:
        assert checkpoints.saved == [(2, 0.25), (4, 0.75), (6, None), (8, 0.9)]
        np.testing.assert_array_equal(checkpoints.restore_params(8, {"w": SHAPE})["w"], np.arange(4.0) + 8)


def test_several_damaged_checkpoints_are_named_and_without_a_whole_one_nothing_is_moved(copy):
    for step in (8, 6):
        empty(copy / str(step) / "meta" / "metadata")
    shutil.copytree(copy / "8", copy / DAMAGED / "8" / "of an earlier time")
    with Checkpoints(copy, (9, 9)) as checkpoints:
        restored = checkpoints.restore(layout())
        assert int(restored.state.step) == 4 and [note.split()[3][-1] for note in restored.notes] == ["8", "6"]
    assert sorted(path.name for path in copy.iterdir()) == ["2", "4", DAMAGED]
    assert sorted(path.name for path in (copy / DAMAGED / "8").iterdir()) == sorted(
        path.name for path in (copy / "2").iterdir()
    )
    for step in (4, 2):
        empty(copy / str(step) / "meta" / "metadata")
    with Checkpoints(copy, (9, 9)) as checkpoints:
        message = r"none of the 2 checkpoints of \S+ can be read. The newest: the checkpoint \S+/4 cannot be read"
        with pytest.raises(RunFolderError, match=message):
            checkpoints.restore(layout())
    assert sorted(path.name for path in copy.iterdir()) == ["2", "4", DAMAGED]


@pytest.mark.parametrize(
    "error",
    [PermissionError(13, "Permission denied"), OSError(24, "Too many open files"), ValueError("UNAVAILABLE:")],
)
def test_a_checkpoint_that_cannot_be_read_for_now_stays_in_its_place(copy, monkeypatch, error):
    def fail(*_, **__):
        raise error

    with Checkpoints(copy, (9, 9)) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "restore", fail)
        with pytest.raises(RunFolderError, match="checkpoints/8 cannot be read: .* Mend the cause, and try again"):
            checkpoints.restore(layout())
        assert checkpoints.newest_steps() == [8, 6, 4, 2] and not (copy / DAMAGED).exists()


def test_what_is_not_damage_is_no_reason_to_take_an_older_checkpoint(copy):
    """Other tokenizers, another model, or parameters alone: the newest checkpoint is named and stays in its place."""
    with Checkpoints(copy, (9, 9), tokenizers="a-b") as checkpoints:
        save(checkpoints, 10, None)
    for tokenizers, shape, message in (
        ("a-c", SHAPE, "checkpoints/10 was saved with other tokenizers"),
        ("a-b", jax.ShapeDtypeStruct((5,), jnp.float32), "checkpoints/10 does not fit the model"),
    ):
        with Checkpoints(copy, (9, 9), tokenizers) as checkpoints, pytest.raises(RunFolderError, match=message):
            checkpoints.restore(layout(shape))
    with Checkpoints(copy, (9, 9)) as checkpoints:
        checkpoints.save_params(12, {"w": jnp.zeros(4)})
        with pytest.raises(RunFolderError, match="checkpoints/12 holds parameters without the state of an optimiser"):
            checkpoints.restore(layout())
        assert checkpoints.newest_steps() == [12, 10, 8, 6, 4, 2]


@pytest.mark.parametrize(
    "entries",
    [
        {"step": 6}, {"step": "8"}, {"epoch": "0"}, {"batch": None}, {"data": 5}, {"checksums": []},
        {"checksums": {"params": 5}}, {"checksums": {"optimizer": {}}}, {"saved": 5}, {"saved": [[1]]},
        {"saved": [["x", 0.5]]}, {"saved": [[1, "x"]]}, {"quality": "x"}, {"tokenizers": 5}, {"step": "gone"},
    ],
    ids=str,
)  # fmt: skip
def test_a_meta_with_other_types_is_damaged(copy, entries):
    changed(copy / "8" / "meta" / "metadata", **entries)
    with Checkpoints(copy) as checkpoints, pytest.raises(DamagedCheckpointError, match="checkpoints/8 cannot be read"):
        _ = checkpoints.saved


def test_an_average_that_cannot_be_written_leaves_no_run_behind(run, tmp_path, monkeypatch):
    """A run folder without a checkpoint once stood in the way of the next try."""
    before = list(tmp_path.iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save_params", full)
        with pytest.raises(OSError, match="No space left"):
            average_checkpoints(run, tmp_path / "mean", 2, "newest")
    assert list(tmp_path.iterdir()) == before
    assert average_checkpoints(run, tmp_path / "mean", 2, "newest") == [8, 6]
    assert [path.name for path in tmp_path.iterdir()] == ["mean"] and RunFolder.open(tmp_path / "mean").tokenizers()


@pytest.mark.slow
def test_a_training_that_resumes_from_an_older_checkpoint_ends_as_the_first_did(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (file,) = (copy / "checkpoints/8").glob("params/d/*")
    flip_bit(file, 12_345)
    before = checkpoint_params(run, 8)
    assert command("train", "--run", str(copy), "--resume") == 0
    told = capsys.readouterr().out
    assert "warning: the checkpoint" in told and "resumed at step 6" in told and "damaged/8" in told
    assert "warning: the checkpoint" in (copy / "train.log").read_text()
    jax.tree.map(np.testing.assert_array_equal, checkpoint_params(copy, 8), before)
