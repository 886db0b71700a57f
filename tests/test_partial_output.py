"""Files that are written piece by piece: what two processes do to each other, and what stands before a bad line."""

import io
import sys

import pytest

from flax_transformer.cli import translate
from flax_transformer.cli.partial_output import PartialOutput
from flax_transformer.errors import ConfigError, InputError
from flax_transformer.inference.translator import Translator
from tests.small_run import command


def begun(tmp_path) -> PartialOutput:
    """An output of two lines that was interrupted."""
    output = PartialOutput(tmp_path / "out", {}, False)
    with pytest.raises(KeyboardInterrupt), output:
        output.write(["one", "two"], "", False)
        raise KeyboardInterrupt
    return output


def test_a_file_that_another_process_has_ended_meanwhile_is_left_alone(tmp_path):
    begun(tmp_path)
    late = PartialOutput(tmp_path / "out", {}, True)  # has read how far it is
    with PartialOutput(tmp_path / "out", {}, True) as first:
        first.write(["three"], "", False)
    with pytest.raises(InputError, match="another process is writing"), late:
        pass
    assert (tmp_path / "out").read_text() == "one\ntwo\nthree\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_that_another_process_has_gone_on_with_meanwhile_is_left_alone(tmp_path):
    begun(tmp_path)
    late = PartialOutput(tmp_path / "out", {}, True)
    with pytest.raises(KeyboardInterrupt), PartialOutput(tmp_path / "out", {}, True) as first:
        first.write(["three"], "", False)
        raise KeyboardInterrupt
    with pytest.raises(InputError, match="another process is writing"), late:
        pass
    with PartialOutput(tmp_path / "out", {}, True) as output:
        assert output.progress.lines == 3
    assert (tmp_path / "out").read_text() == "one\ntwo\nthree\n"


def test_what_stands_before_a_line_without_any_output_is_written(monkeypatch, capsys, run, tmp_path):
    """And the line is named, as it is where a line is no UTF-8."""
    monkeypatch.setattr(translate, "LINES_AT_ONCE", 4)
    whole = Translator.translate

    def without_some(self, sentences, **named):
        for bad in (name for name in ("late", "early") if name in sentences):  # not in the order of the text
            error = ConfigError(f"{bad} has none")
            error.sentence = sentences.index(bad)
            raise error
        return whole(self, sentences, **named)

    monkeypatch.setattr(Translator, "translate", without_some)
    text = b"one\ntwo\nthree\nfour\nfive\nearly\nlate\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    assert command("translate", "--run", str(run)) == 2
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 5
    assert "error: line 6 of standard input: early has none" in err

    (tmp_path / "in").write_bytes(text)
    arguments = ["translate", "--run", str(run), "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert command(*arguments) == 2
    assert (tmp_path / "out.partial").read_text() == out
    monkeypatch.setattr(Translator, "translate", whole)
    assert command(*arguments, "--resume") == 0
    assert (tmp_path / "out").read_text().startswith(out) and len((tmp_path / "out").read_text().splitlines()) == 7


def test_phrases_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "phrases").write_bytes(b"\xef\xbb\xbfone\ttwo\n\n")
    assert translate.read_phrases(tmp_path / "phrases") == [["one", "two"], []]
