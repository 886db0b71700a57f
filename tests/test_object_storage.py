"""A run folder on object storage: trained, stopped, resumed, read by every verb, and what goes wrong on the way."""

import fcntl
import json
import signal
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer import Translator
from flax_transformer.errors import ConfigError, RunFolderError
from flax_transformer.experiment import run as experiment
from flax_transformer.object_storage import any_path, storage_errors
from flax_transformer.run_folder import RunFolder
from flax_transformer.training import growing_file
from flax_transformer.training.checkpoint import Checkpoints
from flax_transformer.training.checkpoint_errors import DamagedCheckpointError
from flax_transformer.training.growing_file import GrowingFile
from flax_transformer.training.metrics_file import read_metrics
from tests.object_storage import bucket_in_memory
from tests.small_run import checkpoint_params, command

RUN = "gs://bucket/runs/other"


@pytest.fixture(scope="module")
def bucket():
    with bucket_in_memory() as bucket:
        yield bucket


@pytest.fixture(scope="module")
def stored(bucket, recipe):
    """The run of `run` in a bucket. SIGTERM stopped it after step 5, and the checkpoint of that step was damaged."""
    real = experiment.train_loop

    def stopping(place, batches, *rest):
        def given():
            for number, batch in enumerate(batches):
                if number == 4:
                    signal.raise_signal(signal.SIGTERM)
                yield batch

        return real(place, given(), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "train_loop", stopping)
        assert command("train", "--config", str(recipe), "--run", RUN) == 3
    (name,) = [n for n in bucket.names("runs/other/checkpoints/5/params") if n.startswith("d/")]
    bucket.put(f"bucket/runs/other/checkpoints/5/params/{name}", b"damaged")
    assert command("train", "--run", RUN, "--resume") == 0
    return RunFolder(RUN)


def params_of(folder: RunFolder, step: int):
    """Returns the parameters of a checkpoint as the commands read them."""
    with Checkpoints(folder.checkpoints) as checkpoints:
        saved = checkpoints._manager.item_metadata(step)["params"].tree
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), saved)
        return jax.device_get(checkpoints.restore_params(step, target))


def lines_of(capsys, *arguments: str) -> list[str]:
    capsys.readouterr()
    assert command(*arguments) in (0, 4)  # 4: an output was cut, as those of so small a model are
    return capsys.readouterr().out.splitlines()


def test_a_training_that_stopped_and_went_on_equals_one_on_a_disk(bucket, stored, run):
    chex.assert_trees_all_equal(params_of(stored, 8), checkpoint_params(run, 8))
    exact = ("step", "kind", "loss", "bleu")
    wanted, got = (
        [{name: record.get(name) for name in exact} for record in read_metrics(folder.metrics_file)]
        for folder in (RunFolder(run), stored)
    )
    assert got == wanted
    for name in ("test.sources.txt", "test.references.txt", "test.hypotheses.txt"):
        assert bucket.content(f"runs/other/samples/{name}") == (run / "samples" / name).read_bytes()
    names = bucket.names("runs/other")
    assert {"run_card.json", "plots/curves.png", "plots/attention.png"} <= names
    assert {name.split("/")[1] for name in names if name.startswith("checkpoints/")} == {"4", "6", "8", "damaged"}
    events = [name for name in names if name.startswith("tensorboard/")]
    assert len(events) == 2 and all(len(bucket.content(f"runs/other/{name}")) > 500 for name in events)


def test_the_log_says_at_each_start_that_there_is_no_lock(stored):
    assert stored.log_file.read_text().count("this run folder has no lock, since it lies on object storage.") == 2


def test_records_are_never_behind_a_checkpoint(bucket, stored):
    metrics, commits = b"", 0
    for name, content in bucket.writes:
        if name == "bucket/runs/other/metrics.jsonl":
            metrics = content
        elif name.count("/") == 5 and name.endswith("/commit_success.txt"):
            step = name.split("/")[4]
            if step.isdigit():
                assert json.loads(metrics.splitlines()[-1])["step"] >= int(step)
                commits += 1
    assert commits == 5  # 2, 4, 5, 6, 8


