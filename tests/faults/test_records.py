"""Small files that are read again: the log of figures, the run card, the record of an output."""

import json
import shutil
from pathlib import Path

import pytest

from flax_transformer.cli.partial_output import PartialOutput, digest_of
from flax_transformer.config.recipe import Config
from flax_transformer.errors import InputError, RunFolderError
from flax_transformer.experiment.resume import ResumedRun
from flax_transformer.inference.comparison import RunSummary
from flax_transformer.inference.evaluate import evaluate
from flax_transformer.run_folder import RunFolder
from flax_transformer.small_files import parse_object, sealed, unsealed, write_atomically
from flax_transformer.training.metrics_file import read_metrics
from tests.faults.damage import cut, flip_bit, replace, zero

TRAIN = {
    "kind": "train", "step": 2, "loss": 1.5, "seconds": 3.0, "target_tokens": 90, "target_tokens_per_second": 30.0,
    "gradient_norm": None,
}  # fmt: skip
VALIDATION = {"kind": "validation", "step": 2, "loss": 1.25, "bleu": 7.5}

# Lines that are no record, whatever stands around them.
NO_RECORD = [
    b"\xff", b"5", b"{}", b'{"step":"x"}', b"[" * 5000, b"1" * 5000, b"null", b'{"kind":"train"}', b"nonsense",
    b'{"kind":5,"step":2}', b'{"kind":"train","step":2.5}', b'{"kind":"train","step":true}',
    b'{"kind":"train","step":2,"loss":"x"}', b'{"kind":"train","step":2,"loss":[]}',
    b'{"kind":"train","step":2,"loss":NaN}', b'{"kind":"train","step":2,"loss":1e999}',
    b'{"kind":"train","step":1' + b"0" * 400 + b"}", b"\0" * 40,
]  # fmt: skip


def lines_of(*records: dict) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def make_run(path: Path) -> RunFolder:
    """A run folder with all that `compare` and a resumed training read before they load a model."""
    folder = RunFolder(path)
    folder.tokenizer.mkdir(parents=True)
    folder.update_config(Config())
    folder.metrics_file.write_bytes(lines_of(TRAIN, VALIDATION))
    folder.write_test(["one"], ["eins"], ["eins"])
    folder.write_card({"parameters": 12, "test": evaluate(["eins"], ["eins"]).record})
    return folder


# --- metrics.jsonl


LINE_2 = r"metrics\.jsonl, line 2: expected a JSON object with .* Mend or remove that line"


@pytest.mark.parametrize("line", NO_RECORD, ids=lambda line: line[:40].decode(errors="replace"))
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(lines_of(TRAIN) + line + b"\n" + lines_of(VALIDATION))
    with pytest.raises(RunFolderError, match=LINE_2) as caught:
        read_metrics(file)
    assert len(str(caught.value)) < 1000


def test_a_damaged_log_is_told_before_a_training_or_a_comparison_begins(tmp_path):
    folder = make_run(tmp_path / "run")
    folder.metrics_file.write_bytes(lines_of(TRAIN) + b"5\n" + lines_of(VALIDATION))
    with pytest.raises(RunFolderError, match=LINE_2):
        ResumedRun(folder.read_config(), folder)
    with pytest.raises(RunFolderError, match=rf"run cannot be compared, since .*{LINE_2}"):
        RunSummary.read(folder.path)


def test_a_last_line_that_was_cut_short_is_left_out(tmp_path):
    """A kill leaves the beginning of it, a power loss may leave zeros in its place."""
    file = tmp_path / "metrics.jsonl"
    whole = lines_of(TRAIN, VALIDATION)
    for damage in (lambda: cut(file, 0.9), lambda: zero(file, 0.9)):
        file.write_bytes(whole)
        damage()
        assert [record["kind"] for record in read_metrics(file)] == ["train"]
    for text, kinds in ((b"", []), (whole[:-1], ["train", "validation"]), (b"\n\n", [])):
        file.write_bytes(text)
        assert [record["kind"] for record in read_metrics(file)] == kinds


def test_a_figure_that_a_record_lacks_is_named_with_its_line(tmp_path):
    folder = make_run(tmp_path / "run")
    without = {name: value for name, value in VALIDATION.items() if name != "bleu"}
    folder.metrics_file.write_bytes(lines_of(TRAIN, without))
    with pytest.raises(RunFolderError, match=r"line 2: this record of kind 'validation' has no 'bleu'. Mend or remove"):
        _ = read_metrics(folder.metrics_file)[1]["bleu"]
    with pytest.raises(RunFolderError, match="cannot be compared, since .* line 2: .* has no 'bleu'"):
        RunSummary.read(folder.path)
    folder.metrics_file.write_bytes(lines_of(TRAIN, VALIDATION | {"bleu": None}))
    with pytest.raises(RunFolderError, match="cannot be compared, since .* has an evaluation without a BLEU"):
        RunSummary.read(folder.path)


