"""The command translate: no line is lost, files that are gone on with, phrases, methods, a person who types."""

import dataclasses
import gzip
import io
import itertools
import json
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from flax_transformer.cli import translate
from flax_transformer.cli.partial_output import PartialOutput, StreamOutput
from flax_transformer.data import text_files
from flax_transformer.data.sentencepiece_tokenizer import SPECIAL
from flax_transformer.errors import ConfigError, InputError
from flax_transformer.inference.translation import EMPTY, Hypothesis, NoTranslation, Translation
from flax_transformer.inference.translator import Translator
from flax_transformer.run_folder import RunFolder
from tests.small_models import ALIKE, MODELS, SEEDS, TOKENIZERS, command, holds, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run", MODELS["transformer"], SEEDS["transformer"])


@pytest.fixture
def files(run, tmp_path, monkeypatch):
    """Arguments that translate a file of 20 lines, one of them too long, in pieces of 8 lines."""
    monkeypatch.setattr(translate, "LINES_AT_ONCE", 8)
    (tmp_path / "in").write_text("".join(f"{s}\n" for s in ["one " * 60, *ALIKE[:19]]))
    return ["translate", "--run", str(run), "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]


def killed_after(pieces: int, monkeypatch):
    """A translator that is interrupted after so many pieces."""
    whole = Translator.translate
    count = itertools.count()

    def translate_some(self, *arguments, **named):
        if next(count) == pieces:
            raise KeyboardInterrupt
        return whole(self, *arguments, **named)

    monkeypatch.setattr(Translator, "translate", translate_some)


def test_pieces_of_a_stream_are_as_the_whole(monkeypatch, capsys, files, run, tmp_path):
    whole = [found.text for found in Translator.load(run).translate((tmp_path / "in").read_text().splitlines())]
    code, _, err = command(monkeypatch, capsys, files)
    assert code == 4 and "20 sentences" in err
    assert (tmp_path / "out").read_text().splitlines() == whole and len(set(whole)) > 10
    code, out, _ = command(monkeypatch, capsys, files[:3], (tmp_path / "in").read_bytes())
    assert code == 4 and out.splitlines() == whole


def test_no_more_is_read_than_what_is_written_and_one_piece(monkeypatch, capsys, run):
    """So a file of any length takes the memory of one piece."""
    monkeypatch.setattr(translate, "LINES_AT_ONCE", 8)
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 12)
    read: list[int] = [0]  # bytes read
    written: list[tuple[int, int]] = []  # lines written so far, and bytes read until then

    class Source(io.BytesIO):
        def __init__(self, data):
            super().__init__(data.getvalue())
            self.buffer = self

        def peek(self, size):
            return self.getvalue()[:size]

        def read1(self, size=-1):
            block = super().read1(size)
            read[0] += len(block)
            return block

    write = StreamOutput.write

    def counted(self, lines, *more):
        written.append((len(lines) + (written[-1][0] if written else 0), read[0]))
        write(self, lines, *more)

    monkeypatch.setattr(StreamOutput, "write", counted)
    code, out, _ = command(monkeypatch, capsys, ["translate", "--run", str(run)], b"one\ntwo\n" * 50, Source)
    assert code == 0 and len(out.splitlines()) == 100
    assert [lines for lines, _ in written] == [min(8 * piece, 100) for piece in range(1, 14)]
    assert all(4 * lines <= read <= 4 * lines + 12 for lines, read in written)


def test_a_compressed_file_is_translated_and_cut_outputs_are_counted(monkeypatch, capsys, files, tmp_path):
    assert command(monkeypatch, capsys, files)[0] == 4
    packed = tmp_path / "in.gz"
    packed.write_bytes(gzip.compress((tmp_path / "in").read_bytes()))
    run = files[: files.index("--input")]
    code, out, err = command(monkeypatch, capsys, [*run, "--input", str(packed), "--json"])
    found = [json.loads(line)["hypotheses"][0] for line in out.splitlines()]
    assert code == 4 and [each["text"] for each in found] == (tmp_path / "out").read_text().splitlines()
    cut = sum(not each["finished"] for each in found)
    assert 1 < cut < 19 and err.endswith(f"; {cut} outputs were cut at their maximum length\n")
    (tmp_path / "bad.gz").write_bytes(b"no gzip")
    assert command(monkeypatch, capsys, [*run, "--input", str(tmp_path / "bad.gz")])[0] == 2


