"""Progress of long work: plain lines, and a bar on a terminal."""

import io
import sys

from flax_transformer import progress
from flax_transformer.progress import rate_text, tracked


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_rate_is_that_of_the_count():
    assert rate_text(3_000, 2.0, None, "lines") == "3,000 lines, 1,500 a second"
    assert rate_text(30, 10.0, 120, "pairs") == "30 of 120 pairs, 3 a second, left 0:30"
    assert rate_text(1, 10.0, 7, "shapes") == "1 of 7 shapes, left 1:00"
    assert rate_text(0, 0.0, 7, "shapes") == "0 of 7 shapes"


def test_short_work_leaves_no_line_and_long_work_plain_ones(monkeypatch, capsys):
    assert list(tracked(range(2_500), "counting")) == list(range(2_500))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    assert sum(tracked(iter(range(2_500)), "counting", unit="numbers")) == sum(range(2_500))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" numbers")[0] for line in lines] == [f"counting: {n}" for n in ("1,000", "2,000", "2,500")]
    assert all("\x1b" not in line for line in lines)
    list(tracked(range(3), "compiling", 3, "shapes", only_on_terminals=True))
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar_that_goes_when_the_work_is_done(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    for _ in tracked(range(1_500), "counting", unit="numbers"):
        pass
    shown = terminal.getvalue()
    assert "counting" in shown and "1,500 numbers" in shown and shown.rstrip("\n").endswith("\x1b[2K")
