"""Small parts of a training: memory that is counted, checksums of what is saved, which ones are kept, patience."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from flax_transformer.config.recipe import Config, TrainingConfig
from flax_transformer.data.batching import Position
from flax_transformer.errors import RunFolderError
from flax_transformer.parallel.memory import available_bytes, needed_bytes
from flax_transformer.parallel.mesh import MeshConfig, make_mesh
from flax_transformer.training import averaging
from flax_transformer.training.checkpoint import Checkpoints
from flax_transformer.training.checksums import checksums
from flax_transformer.training.state import TrainState
from flax_transformer.training.stopping import Patience


def test_memory_is_counted(one_device):
    program = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((64, 64), jnp.float32)).compile()
    assert 2 * 64 * 64 * 4 <= needed_bytes(program) < 10 * 64 * 64 * 4
    available = available_bytes(one_device)
    assert available is not None and available > 2**28
    assert available_bytes(make_mesh(MeshConfig(data=8))) == available // 8


def test_checksums_do_not_depend_on_sharding_and_see_every_bit_and_place():
    values = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)
    mesh = make_mesh(MeshConfig(2, 2, 2))
    plain = checksums({"a": values})
    for spec in (jax.P("data"), jax.P("tensor", "fsdp"), jax.P(("data", "fsdp", "tensor")), jax.P()):
        assert checksums({"a": jax.device_put(values, NamedSharding(mesh, spec))}) == plain
    bits = np.asarray(values).view(np.uint32)
    for bit in range(32):
        flipped = bits.copy()
        flipped[3, 5] ^= np.uint32(1 << bit)
        assert checksums({"a": jnp.asarray(flipped.view(np.float32))}) != plain
    swapped = values.at[jnp.array([0, 1])].set(values[jnp.array([1, 0])])
    assert checksums({"a": swapped}) != plain
    assert checksums({"a": values.T})["a"] != plain["a"]


def test_patience_counts_evaluations_since_the_best():
    patience = Patience(2, [1.0, 3.0])
    assert not patience.exhausted
    for quality, exhausted in ((2.0, False), (4.0, False), (4.0, False), (3.0, True)):
        patience.note(quality)
        assert patience.exhausted == exhausted
    never = Patience(0, [5.0, 4.0, 3.0, 2.0])
    assert not never.exhausted


def test_the_best_is_known_as_soon_as_it_is_saved(tmp_path, monkeypatch):
    tree = {"w": jnp.arange(4.0)}
    with Checkpoints(tmp_path / "checkpoints", (2, 2)) as checkpoints:
        manager = checkpoints._manager
        waited: list[int] = []
        wait = manager.wait_until_finished
        monkeypatch.setattr(manager, "wait_until_finished", lambda: (waited.append(1), wait()))
        for step, quality in ((1, 0.5), (2, 0.7)):
            state = TrainState(jnp.asarray(step, jnp.int32), tree, tree, None)
            checkpoints.save(state, Position(0, step), "data", quality)
        waited.clear()
        assert checkpoints.best_steps() == [2, 1] and waited  # so each of them can be restored


def save_all(folder: Path, keep: tuple[int, int], qualities: dict[int, float | None], tokenizers: str | None = None):
    """Saves a checkpoint of hardly anything at each step."""
    tree = {"w": jnp.arange(4.0)}
    with Checkpoints(folder, keep, tokenizers) as checkpoints:
        for step, quality in qualities.items():
            checkpoints.save(TrainState(jnp.asarray(step, jnp.int32), tree, tree, None), Position(0, step), "", quality)


def without(folder: Path, entry: str) -> None:
    """Takes an entry out of the newest checkpoint of a folder, as if an earlier version had saved it."""
    (file,) = max(folder.iterdir(), key=lambda path: int(path.name)).glob("meta/metadata")
    meta = json.loads(file.read_text())
    del meta[entry], meta["sha256"]
    file.write_text(json.dumps(meta))


def test_an_average_is_of_what_was_newest_or_best_of_all_that_was_saved(tmp_path):
    """Steps 4 and 5 are kept as the newest and 2 as the best; 3 is gone, which was nearly as good."""
    folder = tmp_path / "run" / "checkpoints"
    config: Any = dataclasses.replace(Config(), training=TrainingConfig(keep_newest=2, keep_best=1))
    save_all(folder, (2, 1), {1: 0.1, 2: 0.9, 3: 0.8, 4: None, 5: 0.5})

    def chosen(of, num: int) -> list[int]:
        with Checkpoints(folder) as checkpoints:
            return averaging._chosen_steps(of, num, checkpoints, config)

    with Checkpoints(folder) as checkpoints:
        assert (checkpoints.newest_steps(), checkpoints.best_steps()) == ([5, 4, 2], [2, 5])
        assert checkpoints.saved == [(1, 0.1), (2, 0.9), (3, 0.8), (4, None), (5, 0.5)]
    assert (chosen("newest", 2), chosen("best", 1)) == ([5, 4], [2])
    with pytest.raises(
        RunFolderError,
        match=r"run no longer has all of its 3 newest checkpoints: of the steps 5, 4, 3 it lacks 3 "
        r"\(training.keep_newest is 2\). Ask for fewer by --num, or train with training.keep_newest: 3",
    ):
        chosen("newest", 3)
    with pytest.raises(RunFolderError, match=r"its 2 best checkpoints: of the steps 2, 3 it lacks 3 .*keep_best is 1"):
        chosen("best", 2)
    with pytest.raises(RunFolderError, match="run has 3 checkpoints to choose the 4 newest from. Ask for fewer"):
        chosen("newest", 4)

    # Settings that were raised later bring nothing back.
    save_all(folder, (9, 9), {6: 0.7})
    config = dataclasses.replace(config, training=TrainingConfig(keep_newest=9, keep_best=9))
    assert (chosen("newest", 3), chosen("best", 1)) == ([6, 5, 4], [2])
    for of in ("newest", "best"):
        with pytest.raises(RunFolderError, match="no longer has all"):
            chosen(of, 4 if of == "newest" else 2)


def test_of_checkpoints_of_an_earlier_version_the_settings_say_which_are_newest_and_best(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    config = dataclasses.replace(Config(), training=TrainingConfig(keep_newest=2, keep_best=1))
    save_all(folder, (2, 1), {1: 0.1, 2: 0.9, 3: 0.8, 4: None, 5: 0.5})
    without(folder, "saved")
    with Checkpoints(folder) as checkpoints:
        assert averaging._chosen_steps("newest", 2, checkpoints, config) == [5, 4]
        assert averaging._chosen_steps("best", 1, checkpoints, config) == [2]
        with pytest.raises(RunFolderError, match=r"only its 2 newest .* are known .*, or train with .*newest: 3"):
            averaging._chosen_steps("newest", 3, checkpoints, config)
        with pytest.raises(RunFolderError, match=r"only its 1 best .* are known .*, or train with .*best: 2"):
            averaging._chosen_steps("best", 2, checkpoints, config)


def test_checkpoints_know_the_tokenizers_that_they_were_saved_with(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    save_all(folder, (2, 1), {1: 0.1}, "a-b")
    target = {"w": jax.ShapeDtypeStruct((4,), jnp.float32)}
    for tokenizers in ("a-b", None):
        with Checkpoints(folder, tokenizers=tokenizers) as checkpoints:
            checkpoints.check_tokenizers()
            np.testing.assert_array_equal(checkpoints.restore_params(1, target)["w"], np.arange(4.0))
    with Checkpoints(folder, tokenizers="a-c") as checkpoints:
        message = r"in tokenizer/joint.model, or .*: expected SHA-256 \(of source and target\) a-b, got a-c.* Put back"
        for check in (checkpoints.check_tokenizers, lambda: checkpoints.restore_params(1, target)):
            with pytest.raises(RunFolderError, match=message):
                check()
    without(folder, "tokenizers")
    with Checkpoints(folder, tokenizers="a-c") as checkpoints:
        checkpoints.restore_params(1, target)


def test_a_checkpoint_that_cannot_be_written_is_explained(tmp_path, monkeypatch):
    """Whether at once, or in the background and heard of later; an error that came first is the one that is told."""
    params = {"a": jnp.ones(3)}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    message = r"could not be written to \S+: OSError: .*No space left on device. Those before it are whole. Make room"
    for call in ("save", "wait_until_finished", "close"):
        with pytest.raises(RunFolderError, match=message), Checkpoints(tmp_path / call, (1, 1)) as checkpoints:
            monkeypatch.setattr(checkpoints._manager, call, full)
            checkpoints.save_params(1, params)
    with pytest.raises(KeyError, match="first"), Checkpoints(tmp_path / "first", (1, 1)) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "close", full)
        raise KeyError("first")