def test_a_compressed_file_that_is_not_whole_ends_the_translation_where_it_ends(monkeypatch, capsys, files, tmp_path):
    lines = "".join(f"{line}\n" for line in ALIKE[:19]).encode()
    stream = zlib.compressobj(0, wbits=31)  # no compression, so that a cut one has whole lines
    packed = stream.compress(lines) + stream.flush(zlib.Z_FULL_FLUSH)
    cut = tmp_path / "cut.gz"
    cut.write_bytes(packed)
    code, out, err = command(monkeypatch, capsys, [*files[:3], "--input", str(cut)])
    assert code == 2 and len(out.splitlines()) == 19
    assert f"error: {cut}, after line 19: not a whole gzip file (" in err


def test_an_interrupted_file_is_gone_on_with_by_the_same_parameters_alone(monkeypatch, capsys, run, tmp_path):
    """Another model of the same run folder and step is another model."""
    moved, lines = tmp_path / "run", tmp_path / "in"
    shutil.copytree(run, moved)
    lines.write_bytes(b"one\n\xff\n")
    arguments = ["translate", "--run", str(moved), "--input", str(lines), "--output", str(tmp_path / "out")]
    assert command(monkeypatch, capsys, arguments)[0] == 2
    shutil.rmtree(moved)
    make_run(moved, MODELS["transformer"], 1)
    lines.write_bytes(b"one\ntwo\n")
    code, _, err = command(monkeypatch, capsys, [*arguments, "--resume"])
    assert code == 2 and "was made with other settings: run was" in err
    shutil.rmtree(moved)
    shutil.copytree(run, moved)
    assert command(monkeypatch, capsys, [*arguments, "--resume"])[0] == 0

    (tmp_path / "out").rename(tmp_path / "out.partial")
    for record in ("{", "{}"):
        (tmp_path / "out.partial.json").write_text(record)
        code, _, err = command(monkeypatch, capsys, [*arguments, "--resume"])
        assert code == 2 and "out.partial.json cannot be read (" in err and "Remove both to begin anew." in err


def test_other_verbs_say_what_is_missing_or_in_the_way(monkeypatch, capsys, run, tmp_path):
    (tmp_path / "text").write_text("one\n")
    (tmp_path / "text2").write_text("one\n")
    text, text2 = str(tmp_path / "text"), str(tmp_path / "text2")
    code, _, err = command(monkeypatch, capsys, ["score", "--run", "--source", text, "--target", text2])
    assert code == 2 and err.startswith("error: give the run folder of a trained model by --run FOLDER.")
    evaluate = ["evaluate", "--run", str(run), "--source", text, "--reference", text2, "--output", str(tmp_path)]
    code, out, err = command(monkeypatch, capsys, evaluate)
    assert code == 2 and f"--output {tmp_path} is a folder. Name a file." in err and not out  # nothing was translated


def test_scores_are_utf_8_whatever_the_locale(monkeypatch, capsys, run, tmp_path):
    (tmp_path / "text").write_text("one\n")
    (tmp_path / "text2").write_text("one\n")
    latin = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", latin)
    pair = ["--source", str(tmp_path / "text"), "--target", str(tmp_path / "text2")]
    assert command(monkeypatch, capsys, ["score", "--run", str(run), *pair, "--json"])[0] == 0
    assert "\u2581" in json.loads(latin.buffer.getvalue().decode("utf-8"))["tokens"][0]


def test_two_processes_do_not_write_one_file(tmp_path):
    with PartialOutput(tmp_path / "out", {}, False) as first:
        first.write(["one"], "", False, 1)
        with pytest.raises(InputError, match="another process is writing .*out.partial"):
            PartialOutput(tmp_path / "out", {}, True).__enter__()
        first.write(["two"], "", False, 1)
    assert (tmp_path / "out").read_text() == "one\ntwo\n" and sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_an_interrupted_file_is_gone_on_with(monkeypatch, capsys, files, tmp_path):
    out, partial, record = (tmp_path / name for name in ("out", "out.partial", "out.partial.json"))
    assert command(monkeypatch, capsys, files)[0] == 4
    whole = out.read_text()
    assert not partial.exists() and not record.exists()
    code, _, err = command(monkeypatch, capsys, files)
    assert code == 2 and "is there already" in err
    out.unlink()
    with monkeypatch.context() as patch:
        killed_after(1, patch)
        code, _, err = command(patch, capsys, files)
        assert code == 130 and err.endswith("\ninterrupted\n") and "Traceback" not in err
    assert partial.read_text() == "".join(whole.splitlines(keepends=True)[:8])
    with partial.open("a") as file:  # written, but not known to be whole
        file.write("a line\nand half of one")
    code, _, err = command(monkeypatch, capsys, files)
    assert code == 2 and "Go on with it by --resume" in err and not out.exists()
    code, _, err = command(monkeypatch, capsys, [*files, "--resume"])
    assert code == 4 and "12 sentences" in err  # a line of the first eight was shortened
    assert out.read_text() == whole and not partial.exists() and not record.exists()