def test_a_run_card_that_is_none_is_explained(tmp_path):
    folder = make_run(tmp_path / "run")
    assert RunSummary.read(folder.path).scores.chrf == 100
    for card in (
        b"5", b"[" * 5000, b"\xff", b'{"parameters": "x", "test": {}}', b'{"parameters": 12, "test": 5}',
        b'{"parameters": 12, "test": {"bleu": 5}}', b"1" * 5000,
    ):  # fmt: skip
        replace(folder.card_file, card)
        with pytest.raises(RunFolderError, match="run cannot be compared, since run_card.json"):
            RunSummary.read(folder.path)
    scores = evaluate(["eins"], ["eins"]).record | {"bleu": "high"}
    folder.write_card({"parameters": 12, "test": scores})
    with pytest.raises(RunFolderError, match="bleu cannot be 'high'"):
        RunSummary.read(folder.path)


# --- the record of an output


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """The folder of an output that was interrupted after two lines."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.raises(KeyError), PartialOutput(folder / "out", {"beam": 3}, False) as output:
        output.write(["one", "two"], digest_of(["a", "b"]).hexdigest(), True, 2)
        raise KeyError
    return folder


RECORD = {"lines": 2, "translated": 2, "size": 8, "source": "", "faulty": False, "settings": {"beam": 3}}
HOSTILE_RECORDS = [
    b"", b"5", b"{}", b"[" * 5000, b"1" * 5000, b"\xff", b"null",
    json.dumps(sealed(RECORD | {"settings": []})).encode(), json.dumps(sealed(RECORD | {"lines": "two"})).encode(),
    json.dumps(sealed(RECORD | {"lines": -2})).encode(), json.dumps(sealed(RECORD | {"lines": True})).encode(),
    json.dumps(sealed(RECORD | {"translated": 3})).encode(),
    json.dumps(sealed(RECORD | {"source": None})).encode(), json.dumps(sealed(RECORD | {"other": 1})).encode(),
    json.dumps(RECORD).encode(),
]  # fmt: skip


@pytest.mark.parametrize("record", HOSTILE_RECORDS, ids=lambda record: record[:60].decode(errors="replace"))
def test_a_record_of_an_output_that_cannot_be_read_is_explained(tmp_path, begun, record):
    folder = Path(shutil.copytree(begun, tmp_path / "copy"))
    before = (folder / "out.partial").read_bytes()
    replace(folder / "out.partial.json", record)
    with pytest.raises(InputError, match=r"--resume: \S+out.partial.json cannot be read \(.*Remove both to begin anew"):
        PartialOutput(folder / "out", {"beam": 3}, True)
    assert (folder / "out.partial").read_bytes() == before  # nothing was lost


def test_a_record_of_an_early_version_is_gone_on_with(tmp_path, begun):
    """It did not count the translations."""
    folder = Path(shutil.copytree(begun, tmp_path / "copy"))
    record = unsealed(parse_object((folder / "out.partial.json").read_bytes()))
    replace(
        folder / "out.partial.json", json.dumps(sealed({k: v for k, v in record.items() if k != "translated"})).encode()
    )
    with PartialOutput(folder / "out", {"beam": 3}, True) as output:
        assert (output.progress.lines, output.progress.translated) == (2, 2)


def test_every_flipped_bit_in_the_record_of_an_output_is_noticed(tmp_path, begun):
    folder = Path(shutil.copytree(begun, tmp_path / "copy"))
    file = folder / "out.partial.json"
    whole = file.read_bytes()
    for bit in range(0, 8 * len(whole), 23):
        replace(file, whole)
        flip_bit(file, bit)
        with pytest.raises(InputError, match="cannot be read"):
            PartialOutput(folder / "out", {"beam": 3}, True)
    replace(file, whole)
    with PartialOutput(folder / "out", {"beam": 3}, True) as output:
        assert (output.progress.lines, output.progress.faulty) == (2, True)
    assert (folder / "out").read_text() == "one\ntwo\n"


def test_a_long_value_of_a_setting_is_cut(tmp_path, begun):
    folder = Path(shutil.copytree(begun, tmp_path / "copy"))
    with pytest.raises(InputError, match="other settings: beam was 3 and is 'xxx") as caught:
        PartialOutput(folder / "out", {"beam": "x" * 10**6}, True)
    assert len(str(caught.value)) < 1000


# --- all small files


def test_a_small_file_has_its_old_content_until_the_new_one_is_whole(tmp_path, monkeypatch):
    file = tmp_path / "file"
    write_atomically(file, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_atomically(file, "new")
    assert file.read_text() == "old"
    write_atomically(file, "new")
    assert file.read_text() == "new" and list(tmp_path.iterdir()) == [file]


def test_an_object_knows_when_it_has_changed():
    values = {"a": [1, 2.5, None, float("nan")], "b": {"c": "\u20ac"}}
    again = json.loads(json.dumps(sealed(values)))
    assert str(unsealed(again)) == str(values)
    for other in ({"a": [1]}, {"b": {}}, {"d": 0}, {"sha256": "0"}):
        with pytest.raises(ValueError, match="does not have the checksum"):
            unsealed(again | other)
    with pytest.raises(ValueError, match="does not have the checksum"):
        unsealed({"a": 1})
    assert unsealed({"a": 1}, optional=True) == {"a": 1}
