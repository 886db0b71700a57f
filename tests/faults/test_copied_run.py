"""Run folders that were copied or moved, and text files that were."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from flax_transformer.cli.train import read_recipe
from flax_transformer.config.reading import read_config, write_config
from flax_transformer.config.recipe import Config
from flax_transformer.data.batching import DataFingerprint, Mixture, TokenizedPairs
from flax_transformer.data.parallel_text import Corpus, ParallelText, ParallelTextConfig
from flax_transformer.data.tokenizer import TokenizedText
from flax_transformer.errors import RunFolderError
from flax_transformer.experiment.new_run import NewRun
from flax_transformer.experiment.resume import ResumedRun
from flax_transformer.run_folder import RunFolder
from tests.small_run import SMALL, command

NO_CORPUS = Corpus((), ParallelText([], []), ParallelText([], []))


def folder_of_run(path: Path, config: Config) -> RunFolder:
    """A run folder as it is before the first checkpoint, with a tokenizer that nobody reads."""
    folder = RunFolder(path)
    folder.tokenizer.mkdir(parents=True)
    folder.update_config(config)
    return folder


def test_a_configuration_in_a_run_folder_belongs_to_that_run(tmp_path, monkeypatch):
    """A copy names the folder of the original, and after a move there is nothing at that place."""
    monkeypatch.chdir(tmp_path)
    folder_of_run(Path("runs/one"), Config(run="runs/one"))
    shutil.copytree("runs/one", "runs/two")
    for arguments in (["--resume"], ["--resume", "--training.steps", "9"], []):
        config, _ = read_recipe(["--config", "runs/two/config.yaml", *arguments], "train")
        assert config.run == "runs/two"
    assert read_recipe(["--run", "runs/two", "--resume"], "train")[0].run == "runs/two"
    assert read_recipe(["--config", "runs/two/config.yaml", "--run", "runs/new"], "train")[0].run == "runs/new"
    assert RunFolder("runs/two").read_config().run == "runs/two"
    shutil.move("runs/one", "moved")
    config, _ = read_recipe(["--config", "moved/config.yaml", "--resume"], "train")
    assert config.run == "moved" and ResumedRun(config, RunFolder(config.run)).folder.path == Path("moved")
    # A recipe of the same name, which lies in no run folder, names its run itself.
    Path("recipes").mkdir()
    write_config(Config(run="runs/three"), Path("recipes/config.yaml"))
    assert read_recipe(["--config", "recipes/config.yaml"], "train")[0].run == "runs/three"


def test_files_may_be_elsewhere_when_a_run_is_resumed_but_are_read_in_the_same_way(tmp_path):
    data = ParallelTextConfig(folder="here", train_source=("a", "b"), train_target=("c", "d"), train_weights=(1.0, 2.0))
    config = Config(run=str(tmp_path / "run"), data=data)
    folder = folder_of_run(tmp_path / "run", config)
    moved = dataclasses.replace(data, folder="there", train_source=("x/a", "b.gz"), test_target="t.de")
    ResumedRun(dataclasses.replace(config, data=moved), folder)
    for other in (
        dataclasses.replace(data, train_weights=(2.0, 1.0)),
        dataclasses.replace(data, source_column=3),
        ParallelTextConfig(folder="here"),
    ):
        with pytest.raises(RunFolderError, match="made with other settings in 'data'"):
            ResumedRun(dataclasses.replace(config, data=other), folder)


def test_a_path_that_is_not_unicode_is_no_run_folder(tmp_path, monkeypatch):
    """TensorStore, which writes checkpoints, takes no such path. Its error looked like a damaged checkpoint."""
    folder = tmp_path / "caf\udce9"
    for path in (folder, folder / "run"):
        with pytest.raises(RunFolderError, match=r"caf\\udce9\S* cannot be a run folder, since its path is not"):
            RunFolder.open(path)
        with pytest.raises(RunFolderError, match="is not valid UTF-8. Rename the part of it that is not"):
            RunFolder(path).check_unused()
    folder.mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(RunFolderError, match="not valid UTF-8"):
        RunFolder("run").check_unused()


def test_the_run_that_another_started_from_may_be_elsewhere(tmp_path):
    folder = folder_of_run(tmp_path / "run", Config(run=str(tmp_path / "run"), init_from="here"))
    config = dataclasses.replace(folder.read_config(), init_from="there")
    ResumedRun(config, folder)
    with pytest.raises(RunFolderError, match="made with other settings in 'init_from'"):
        ResumedRun(dataclasses.replace(config, init_from=None), folder)
    with pytest.raises(RunFolderError, match="--init-from there: there is no run, .* if it was moved, give its new"):
        NewRun(dataclasses.replace(config, run=str(tmp_path / "new")), RunFolder(tmp_path / "new")).tokenizers(
            NO_CORPUS
        )


def test_the_fingerprint_of_text_knows_content_and_not_names():
    held_out = ParallelText(["a"], ["b"], "here/dev.en")

    def fingerprint(tokens: list[list[int]], name: str, others: tuple[ParallelText, ...]) -> DataFingerprint:
        offsets = np.cumsum([0, *map(len, tokens)])
        text = TokenizedText(np.concatenate(tokens).astype(np.int32), offsets)
        pairs = TokenizedPairs(text, text, 9, 9, mixture=Mixture((len(tokens),), (1.0,), (name,)))
        return DataFingerprint.of([pairs], False, others)

    before = fingerprint([[1, 2], [3]], "here/train.en", (held_out, held_out))
    assert DataFingerprint.parse(str(before)) == before and not before.draws
    assert fingerprint([[1, 2], [3]], "there/train.en", (held_out._replace(name="there/dev.en"), held_out)) == before
    assert fingerprint([[1, 2], [4]], "here/train.en", (held_out, held_out)).train != before.train
    changed = fingerprint([[1, 2], [3]], "here/train.en", (held_out, held_out._replace(target=["c"])))
    assert changed.train == before.train and changed.held_out != before.held_out
    # Those of earlier versions, with and without random segmentations, knew nothing of held-out text.
    assert DataFingerprint.parse("x") == ("x", "", "") and DataFingerprint.parse("x:y") == ("x", "y", "")


@pytest.mark.slow
def test_a_copy_is_trained_in_its_own_folder_with_text_that_was_moved(tmp_path, capsys):
    """The original, its checkpoints and its log stay as they are; other text is refused wherever it lies."""
    here = tmp_path / "here"
    here.mkdir()
    lines = [f"a{n} b{n % 7} c{n % 5}" for n in range(300)]
    for name, part in (("train", lines), ("dev", lines[:8]), ("test", lines[:8])):
        for side in ("a", "b"):
            (here / f"{name}.{side}").write_text("".join(f"{line}\n" for line in part))
    names = {"train": "train", "validation": "dev", "test": "test"}
    files = [f"--data.{part}-{side}" for part in names for side in ("source", "target")]
    values = [f"{name}.{side}" for name in names.values() for side in ("a", "b")]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(SMALL.replace("vocab_size: 60", "vocab_size: 25"))
    one, two = tmp_path / "one", tmp_path / "two"
    flags = [each for pair in zip(files, values, strict=True) for each in pair]
    start = ["--config", str(recipe), "--run", str(one), "--data.kind", "parallel_text", "--data.folder", str(here)]
    assert command("train", *start, *flags, "--training.steps", "4") == 0
    before = {path: path.read_bytes() for path in one.rglob("*") if path.is_file()}
    shutil.copytree(one, two)
    here.rename(tmp_path / "there")
    go_on = ["train", "--config", str(two / "config.yaml"), "--resume", "--training.steps", "6"]
    assert command(*go_on) == 2 and "no text file at" in capsys.readouterr().err
    assert command(*go_on, "--data.folder", str(tmp_path / "there")) == 0
    assert sorted(int(path.name) for path in (two / "checkpoints").iterdir()) == [4, 6]
    assert {path: path.read_bytes() for path in one.rglob("*") if path.is_file()} == before
    config = read_config(two / "config.yaml")
    assert isinstance(config.data, ParallelTextConfig)
    assert (config.run, config.data.folder) == (str(two), str(tmp_path / "there"))
    for name, message in (("train.a", "was trained on other text"), ("dev.b", "was evaluated on other text")):
        file = tmp_path / "there" / name
        text = file.read_text()
        file.write_text(text.replace("c3", "c2"))
        capsys.readouterr()
        assert command("train", "--run", str(two), "--resume", "--training.steps", "8") == 2
        assert message in capsys.readouterr().err
        file.write_text(text)