def test_a_file_is_gone_on_with_by_the_same_settings_and_text_alone(monkeypatch, capsys, files, run, tmp_path):
    with monkeypatch.context() as patch:
        killed_after(2, patch)
        assert command(patch, capsys, files)[0] == 130
    code, _, err = command(monkeypatch, capsys, [*files, "--resume", "--beam-size", "2"])
    assert code == 2 and "was made with other settings: beam_size was 3 and is 2. Use the same" in err
    other = make_run(tmp_path / "other", MODELS["transformer"], 1)
    code, _, err = command(monkeypatch, capsys, [*files, "--resume", "--run", str(other)])
    assert code == 2 and "was made with other settings: run was [[" in err
    text = (tmp_path / "in").read_text()
    for changed in (text.replace("one", "two", 1), "one\n"):
        (tmp_path / "in").write_text(changed)
        code, _, err = command(monkeypatch, capsys, [*files, "--resume"])
        assert code == 2 and "does not begin with the 16 lines that have been translated" in err
    (tmp_path / "in").write_text(text)
    lines = (tmp_path / "out.partial").read_text().splitlines(keepends=True)
    (tmp_path / "out.partial").write_text("".join(lines[:3]))
    code, _, err = command(monkeypatch, capsys, [*files, "--resume"])
    assert code == 2 and "has fewer lines than the 16 that were written" in err
    (tmp_path / "out.partial").unlink()
    (tmp_path / "out.partial.json").unlink()
    code, _, _ = command(monkeypatch, capsys, [*files, "--json", "--num-hypotheses", "9"])
    assert code == 2 and not (tmp_path / "out.partial").exists()  # nothing was begun


def test_an_object_holds_the_attention_that_was_asked_for(monkeypatch, capsys, run):
    arguments = ["translate", "--run", str(run), "--json", "--attention"]
    code, out, _ = command(monkeypatch, capsys, arguments, f"{ALIKE[0]}\n\n".encode())
    found, empty = (json.loads(line) for line in out.splitlines())
    (hypothesis,) = found["hypotheses"]
    weights = np.array(hypothesis["attention"])
    assert code == 0 and weights.shape == (len(hypothesis["token_scores"]), len(found["source"]) + 1)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, atol=1e-4)
    expected = Translator.load(run).translate([ALIKE[0]], attention=True)[0]
    assert found["source"] == expected.source
    attention = expected.hypotheses[0].attention
    assert attention is not None
    np.testing.assert_allclose(weights, attention, atol=1e-6)
    assert empty["source"] == [] and empty["hypotheses"][0]["attention"] == []


def test_several_runs_translate_as_an_ensemble(monkeypatch, capsys, run, tmp_path):
    runs = [run, make_run(tmp_path / "other", MODELS["transformer"], 1)]
    arguments = ["translate", "--run", *map(str, runs), "--scores"]
    code, out, _ = command(monkeypatch, capsys, arguments, f"{ALIKE[0]}\n".encode())
    best = Translator.load(runs).translate([ALIKE[0]])[0]
    assert code == 0 and out == f"{best.score:.6f}\t{best.text}\n"


