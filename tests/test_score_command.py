"""The command score: alone, and behind translate."""

import contextlib
import itertools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from flax_transformer.cli import score, translate
from flax_transformer.errors import DivergenceError
from flax_transformer.inference.scorer import NoScore, PairScore, Scorer
from flax_transformer.inference.translator import Translator
from tests.small_models import ALIKE, MODELS, SEEDS, SOURCES, TARGETS, TOKENIZERS, command, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run", MODELS["transformer"], SEEDS["transformer"])


def test_score_command(monkeypatch, capsys, run, tmp_path):
    (tmp_path / "source").write_text("".join(f"{s}\n" for s in SOURCES[:5]))
    (tmp_path / "target").write_text("".join(f"{t}\n" for t in TARGETS[:5]))
    files = ["--source", str(tmp_path / "source"), "--target", str(tmp_path / "target")]
    code, out, err = command(monkeypatch, capsys, ["score", "--run", str(run), *files])
    expected = Scorer(Translator.load(run)).score(SOURCES[:5], TARGETS[:5])
    assert code == 0 and [float(line) for line in out.split()] == pytest.approx([s.score for s in expected], rel=1e-4)
    assert "5 pairs, " in err and "perplexity " in err
    code, out, _ = command(monkeypatch, capsys, ["score", "--run", str(run), *files, "--json"])
    assert json.loads(out.splitlines()[0])["tokens"] == expected[0].tokens
    (tmp_path / "source").write_text("".join(f"{s}\n" for s in [*SOURCES[:4], "one " * 60]))
    code, out, err = command(monkeypatch, capsys, ["score", "--run", str(run), *files])
    assert code == 4 and len(out.splitlines()) == 5
    assert "line 5 is longer than the model's 47 tokens; only its beginning was read. Break it" in err


def test_score_gives_the_number_that_translate_printed_with_the_same_text(monkeypatch, capsys, run, tmp_path):
    """Where the text is cut into the tokens that it was made of, and has ended; the sum is on standard error."""
    arguments = ["translate", "--run", str(run), "--prefix", "ein"]
    lines = "".join(f"{line}\n" for line in ALIKE).encode()
    code, out, _ = command(monkeypatch, capsys, [*arguments, "--scores"], lines)
    printed, text = zip(*(line.split("\t") for line in out.splitlines()), strict=True)
    objects = command(monkeypatch, capsys, [*arguments, "--json"], lines)[1].splitlines()
    best = [json.loads(each)["hypotheses"][0] for each in objects]
    again = [TOKENIZERS.target.pieces(ids) for ids in TOKENIZERS.target.encode(text)]
    same = [each["finished"] and each["tokens"] == tokens for each, tokens in zip(best, again, strict=True)]
    assert code == 0 and 20 < sum(same) < len(same)

    (tmp_path / "source").write_bytes(lines)
    (tmp_path / "target").write_text("".join(f"{line}\n" for line in text))
    files = ["--source", str(tmp_path / "source"), "--target", str(tmp_path / "target")]
    code, out, err = command(monkeypatch, capsys, ["score", "--run", str(run), *files])
    scored = out.splitlines()
    assert code == 0
    for before, after, is_same in zip(printed, scored, same, strict=True):
        assert (float(after) == pytest.approx(float(before), rel=1e-5, abs=1e-5)) == is_same

    tokens = [score for pair in Scorer(Translator.load(run)).score(ALIKE, text) for score in pair.token_scores]
    found = re.search(r"pairs, ([\d,]+) target tokens, log-probability (.*), perplexity (.*)\n", err)
    assert found and found[1] == f"{len(tokens):,}" and len(tokens) == sum(len(ids) + 1 for ids in again)
    assert float(found[2]) == pytest.approx(sum(tokens), abs=0.01)
    assert float(found[3]) == pytest.approx(math.exp(-sum(tokens) / len(tokens)), rel=1e-4)