def test_a_damaged_checkpoint_is_kept_aside(bucket, stored):
    log = stored.log_file.read_text()
    assert f"It was moved to {stored.checkpoints}/damaged/5, and this run goes on from the checkpoint before it." in log
    assert "resumed at step 4," in log
    assert "damaged/5/params/manifest.ocdbt" in bucket.names("runs/other/checkpoints")


def test_a_start_removes_what_a_kill_left_of_a_checkpoint_and_keeps_damaged_ones(bucket):
    folder = any_path("gs://bucket/torn/checkpoints")
    with Checkpoints(folder, (9, 9)) as checkpoints:
        for step in (1, 2):
            checkpoints.save_params(step, {"weight": jnp.arange(4.0)})
        checkpoints._set_aside(1, DamagedCheckpointError("Torn."))
    bucket.put("bucket/torn/checkpoints/3/params/manifest.ocdbt", b"the process was killed here")
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.newest_steps() == [2]
    with Checkpoints(folder, (9, 9)) as checkpoints:
        checkpoints.save_params(4, {"weight": jnp.arange(4.0)})
        assert checkpoints.newest_steps() == [4, 2]
    found = bucket.names("torn/checkpoints")
    assert {name.split("/")[0] for name in found} == {"2", "4", "damaged"}
    assert "damaged/1/params/manifest.ocdbt" in found


def test_a_run_translates_its_test_part_as_it_did_at_its_end(bucket, stored, one_device):
    sources, hypotheses = (file.read_text().splitlines() for file in (stored.test_sources, stored.test_hypotheses))
    assert [found.text for found in Translator.load(RUN, one_device).translate(sources)] == hypotheses


@pytest.mark.slow
def test_every_verb_reads_a_run(stored, run, recipe, tmp_path, capsys):
    text, target = tmp_path / "in", tmp_path / "out"
    text.write_text("one\ntwenty-one\n")
    target.write_text("eins\neinundzwanzig\n")
    for place, output in ((RUN, "there"), (str(run), "here")):
        lines_of(capsys, "translate", "--run", place, "--input", str(text), "--output", str(tmp_path / output))
    assert (tmp_path / "there").read_bytes() == (tmp_path / "here").read_bytes()
    verbs = {"score": ["--source", str(text), "--target"], "evaluate": ["--source", str(text), "--reference"]}
    for verb, arguments in verbs.items():
        there, here = (lines_of(capsys, verb, "--run", place, *arguments, str(target)) for place in (RUN, str(run)))
        assert there == here
    lines_of(capsys, "compare", RUN, str(run), "--output", str(tmp_path / "table"))
    assert "other" in (tmp_path / "table" / "comparison.md").read_text()
    child = ["--run", "gs://bucket/runs/child", "--init-from", RUN, "--training.steps", "1"]
    lines_of(capsys, "train", "--config", str(recipe), *child)
    assert RunFolder("gs://bucket/runs/child").card_file.is_file()


@pytest.mark.slow
def test_a_marian_model_becomes_a_run_in_a_bucket(stored, tmp_path, capsys):
    lines_of(capsys, "convert", "to-hf", RUN, "--output", str(tmp_path / "marian"))
    lines_of(capsys, "convert", "from-hf", str(tmp_path / "marian"), "--output", "gs://bucket/runs/converted")
    assert RunFolder.open("gs://bucket/runs/converted").read_config().run == "gs://bucket/runs/converted"
    with Checkpoints(RunFolder("gs://bucket/runs/converted").checkpoints) as checkpoints:
        assert checkpoints.newest_steps() == [1]


