"""`plot`: pictures of runs that train, and of several side by side."""

import shutil

import numpy as np
from matplotlib.figure import Figure

from flax_transformer.cli.plot import unique_names
from flax_transformer.plots import curves
from flax_transformer.training.metrics_file import read_metrics
from tests.small_run import command


def test_runs_get_a_picture_each_and_one_together(run, tmp_path, capsys, monkeypatch):
    drawn: dict[str, Figure] = {}

    def keep(figure, output):
        drawn[output.name] = figure
        return write(figure, output)

    write = curves.write_picture
    monkeypatch.setattr(curves, "write_picture", keep)
    half = tmp_path / "half"
    shutil.copytree(run, half)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (half / "metrics.jsonl").write_text(
        "".join(lines[:2]) + lines[2][:20]
    )  # no evaluation yet, and a line half-written
    (half / "run_card.json").unlink()
    assert command("plot", str(run), str(half), "--output", str(tmp_path / "made")) == 0
    names = [f"{run.name}.png", "half.png", "together.png"]
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "made" / name) for name in names]
    assert all((tmp_path / "made" / name).read_bytes().startswith(b"\x89PNG") for name in names)
    records = [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "train"]
    whole, short = (np.asarray(line.get_xydata()) for line in drawn["together.png"].axes[0].get_lines())
    np.testing.assert_array_equal(whole, [[record["step"], record["loss"]] for record in records])
    np.testing.assert_array_equal(short, whole[:2])
    legend = drawn["together.png"].axes[0].get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == [run.name, "half"]


def test_names_of_runs_are_different():
    assert unique_names(["a/x", "b/x", "c/x/", "together"]) == ["x", "x-2", "x-3", "together-2"]


def test_a_run_without_curves_is_explained(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "new", ignore=shutil.ignore_patterns("metrics.jsonl"))
    for place, message in ((tmp_path / "new", "has no curve"), (tmp_path / "none", "no config.yaml")):
        assert command("plot", str(place), "--output", str(tmp_path / "made")) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and message in said
    assert command("plot", "--output", str(tmp_path / "made")) == 2
    assert "give the folder of a run" in capsys.readouterr().err and not (tmp_path / "made").exists()