def test_a_method_is_asked_for_nothing_that_the_run_says_of_the_other(monkeypatch, capsys, tmp_path):
    run = make_run(tmp_path / "run", MODELS["transformer"], SEEDS["transformer"])
    config = RunFolder.open(run).config_file
    config.write_text(config.read_text().replace("stop: exact", "stop: first_finished"))
    assert Translator.load(run).decoding.stop == "first_finished"
    code, out, err = command(monkeypatch, capsys, ["translate", "--run", str(run), "--method", "sampling"], b"one\n")
    assert (code, len(out.splitlines())) == (0, 1), err
    assert len(Translator.load(run).translate(["one"], method="sampling", mbr_samples=3)) == 1
    code, _, err = command(
        monkeypatch,
        capsys,
        ["translate", "--run", str(run), "--method", "sampling", "--stop", "first_finished"],
        b"one\n",
    )
    assert code == 2 and "contradict each other" in err.replace("\n", " ")
    with pytest.raises(ConfigError, match="decoding.mbr_utility .bleu. compares the samples of decoding.mbr_samples"):
        Translator.load(run).translate(["one"], method="sampling", mbr_utility="bleu")


def test_what_is_wrong_with_phrases_is_said_rightly(monkeypatch, capsys, run, tmp_path):
    (tmp_path / "phrases").write_text("zwei\n")
    arguments = ["translate", "--run", str(run), "--required", str(tmp_path / "phrases")]
    code, _, err = command(monkeypatch, capsys, arguments, b"\xff\n")
    assert code == 2 and "standard input, line 1: not valid UTF-8" in err
    code, _, err = command(monkeypatch, capsys, arguments, b"\n")
    assert code == 4 and "the output of line 1 lacks 'zwei': the line is empty, and so is its output." in err
    texts = [" ".join(["zwei"] * count) for count in range(1, 47)]
    long = [text for text, ids in zip(texts, TOKENIZERS.target.encode(texts), strict=True) if len(ids) < 47][-1]
    (tmp_path / "phrases").write_text("\n" * 9 + "zwei\n")
    code, out, err = command(monkeypatch, capsys, [*arguments, "--prefix", long], b"one\n" * 10)
    written = out.splitlines()
    assert code == 4 and len(written) == 10 and all(line.startswith(long) for line in written[:9]) and not written[9]
    assert "warning: line 10 has no output: the prefix and the required phrases have " in err
    code, out, err = command(monkeypatch, capsys, [*arguments, "--prefix", "\u4e2d"], b"one\n" * 10)
    assert code == 2 and out == "" and "error: prefix '\u4e2d' has characters" in err  # it is that of every line


def test_a_model_that_has_diverged_is_an_error_and_no_file_is_left(monkeypatch, capsys, tmp_path):
    run = make_run(tmp_path / "run", MODELS["transformer"], SEEDS["transformer"], factor=np.nan)
    text, text2, output = str(tmp_path / "text"), str(tmp_path / "text2"), str(tmp_path / "out")
    for path in (text, text2):
        Path(path).write_text("one\n\ntwo\n")
    for arguments in (
        ["translate", "--input", text, "--output", output],
        ["evaluate", "--source", text, "--reference", text2, "--output", output],
        ["score", "--source", text, "--target", text2],
    ):
        code, out, err = command(monkeypatch, capsys, [arguments[0], "--run", str(run), *arguments[1:]])
        scored = arguments[0] == "score"
        assert code == 1 and out.splitlines() == (["nan", "0.000000", "nan"] if scored else [])
        assert "error: 'one' has no " in err
        assert "scores are not finite: the training has diverged" in err
        named = {"translate": ("warning: ", 0), "score": ("warning: pair ", 2), "evaluate": ("warning: ", 0)}
        what, times = named[arguments[0]]
        assert err.count(what) == times  # as lines come
    assert {path.name for path in tmp_path.iterdir()} == {"run", "text", "text2"}


def test_settings_are_at_fault_if_no_line_of_the_whole_text_has_an_output(monkeypatch, capsys, run, tmp_path):
    """So neither chunks nor an interruption change what becomes of a text."""

    def translate_some(self, sentences, **named):
        best = Hypothesis("eins", ["eins"], score=-0.5, finished=True, token_scores=[-0.3, -0.2])
        rules = ConfigError("the rules leave no token.")
        found = {"": EMPTY, "one": Translation([best], source=["one"])}
        return [found.get(sentence, NoTranslation(sentence, rules)) for sentence in sentences]

    loaded = Translator.load(run)
    monkeypatch.setattr(Translator, "load", lambda *arguments, **named: loaded)
    monkeypatch.setattr(Translator, "translate", translate_some)
    (tmp_path / "in").write_text("one\none\ntwo\ntwo\n")
    for size in (2, 4):
        monkeypatch.setattr(translate, "LINES_AT_ONCE", size)
        arguments = ["translate", "--run", str(run)]
        code, out, err = command(monkeypatch, capsys, arguments, b"two\ntwo\n\ntwo\n")
        assert (code, out) == (2, "\n" * 4) and "error: 'two' has no translation: the rules leave no token." in err
        code, out, err = command(monkeypatch, capsys, arguments, b"two\ntwo\none\n")
        assert code == 4 and out == "\n\neins\n"

        arguments += ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
        with monkeypatch.context() as patch:
            killed_after(1, patch)  # with a size of 4, after all lines
            assert command(patch, capsys, arguments)[0] == (4 if size == 4 else 130)
        if size < 4:
            assert command(monkeypatch, capsys, [*arguments, "--resume"])[0] == 4
        assert (tmp_path / "out").read_text() == "eins\neins\n\n\n"
        (tmp_path / "out").unlink()


