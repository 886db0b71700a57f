"""Files that are written piece by piece: what two processes do to each other, and what stands before a bad line."""

import json

import pytest

from flax_transformer.cli import translate
from flax_transformer.cli.partial_output import PartialOutput
from flax_transformer.errors import InputError
from tests.small_run import command


def begun(tmp_path) -> PartialOutput:
    """An output of two lines that was interrupted."""
    output = PartialOutput(tmp_path / "out", {}, False)
    with pytest.raises(KeyboardInterrupt), output:
        output.write(["one", "two"], "", False, 2)
        raise KeyboardInterrupt
    return output


def test_a_file_that_another_process_has_ended_meanwhile_is_left_alone(tmp_path):
    begun(tmp_path)
    late = PartialOutput(tmp_path / "out", {}, True)  # has read how far it is
    with PartialOutput(tmp_path / "out", {}, True) as first:
        first.write(["three"], "", False, 1)
    with pytest.raises(InputError, match="another process is writing"), late:
        pass
    assert (tmp_path / "out").read_text() == "one\ntwo\nthree\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_that_another_process_has_gone_on_with_meanwhile_is_left_alone(tmp_path):
    begun(tmp_path)
    late = PartialOutput(tmp_path / "out", {}, True)
    with pytest.raises(KeyboardInterrupt), PartialOutput(tmp_path / "out", {}, True) as first:
        first.write(["three"], "", False, 1)
        raise KeyboardInterrupt
    with pytest.raises(InputError, match="another process is writing"), late:
        pass
    with PartialOutput(tmp_path / "out", {}, True) as output:
        assert output.progress.lines == 3
    assert (tmp_path / "out").read_text() == "one\ntwo\nthree\n"


def test_a_file_without_any_translation_begins_anew(tmp_path):
    """Also after a kill, so that one call sees all lines if none has an output."""
    killed = PartialOutput(tmp_path / "out", {"beam": 3}, False).__enter__()
    killed.write(["", ""], "", True, 0)
    killed._file.close()
    with PartialOutput(tmp_path / "out", {"beam": 4}, True) as output:
        assert (output.progress.lines, output.progress.faulty) == (0, False)
        output.write(["", "two"], "", False, 1)
    assert (tmp_path / "out").read_text() == "\ntwo\n"
    with pytest.raises(KeyboardInterrupt), PartialOutput(tmp_path / "out2", {}, False) as output:
        output.write(["", ""], "", True, 0)
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_line_without_any_output_is_empty_and_named_and_all_others_are_written(monkeypatch, capsys, run, tmp_path):
    """Also by a call that goes on with the rest; what ends a translation is a line that cannot be read."""
    monkeypatch.setattr(translate, "LINES_AT_ONCE", 4)
    lines = ["one", "two", "three", "four", "five", "six", "seven"]
    (tmp_path / "in").write_bytes("\n".join(lines).replace("six", "\x00").encode().replace(b"\x00", b"\xff"))
    (tmp_path / "phrases").write_text("\n\u4e2d\n\n\n\n\n\n", encoding="utf-8")
    arguments = ["translate", "--run", str(run), "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    arguments += ["--required", str(tmp_path / "phrases")]
    assert command(*arguments) == 2
    err = capsys.readouterr().err
    reason = "required phrase '\u4e2d' has characters that the target vocabulary does not hold."
    assert f"warning: line 2 has no output: {reason}\n" in err and "line 6: not valid UTF-8" in err
    begun = (tmp_path / "out.partial").read_text().split("\n")
    assert len(begun) == 6 and [bool(line) for line in begun] == [True, False, True, True, True, False]

    (tmp_path / "in").write_text("\n".join(lines))
    assert command(*arguments, "--resume") == 4  # of all lines, though the rest has outputs
    assert "2 sentences, " in capsys.readouterr().err
    (tmp_path / "phrases").write_text("\n" * 7)
    (tmp_path / "in2").write_text("\n".join(lines))
    plain = [*arguments, "--input", str(tmp_path / "in2"), "--output", str(tmp_path / "out2")]
    assert command(*plain) == 0
    expected = (tmp_path / "out2").read_text().splitlines()
    assert (tmp_path / "out").read_text().splitlines() == [expected[0], "", *expected[2:]]

    (tmp_path / "phrases").write_text("\n\u4e2d\n\n\n\n\n\n", encoding="utf-8")
    capsys.readouterr()
    written = []
    for option in ("--scores", "--json"):
        arguments = ["translate", "--run", str(run), "--input", str(tmp_path / "in2"), option]
        assert command(*arguments, "--required", str(tmp_path / "phrases")) == 4
        out, err = capsys.readouterr()
        written.append(out.splitlines())
        assert "7 sentences, " in err and "; 1 line has no output" in err
    assert [line.split("\t")[1] for line in written[0]] == [expected[0], "", *expected[2:]]
    assert written[0][1] == "nan\t"
    assert json.loads(written[1][1]) == {"hypotheses": [], "truncated": False, "error": reason}


def test_phrases_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "phrases").write_bytes(b"\xef\xbb\xbfone\ttwo\n\n")
    assert translate.read_phrases(tmp_path / "phrases") == [["one", "two"], []]
