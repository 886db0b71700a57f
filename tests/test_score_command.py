"""The command score over files that are longer than a piece, and where one of their pairs cannot be scored."""

import math
import re

import pytest

from flax_transformer import Translator
from flax_transformer.cli import score
from flax_transformer.inference.scorer import Scorer
from tests.small_run import command

SOURCES = ["one", "two", "thirty-three", "five hundred", "", "six", "seven"]
TARGETS = ["eins", "zwei", "dreiunddreißig", "fünfhundert", "", "acht", "sieben"]


def score_files(run, tmp_path, sources, targets) -> int:
    (tmp_path / "source").write_text("".join(f"{line}\n" for line in sources), encoding="utf-8")
    (tmp_path / "target").write_text("".join(f"{line}\n" for line in targets), encoding="utf-8")
    return command(
        "score", "--run", str(run), "--source", str(tmp_path / "source"), "--target", str(tmp_path / "target")
    )


@pytest.fixture(autouse=True)
def pieces_of_three(monkeypatch):
    monkeypatch.setattr(score, "PAIRS_AT_ONCE", 3)


def test_pieces_are_scored_and_summed_up_as_the_whole(run, tmp_path, capsys):
    expected = Scorer(Translator.load(run)).score(SOURCES, TARGETS)
    assert score_files(run, tmp_path, SOURCES, TARGETS) == 0
    out, err = capsys.readouterr()
    assert [float(line) for line in out.split()] == pytest.approx([s.score for s in expected], abs=1e-6)
    found = re.search(r"(\d+) pairs, (\d+) target tokens, log-probability (\S+), perplexity (\S+)\n", err)
    assert found is not None
    tokens, log_prob = sum(len(s.token_scores) for s in expected), sum(s.log_prob for s in expected)
    assert (int(found[1]), int(found[2])) == (7, tokens)
    assert float(found[3]) == pytest.approx(log_prob, abs=0.01)
    assert float(found[4]) == pytest.approx(math.exp(-log_prob / tokens), rel=1e-4)


def test_pairs_before_one_that_cannot_be_scored_are(run, tmp_path, capsys):
    for sources, targets, message in (
        (SOURCES[:5], [*TARGETS[:4], "zwei"], "source line 5 is empty, and its target is not"),
        (SOURCES, [*TARGETS[:4], "", "eins " * 60, ""], "target line 6 has "),
        (SOURCES, TARGETS[:5], "source has 7 and"),
    ):
        assert score_files(run, tmp_path, sources, targets) == 2
        out, err = capsys.readouterr()
        assert message in err and "perplexity" not in err
        assert len(out.splitlines()) == (4 if "line 5" in message else 5)