def test_the_last_line_of_translate_counts_the_tokens_of_what_it_wrote(monkeypatch, capsys, run):
    clock = itertools.count(0.0, 4.0)
    monkeypatch.setattr(translate, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    code, out, err = command(
        monkeypatch, capsys, ["translate", "--run", str(run), "--json"], "\n".join(ALIKE[:10]).encode()
    )
    tokens = sum(len(json.loads(line)["hypotheses"][0]["tokens"]) for line in out.splitlines())
    assert code == 0 and tokens > 20
    last = f"10 sentences, {tokens} tokens in 4.0 s: 2.5 sentences/s, {tokens / 4:.1f} tokens/s"
    assert err.splitlines()[-1].startswith(last)


def score_of_files(monkeypatch, capsys, run, folder, sources, targets) -> tuple[int, str, str]:
    files = []
    for side, lines in (("source", sources), ("target", targets)):
        (folder / side).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        files += [f"--{side}", str(folder / side)]
    return command(monkeypatch, capsys, ["score", "--run", str(run), *files])


def test_pieces_of_long_files_are_scored_and_summed_up_as_the_whole(monkeypatch, capsys, run, tmp_path):
    pairs = [*SOURCES[:3], "", *SOURCES[3:6]], [*TARGETS[:3], "", *TARGETS[3:6]]
    whole = score_of_files(monkeypatch, capsys, run, tmp_path, *pairs)
    monkeypatch.setattr(score, "PAIRS_AT_ONCE", 3)
    assert score_of_files(monkeypatch, capsys, run, tmp_path, *pairs) == whole
    assert whole[0] == 0 and len(whole[1].splitlines()) == 7 and "7 pairs, " in whole[2]


def test_a_pair_that_cannot_be_scored_is_named_and_all_others_are_scored(monkeypatch, capsys, run, tmp_path):
    monkeypatch.setattr(score, "PAIRS_AT_ONCE", 3)
    sources, targets = [*SOURCES[:4], "", *SOURCES[4:6]], [*TARGETS[:4], "", *TARGETS[4:6]]
    usual = score_of_files(monkeypatch, capsys, run, tmp_path, sources, targets)[1].splitlines()
    for bad, target, message in (
        (4, "zwei", "pair 5 has no score: its source is empty, and its target is not"),
        (5, "eins " * 60, "pair 6 has no score: its target has "),
    ):
        others = [*targets[:bad], target, *targets[bad + 1 :]]
        code, out, err = score_of_files(monkeypatch, capsys, run, tmp_path, sources, others)
        assert code == 4 and f"warning: {message}" in err and "7 pairs, " in err and "; 1 pair has no score" in err
        assert out.splitlines() == [*usual[:bad], "nan", *usual[bad + 1 :]]
    files = ["--source", str(tmp_path / "source"), "--target", str(tmp_path / "target")]
    code, out, _ = command(monkeypatch, capsys, ["score", "--run", str(run), *files, "--json"])
    assert code == 4 and json.loads(out.splitlines()[5])["error"].startswith("its target has ")
    code, out, err = score_of_files(monkeypatch, capsys, run, tmp_path, sources, targets[:5])
    assert code == 2 and "source has 7 and" in err and "perplexity" not in err
    assert len(out.splitlines()) == 5


def test_a_model_is_at_fault_if_no_pair_of_the_whole_text_has_a_score():
    """So it does not matter which pairs are scored together."""
    failed = NoScore("eins", DivergenceError("the model's scores are not finite."))
    scored = PairScore(-1.0, -1.0, ["eins"], [-1.0])
    for pairs, fails in (([failed, scored], False), ([failed, failed], True), ([scored], False), ([], False)):
        total = score.Total()
        for pair in pairs:
            total.add(pair)
        with pytest.raises(DivergenceError, match="'eins' has no score") if fails else contextlib.nullcontext():
            total.raise_if_diverged()
