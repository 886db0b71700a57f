"""The compare command, on run folders written by hand."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from flax_transformer.cli import compare, main
from flax_transformer.config.reading import write_config
from flax_transformer.config.recipe import Config
from flax_transformer.errors import InputError, RunFolderError
from flax_transformer.inference.comparison import bleu_by_length, common_quality, read_runs
from flax_transformer.inference.evaluate import evaluate
from flax_transformer.models.recurrent_config import RecurrentConfig
from flax_transformer.models.transformer_config import TransformerConfig
from flax_transformer.run_folder import RunFolder

# Twelve sentences: two of each length from 5 to 10 words.
REFERENCES = [" ".join(f"w{(i * 7 + j) % 13}" for j in range(5 + i // 2)) for i in range(12)]


def make_run(path: Path, model: Any, bleus: list[float], hypotheses: list[str], **changes: Any) -> Path:
    """A run of 30 steps, with a progress line every 10 and an evaluation at steps 15 and 30."""
    folder = RunFolder(path)
    path.mkdir()
    write_config(Config(model=model, **changes), folder.config_file)
    seconds = [60.0, 120.0, 60.0]
    records: list[dict[str, Any]] = [
        {
            "kind": "train",
            "step": 10 * (i + 1),
            "target_tokens": 6_000,
            "target_tokens_per_second": 6_000 / s,
            "seconds": s,
        }
        for i, s in enumerate(seconds)
    ]
    records += [{"kind": "validation", "step": 15 * (i + 1), "bleu": b} for i, b in enumerate(bleus)]
    folder.metrics_file.write_text("".join(json.dumps(r) + "\n" for r in records))
    folder.write_test(REFERENCES, REFERENCES, hypotheses)
    scores = evaluate(hypotheses, REFERENCES, Config(**changes).evaluation.bleu_tokenizer)
    folder.write_card({"parameters": 1234, "test": scores.record})
    return path


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    worse = [r if len(r.split()) < 8 else "w1 w2 w3" for r in REFERENCES]
    return [
        make_run(tmp_path / "recurrent", RecurrentConfig(attention="none"), [10.0, 21.5], worse),
        make_run(tmp_path / "transformer", TransformerConfig(), [30.0, 40.0], REFERENCES),
    ]


def test_a_summary_holds_what_the_run_recorded(runs):
    first, second = read_runs(runs)
    assert first.model == "LSTM 1+1 of 256, no attention"
    assert second.model == "Transformer 2+2 of 128, post-norm"
    assert first.target_tokens == 18_000
    assert first.tokens_per_second == 100.0  # the median line, not the mean of 75
    assert first.training_minutes == pytest.approx(4.0)
    assert first.curve == [(pytest.approx(2.0), 10.0), (pytest.approx(4.0), 21.5)]  # step 15 is half-way to 20
    assert first.minutes_to(10.0) == pytest.approx(2.0)
    assert first.minutes_to(22.0) is None
    assert common_quality([first, second]) == 21.0


def test_bleu_by_length_covers_every_sentence_once_and_sees_where_a_model_fails(runs):
    for run, falls in zip(read_runs(runs), (True, False), strict=True):
        groups = bleu_by_length(run)
        assert sum(g.num_sentences for g in groups) == len(REFERENCES)
        assert [g.shortest for g in groups] == [5, 6, 7, 8, 9, 10]
        assert groups[0].bleu == pytest.approx(100.0)
        assert (groups[-1].bleu < 50.0) == falls
        assert groups[0].margin == pytest.approx(0.0)  # every resample of perfect sentences is perfect


def test_the_command_prints_a_table_and_writes_two_pictures(runs, tmp_path, capsys):
    output = tmp_path / "made" / "here"
    assert compare.main([*map(str, runs), "--output", str(output)], "compare") == 0
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len(rows) == 4 and "to BLEU 21" in rows[0]
    assert rows[2].startswith(
        "| recurrent | LSTM 1+1 of 256, no attention | 1,234 | 18,000 | 100 | 4.0 min | 4.0 min |"
    )
    assert "100.0 %" in rows[3]
    assert (output / "comparison.md").read_text().rstrip("\n") in printed
    for name in ("quality_over_time.png", "bleu_by_length.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")


def test_a_quality_that_was_not_reached_is_said_so(runs, tmp_path, capsys):
    assert compare.main([*map(str, runs), "--quality", "35", "--output", str(tmp_path / "o")], "compare") == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert "| never |" in rows[2] and "| 4.0 min | 4.0 min |" in rows[3]


def test_runs_that_cannot_be_compared_are_explained(runs, tmp_path):
    with pytest.raises(InputError, match="is not a run folder"):
        read_runs([*runs, tmp_path])
    with pytest.raises(InputError, match="need different folder names"):
        read_runs([runs[0], runs[0]])
    with pytest.raises(InputError, match="at least one run"):
        read_runs([])
    scoring = dataclasses.replace(Config().evaluation, bleu_tokenizer="char")
    other = make_run(tmp_path / "other", TransformerConfig(), [1.0, 2.0], REFERENCES, evaluation=scoring)
    with pytest.raises(InputError, match=r"scored in different ways: .*tok:13a.* and .*tok:char"):
        read_runs([runs[0], other])
    RunFolder(runs[1]).test_references.write_text("something else\n" * 12)
    with pytest.raises(InputError, match="were tested on different sentences"):
        read_runs(runs)
    RunFolder(runs[0]).card_file.unlink()
    with pytest.raises(InputError, match=r"has no run_card.json: .*go on with it by --run .*recurrent --resume"):
        read_runs(runs)


def cut_the_card(folder: RunFolder) -> None:
    folder.card_file.write_text("{")


def card_without_scores(folder: RunFolder) -> None:
    folder.write_card({"parameters": 1234})


def no_sources(folder: RunFolder) -> None:
    folder.test_sources.unlink()


def too_few_translations(folder: RunFolder) -> None:
    folder.test_hypotheses.write_text("w1\n")


def an_empty_log(folder: RunFolder) -> None:
    folder.metrics_file.write_text("")


def another_log(folder: RunFolder) -> None:
    folder.metrics_file.write_text("[1, 2]\n")


@pytest.mark.parametrize(
    "damage, reason",
    [
        (cut_the_card, "JSONDecodeError"),
        (card_without_scores, "KeyError, 'test'"),
        (no_sources, "FileNotFoundError"),
        (too_few_translations, "12 sources, 12 references, 1 hypotheses"),
        (an_empty_log, "metrics.jsonl has no progress, or no evaluation"),
        (another_log, r"RunFolderError, \S+metrics.jsonl, line 1: expected a JSON object"),
    ],
)
def test_damaged_files_of_a_run_are_explained(runs, damage, reason):
    damage(RunFolder(runs[1]))
    with pytest.raises(RunFolderError, match=rf"(?s)transformer cannot be compared, since .*{reason}.*--resume"):
        read_runs(runs)


def test_it_is_a_verb_and_a_mistake_gives_code_2(tmp_path, capsys):
    assert main.run_verb(main.verb("compare"), [str(tmp_path)], "flax-transformer compare") == 2
    assert "is not a run folder" in capsys.readouterr().err