def test_an_average_lies_in_a_bucket(bucket, stored, capsys):
    mean = "gs://bucket/runs/mean"
    said = lines_of(capsys, "average", "--run", RUN, "--output", mean, "--num", "2")
    assert said == [f"the mean of steps 6, 8 lies in {mean}"]
    old, new = (params_of(stored, step) for step in (6, 8))
    wanted = jax.tree.map(lambda a, b: ((np.float64(a) + np.float64(b)) / 2).astype(a.dtype), old, new)
    chex.assert_trees_all_equal(params_of(RunFolder(mean), 8), wanted)
    assert RunFolder.open(mean).read_config().run == mean
    assert command("average", "--run", RUN, "--output", mean, "--num", "2") == 2
    assert "already holds a run" in capsys.readouterr().err


def test_a_growing_file_is_written_at_times(bucket, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(growing_file.time, "monotonic", lambda: now[0])
    name = "grown/train.log"

    def number_of_writes() -> int:
        return [written for written, _ in bucket.writes].count(f"bucket/{name}")

    file = GrowingFile(any_path(f"gs://bucket/{name}"))
    file.append("one\n")
    assert bucket.content(name) == b"" and number_of_writes() == 1
    now[0] = growing_file.SECONDS_BETWEEN_UPLOADS
    file.append("two\n")
    assert bucket.content(name) == b"one\ntwo\n"
    file.append("three\n")
    file.flush()
    file.flush()
    file.close()
    assert bucket.content(name) == b"one\ntwo\nthree\n" and number_of_writes() == 3
    GrowingFile(any_path(f"gs://bucket/{name}")).close()
    assert bucket.content(name) == b"one\ntwo\nthree\n"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://bucket/run", "expected a folder of the disk or gs://BUCKET/FOLDER, got 's3://bucket/run'"),
        ("gs://bucket", "got 'gs://bucket'"),
    ],
)
def test_other_storage_is_an_error(address, message):
    for path in (address, Path(address)):
        with pytest.raises(ConfigError, match=message):
            RunFolder(path)


def test_an_address_is_known_with_one_slash_as_with_two(bucket):
    assert str(RunFolder(Path("gs://bucket/a/b")).config_file) == "gs://bucket/a/b/config.yaml"
    assert RunFolder("gs:bucket/a").path == Path("gs:bucket/a")


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match="pip install gcsfs"):
        RunFolder(RUN)


def test_storage_that_refuses_is_told_before_the_work(bucket, recipe, monkeypatch, capsys):
    monkeypatch.setattr(bucket, "refused", "runs/refused")
    assert command("train", "--config", str(recipe), "--run", "gs://bucket/runs/refused") == 2
    said = capsys.readouterr().err
    assert "gs://bucket/runs/refused cannot be written: StorageError: Forbidden" in said and "Traceback" not in said
    assert not bucket.names("runs/refused")
    assert command("translate", "--run", "gs://bucket/runs/nothing") == 2
    assert "gs://bucket/runs/nothing is not a run folder" in capsys.readouterr().err


def test_an_error_while_the_run_is_written_is_one_of_its_folder(bucket, monkeypatch):
    monkeypatch.setattr(bucket, "refused", "runs/refused/run_card")
    with pytest.raises(RunFolderError, match="cannot be written: StorageError: Forbidden.*network, and go on"):
        RunFolder("gs://bucket/runs/refused").write_card({})


def test_a_disk_without_locks_is_told(run, monkeypatch):
    def none(*_):
        raise OSError("no locks available")

    with RunFolder(run).locked() as notes:
        assert notes == ()
    monkeypatch.setattr(fcntl, "flock", none)
    with RunFolder(run).locked() as notes:
        assert "has no lock, since its file system" in notes[0]


def test_an_error_of_the_user_stays_what_it_is_on_object_storage(bucket):
    path = any_path("gs://bucket/run")
    with pytest.raises(RunFolderError, match="of the user"), storage_errors(path):
        raise RunFolderError("of the user")
    with pytest.raises(OSError, match="ValueError: of a library"), storage_errors(path):
        raise ValueError("of a library")
