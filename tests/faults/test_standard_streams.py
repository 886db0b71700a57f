"""Standard streams: a program that talks through pipes, streams that are closed, errors and their tracebacks."""

import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flax_transformer.cli import main as cli
from flax_transformer.errors import InputError
from tests.small_run import command


class Conversation:
    """A program on the other side of this process's standard streams."""

    def __init__(self, monkeypatch):
        (theirs, self.into), (self.out_of, ours) = os.pipe(), os.pipe()
        self.streams = open(theirs, encoding="utf-8"), open(ours, "w", encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", self.streams[0])
        monkeypatch.setattr(sys, "stdout", self.streams[1])

    def hear(self, lines: int) -> bytes:
        """Returns what is written, until it has so many lines."""
        heard = b""
        while heard.count(b"\n") < lines:
            heard += os.read(self.out_of, 1 << 16)
        return heard


def test_a_program_that_talks_through_pipes_is_answered_at_once(run, monkeypatch):
    """Also if it sends several lines, and half of one."""
    program, heard = Conversation(monkeypatch), []

    def talk() -> None:
        for said, lines in ((b"one\n", 1), (b"two\nthree\nfo", 2), (b"ur", 0), (b"\n", 1)):
            os.write(program.into, said)
            heard.append(program.hear(lines))
        os.close(program.into)

    talker = threading.Thread(target=talk, daemon=True)
    talker.start()
    assert command("translate", "--run", str(run)) == 0
    talker.join()
    for stream in program.streams:
        stream.close()
    os.close(program.out_of)
    assert [lines.count(b"\n") for lines in heard] == [1, 2, 0, 1]


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_standard_stream_is_the_null_device(tmp_path, closed):
    """No file gets its number, which would then receive what is printed."""
    code = (
        "from flax_transformer.cli.main import open_standard_streams; open_standard_streams(); import sys; "
        "file = open('file', 'w'); print('lost'); print('lost', file=sys.stderr); file.write(repr((file.fileno() > 2, "
        "sys.stdin.buffer.fileno(), sys.stdout.buffer.fileno(), sys.stderr.buffer.fileno(), sys.stdin.read())))"
    )
    program = ["sh", "-c", f'"{sys.executable}" -c "$0" {closed}', code]
    done = subprocess.run(program, cwd=tmp_path, env=_environment(), input=b"", capture_output=True)
    assert done.returncode == 0 and (tmp_path / "file").read_text() == "(True, 0, 1, 2, '')", done.stderr


def test_the_command_survives_without_standard_streams(tmp_path):
    program = f'"{sys.executable}" -m flax_transformer.cli.main nothing <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", program], env=_environment(), cwd=tmp_path).returncode == 2


def test_threads_of_orbax_print_nothing_after_the_verb(tmp_path):
    """As they did when a process had too few file handles: pages of tracebacks followed the one sentence."""
    code = (
        "from flax_transformer.cli import main as cli; cli.set_up_process(); import logging; "
        "cli.run_verb(lambda *_: 2, [], ''); logging.getLogger('absl').error('late'); import types, sys; "
        "sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError('Event loop is closed')))"
    )
    environment = _environment() | {"GLIBC_TUNABLES": "", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(cli.__file__).parent.parent.parent)}


@pytest.mark.parametrize(
    "error, code, message",
    [
        (InputError("the file is bad. Mend it."), 2, "the file is bad. Mend it."),
        (OSError(28, "No space left on device", "out"), 2, "out: No space left on device. Make room on that disk"),
        (PermissionError(13, "Permission denied", "in"), 2, "in: Permission denied. Change its permissions, or"),
        (OSError("strange"), 2, "strange. Check the path and the disk."),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 9 bytes."),
            1,
            "there is not enough memory: RESOURCE_",
        ),
        (MemoryError(), 1, "there is not enough memory. Use a smaller model, batch or text."),
    ],
)
def test_an_error_is_one_paragraph_and_debug_shows_its_traceback(capsys, error, code, message):
    def fails(arguments: list[str], program: str) -> int:
        assert arguments == ["--option"]
        raise error

    assert cli.run_verb(fails, ["--option"], "flax-transformer") == code
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}") and err.count("\n") == 1
    assert cli.run_verb(fails, ["--debug", "--option"], "flax-transformer") == code
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last)") and f"\nerror: {message}" in err


def test_a_defect_of_the_program_keeps_its_traceback():
    def fails(*_) -> int:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        cli.run_verb(fails, [], "flax-transformer")


def test_letters_that_standard_output_cannot_encode_are_escaped(monkeypatch):
    """Such as those of a help text in the locale "C"."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert command("translate", "--help") == 0
    stream.flush()
    assert b"\\u2581the" in stream.buffer.getvalue()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the device that is always full is one of Linux")
def test_a_full_output_is_named(run, tmp_path, capsys):
    (tmp_path / "in").write_text("one\n")
    arguments = ["translate", "--run", str(run), "--input", str(tmp_path / "in"), "--output", "/dev/full"]
    assert command(*arguments) == 2
    assert "error: /dev/full: No space left on device. Make room on that disk" in capsys.readouterr().err