def test_evaluate_counts_a_line_without_any_output_as_empty(monkeypatch, capsys, tmp_path):
    run = make_run(tmp_path / "run", MODELS["transformer"], SEEDS["transformer"])
    for name in ("text", "reference"):
        (tmp_path / name).write_text("one\n")
    arguments = ["evaluate", "--run", str(run), "--source", str(tmp_path / "text")]
    arguments += ["--reference", str(tmp_path / "reference"), "--output", str(tmp_path / "out")]
    assert command(monkeypatch, capsys, arguments)[0] == 0
    pieces = TOKENIZERS.target.pieces(range(len(SPECIAL.ids), TOKENIZERS.target.vocab_size))
    folder = RunFolder.open(run)
    config = folder.read_config()
    # Few tokens are left, so an output of many that are all different is none.
    rules = {"suppress_tokens": tuple(pieces[5:]), "no_repeat_ngram": 1, "min_length": 9}
    folder.update_config(dataclasses.replace(config, decoding=dataclasses.replace(config.decoding, **rules)))
    code, out, err = command(monkeypatch, capsys, arguments)
    assert code == 4 and out.startswith("BLEU 0.00") and (tmp_path / "out").read_text() == "\n"
    assert f"warning: {tmp_path / 'text'}, line 1 has no output: the search found no output at all" in err
    named = "the rules that are set (decoding.min_length: 9, decoding.no_repeat_ngram: 1, decoding.suppress_tokens:"
    assert named in err
    for name in ("text", "reference"):  # a text without any output is an error
        (tmp_path / name).write_text("one\ntwo\n")
    code, out, err = command(monkeypatch, capsys, arguments)
    assert code == 2 and not out and named in err


def test_a_beam_that_does_not_fit_the_memory_is_explained(monkeypatch, capsys, run):
    arguments = ["translate", "--run", str(run), "--beam-size", "30000"]
    code, out, err = command(monkeypatch, capsys, arguments, b"one\n")
    assert (code, out) == (2, "") and "Lower decoding.beam_size (of sampling: the number of samples)" in err


def test_no_line_is_lost_whatever_comes_in(monkeypatch, capsys, run):
    lines = ["one", "", "\x00\x07\x1b[31m two \x7f", "one " * 25_000, "\ufeffthree", "a\rb", "\u2028", "four"]
    code, out, err = command(monkeypatch, capsys, ["translate", "--run", str(run)], "\n".join(lines).encode())
    written = out.split("\n")
    assert len(written) == len(lines) + 1 and written[-1] == "" and written[1] == ""
    assert code == 4 and "warning: line 4 is longer than the model's 47 tokens" in err
    assert f"{len(lines)} sentences, " in err and "sentences/s" in err
    code, out, err = command(monkeypatch, capsys, ["translate", "--run", str(run)], b"one\n\xff\xfe\x00\x01\ntwo\n")
    assert code == 2 and len(out.splitlines()) == 1
    assert "standard input, line 2: not valid UTF-8" in err


