"""Run folders that are not as they should be: in use, of another recipe, damaged."""

import gc
import json
import re
import shutil

import numpy as np
import orbax.checkpoint as ocp
import pytest

from flax_transformer import Translator
from flax_transformer.config.reading import read_config
from flax_transformer.data.parallel_text import ParallelText
from flax_transformer.data.synthetic import NumberWordsConfig, number_words_corpus
from flax_transformer.data.tokenizer_pair import TokenizerPair
from flax_transformer.errors import RunFolderError
from flax_transformer.run_folder import RunFolder
from tests.small_run import checkpoint_params, command


def test_a_folder_that_holds_a_run_is_left_alone(run, recipe, capsys):
    before = (run / "config.yaml").read_bytes()
    assert command("train", "--config", str(recipe), "--run", str(run)) == 2
    assert "already holds a run. Go on with it by --run" in capsys.readouterr().err
    assert (run / "config.yaml").read_bytes() == before


def test_a_resumed_run_must_keep_its_recipe(run, recipe, capsys):
    assert command("train", "--config", str(recipe), "--run", str(run), "--resume", "--model.num-heads", "4") == 2
    assert "made with other settings in 'model'" in capsys.readouterr().err
    before = (run / "config.yaml").read_bytes()
    assert command("train", "--run", str(run), "--resume", "--training.best-metric", "loss") == 2
    assert "made with other settings in 'training.best_metric'" in capsys.readouterr().err
    assert (run / "config.yaml").read_bytes() == before


def test_folders_without_a_run_or_a_checkpoint_are_explained(run, tmp_path, capsys):
    (tmp_path / "note.txt").write_text("not a run")
    with pytest.raises(RunFolderError, match="is not a run folder: it has no config.yaml"):
        Translator.load(tmp_path)
    with pytest.raises(RunFolderError, match="exists and is not an empty folder"):
        RunFolder(tmp_path).check_unused()
    bare = tmp_path / "bare"
    RunFolder(bare).create(read_config(run / "config.yaml"), RunFolder(run).tokenizers())
    with pytest.raises(RunFolderError, match="holds no checkpoint: the run has not saved one yet"):
        Translator.load(bare)
    shutil.rmtree(bare / "tokenizer")
    with pytest.raises(RunFolderError, match="holds no tokenizer"):
        Translator.load(bare)


def test_a_checkpoint_that_does_not_fit_is_explained(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    text = (copy / "config.yaml").read_text()
    for before, after, message in (
        ("feed_forward_dim: 32", "feed_forward_dim: 48", r"feed_forward/down/kernel: checkpoint \(1, 32"),
        ("param_dtype: float32", "param_dtype: bfloat16", r"kernel: checkpoint \S.* float32, model \S.* bfloat16"),
    ):
        assert before in text
        (copy / "config.yaml").write_text(text.replace(before, after))
        with pytest.raises(RunFolderError, match=rf"does not fit the model .*\n(.*\n)*.*{message}"):
            Translator.load(copy)


def test_a_folder_is_trained_by_one_process_at_a_time(run, capsys):
    """Two would remove what the other is writing."""
    before = (run / "metrics.jsonl").read_bytes()
    with RunFolder(run).locked():
        assert command("train", "--run", str(run), "--resume", "--training.steps", "10") == 2
    message = "is being trained by another process. Wait for it to end, or stop it and go on by --resume"
    assert message in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before and read_config(run / "config.yaml").training.steps == 8
    with RunFolder(run).locked():
        pass  # it is free again


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # what Orbax leaves behind it then
@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
@pytest.mark.parametrize("size", [None, 0, 0.5], ids=["missing", "empty", "cut"])
@pytest.mark.parametrize("file", ["params/manifest.ocdbt", "params/_METADATA", "params/d/*", "meta/metadata"])
def test_a_checkpoint_with_a_damaged_file_is_explained(run, tmp_path, one_device, file, size):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (path,) = (copy / "checkpoints" / "8").glob(file)
    if size is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: int(size * path.stat().st_size)])
    message = r"the checkpoint \S+/8 cannot be read: \w+: .* Fetch it again, or delete that folder to go on from"
    with pytest.raises(RunFolderError, match=message) as caught:
        Translator.load(copy, one_device, checkpoint="last")
    del caught
    gc.collect()  # here, where the warnings are known


def test_a_flipped_bit_is_noticed(run, tmp_path, one_device):
    """An array is saved again with one bit of one value changed, under the checksums of before."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    params = checkpoint_params(copy, 8)
    kernel = params["decoder"]["layers"]["feed_forward"]["up"]["kernel"].copy()
    kernel.view(np.uint32)[0, 3, 5] ^= np.uint32(1)
    params["decoder"]["layers"]["feed_forward"]["up"]["kernel"] = kernel
    item = copy / "checkpoints" / "8" / "params"
    shutil.rmtree(item)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(item, params)
    message = r"is damaged: params decoder/layers/feed_forward/up/kernel \(1 in all\).* delete that folder to go on"
    with pytest.raises(RunFolderError, match=message):
        Translator.load(copy, one_device, checkpoint="last")


def test_a_tokenizer_that_was_exchanged_is_noticed(run, tmp_path, capsys):
    """One of the same size, with which all arrays fit; of a checkpoint from an earlier version nothing is known."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    settings = read_config(run / "config.yaml").tokenizer
    (train,) = number_words_corpus(NumberWordsConfig(300, 20, 24, seed=5)).train
    assert isinstance(train, ParallelText)
    other = TokenizerPair.train(train.source, train.target, settings)
    before = RunFolder(run).tokenizers()
    assert other.source.vocab_size == before.source.vocab_size and other.fingerprint != before.fingerprint
    other.save(copy / "tokenizer")
    message = (
        r"the checkpoint \S+ was saved with other tokenizers than the run folder now has in tokenizer/joint.model, .*"
        rf"\(of source and target\) {before.fingerprint}, got {other.fingerprint}\. .*Put back the files"
    )
    with pytest.raises(RunFolderError, match=message):
        Translator.load(copy)
    assert command("train", "--run", str(copy), "--resume", "--training.steps", "10") == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))
    assert command("average", "--run", str(copy), "--output", str(tmp_path / "mean"), "--num", "1") == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))
    assert not (tmp_path / "mean").exists()
    for file in copy.glob("checkpoints/*/meta/metadata"):
        meta = json.loads(file.read_text())
        assert meta.pop("tokenizers") == before.fingerprint and meta.pop("sha256")
        file.write_text(json.dumps(meta))
    assert Translator.load(copy).tokenizers.fingerprint == other.fingerprint
