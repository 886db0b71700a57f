"""Several runs in one picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flax_transformer.inference.comparison import RunSummary, bleu_by_length
from flax_transformer.plots.picture import Picture, literal, write_picture

NAME_COLUMNS = 60  # room for a run and its model


def plot_quality_over_time(runs: Sequence[RunSummary], output: Path) -> Picture:
    """Writes a picture of validation BLEU over training time, one line a run."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    lines = [axes.plot(*zip((0.0, 0.0), *run.curve, strict=True), "o-", markersize=4)[0] for run in runs]
    axes.set(xlabel="training time, minutes (updates alone)", ylabel="validation BLEU, beam search")
    highest = max(bleu for run in runs for _, bleu in run.curve)
    axes.set(xlim=(0, None), ylim=(0, 1.05 * highest))
    axes.grid(alpha=0.3)
    _add_legend(axes, lines, runs, "lower right")
    return write_picture(figure, output)


def plot_bleu_by_length(runs: Sequence[RunSummary], output: Path) -> Picture:
    """Writes a picture of test BLEU over source length in words, one line a run, with 95 % bootstrap intervals."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    groups, bars, highest = [], [], 0.0
    for number, run in enumerate(runs):
        groups = bleu_by_length(run)
        highest = max(highest, *(g.bleu + g.margin for g in groups))
        aside = 0.06 * (number - (len(runs) - 1) / 2)  # so that intervals do not hide each other
        places = [index + aside for index in range(len(groups))]
        bleus, margins = [g.bleu for g in groups], [g.margin for g in groups]
        bars.append(axes.errorbar(places, bleus, margins, fmt="o-", markersize=4, capsize=3))
    spans = [str(g.shortest) if g.shortest == g.longest else f"{g.shortest} to {g.longest}" for g in groups]
    labels = [f"{span}\n({g.num_sentences})" for span, g in zip(spans, groups, strict=True)]
    axes.set_xticks(range(len(groups)), labels)
    axes.set(
        xlabel="source words (test sentences)", ylabel="test BLEU, 95 % bootstrap interval", ylim=(0, 1.05 * highest)
    )
    axes.grid(alpha=0.3)
    _add_legend(axes, bars, runs, "lower left")
    return write_picture(figure, output)


def _add_legend(
    axes: Axes, handles: list[Any], runs: Sequence[RunSummary], place: Literal["lower left", "lower right"]
) -> None:
    """Names the runs by handles of their own: as a label, a name that begins with "_" would be left out."""
    names = [literal(f"{run.name}: {run.model}", NAME_COLUMNS) for run in runs]
    for text in axes.legend(handles, names, loc=place, fontsize="small").get_texts():
        text.set_parse_math(False)