def test_objects_and_scores(monkeypatch, capsys, run):
    arguments = ["translate", "--run", str(run), "--json", "--num-hypotheses", "2", "--alignment"]
    code, out, _ = command(monkeypatch, capsys, arguments, b"one\n\ntwenty-one\n")
    assert code == 0
    found = [json.loads(line) for line in out.splitlines()]
    assert [len(f["hypotheses"]) for f in found] == [2, 1, 2]
    best = found[2]["hypotheses"][0]
    assert sum(best["token_scores"]) < 0 and not found[2]["truncated"]
    aligned = [("-" in h["alignment"], h["text"].strip() != "") for f in found for h in f["hypotheses"]]
    assert (True, True) in aligned and all(has_pairs == has_words for has_pairs, has_words in aligned)
    code, out, _ = command(monkeypatch, capsys, ["translate", "--run", str(run), "--scores"], b"twenty-one\n")
    score, text = out.rstrip("\n").split("\t")
    assert float(score) == pytest.approx(best["score"], abs=1e-6) and text == best["text"]
    arguments = ["translate", "--run", str(run), "--beam-size", "1", "--prefix", "ein"]
    code, out, _ = command(monkeypatch, capsys, arguments, b"one\n")
    assert code == 0 and out.startswith("ein")


@pytest.mark.slow
def test_required_phrases_of_a_file(monkeypatch, capsys, run, tmp_path):
    phrases = tmp_path / "phrases"
    arguments = ["translate", "--run", str(run), "--json", "--required", str(phrases)]
    phrases.write_text("zwei\tneun\n\n\n")
    code, out, err = command(monkeypatch, capsys, arguments, b"one\none\none\n")
    best, *free = (json.loads(line)["hypotheses"][0] for line in out.splitlines())
    assert code == 0 and "warning" not in err and best["missing"] == []
    assert holds(best["tokens"], "zwei") and holds(best["tokens"], "neun")
    assert free[0] == free[1] and free[0]["missing"] == []

    phrases.write_text("\nzwei\tneun\n\nzwei\n")  # no token may occur twice, so one phrase cannot be held
    code, out, err = command(monkeypatch, capsys, [*arguments, "--no-repeat-ngram", "1"], b"one\none\none\n\n")
    found = [json.loads(line)["hypotheses"][0] for line in out.splitlines()]
    assert code == 4 and found[1]["missing"] and not found[1]["finished"]
    assert "the output of line 2 lacks '" in err
    assert found[3]["missing"] == ["zwei"] and "the output of line 4 lacks 'zwei'" in err  # nothing in, nothing out

    # Gone on with, each line keeps its phrases.
    phrases.write_text("zwei\nneun\nein\n")
    (tmp_path / "in").write_text("one\ntwo\nthree\n")
    arguments += ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert command(monkeypatch, capsys, arguments)[0] == 0
    whole = (tmp_path / "out").read_text()
    (tmp_path / "out").unlink()
    monkeypatch.setattr("flax_transformer.cli.translate.LINES_AT_ONCE", 1)
    (tmp_path / "in").write_bytes(b"one\n\xff\nthree\n")
    assert command(monkeypatch, capsys, arguments)[0] == 2
    (tmp_path / "in").write_text("one\ntwo\nthree\n")
    assert command(monkeypatch, capsys, [*arguments, "--resume"])[0] == 0
    assert (tmp_path / "out").read_text() == whole


@pytest.mark.parametrize(
    "content, message",
    [
        (b"ein\n", "has 1 lines, and standard input has more: line n of one belongs to line n of the other"),
        (b"ein\n\nein\n", "has 3 lines, and standard input has fewer"),
        (b"ein\n\xff\n", "line 2: not valid UTF-8 (invalid start byte at byte 0 of the line)"),
        (None, "there is no text file at "),
    ],
)
def test_a_bad_file_of_phrases_is_explained(monkeypatch, capsys, run, tmp_path, content, message):
    if content is not None:
        (tmp_path / "phrases").write_bytes(content)
    arguments = ["translate", "--run", str(run), "--required", str(tmp_path / "phrases")]
    code, _, err = command(monkeypatch, capsys, arguments, b"one\ntwo\n")
    assert code == 2 and message in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--scores", "--json"], "--scores and --json contradict each other"),
        (["--num-hypotheses", "2"], "--num-hypotheses needs --json"),
        (["--alignment"], "--alignment needs --json"),
        (["--resume"], "--resume needs --input and --output"),
        (["--input", "nowhere"], "there is no text file at nowhere"),
        (["--length-penalty", "gnmt:-1"], "needs an exponent of at least 0"),
    ],
)
def test_contradictory_options_are_explained(monkeypatch, capsys, run, arguments, message):
    code, _, err = command(monkeypatch, capsys, ["translate", "--run", str(run), *arguments])
    assert code == 2 and message in err.replace("\n", " ")
