"""Several runs in one picture."""

from collections.abc import Sequence
from pathlib import Path

from flax_transformer.inference.comparison import RunSummary, bleu_by_length


def plot_quality_over_time(runs: Sequence[RunSummary], output: Path) -> None:
    """Writes a PNG of validation BLEU over training time, one line a run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        axes.plot(*zip((0.0, 0.0), *run.curve, strict=True), "o-", markersize=4, label=f"{run.name}: {run.model}")
    axes.set(xlabel="training time, minutes (updates alone)", ylabel="validation BLEU, beam search")
    highest = max(bleu for run in runs for _, bleu in run.curve)
    axes.set(xlim=(0, None), ylim=(0, 1.05 * highest))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(output, dpi=110)


def plot_bleu_by_length(runs: Sequence[RunSummary], output: Path) -> None:
    """Writes a PNG of test BLEU over source length in words, one line a run, with 95 % bootstrap intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    groups, highest = [], 0.0
    for number, run in enumerate(runs):
        groups = bleu_by_length(run)
        highest = max(highest, *(g.bleu + g.margin for g in groups))
        aside = 0.06 * (number - (len(runs) - 1) / 2)  # so that intervals do not hide each other
        places = [index + aside for index in range(len(groups))]
        axes.errorbar(
            places,
            [g.bleu for g in groups],
            [g.margin for g in groups],
            fmt="o-",
            markersize=4,
            capsize=3,
            label=f"{run.name}: {run.model}",
        )
    spans = [str(g.shortest) if g.shortest == g.longest else f"{g.shortest} to {g.longest}" for g in groups]
    labels = [f"{span}\n({g.num_sentences})" for span, g in zip(spans, groups, strict=True)]
    axes.set_xticks(range(len(groups)), labels)
    axes.set(
        xlabel="source words (test sentences)", ylabel="test BLEU, 95 % bootstrap interval", ylim=(0, 1.05 * highest)
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", fontsize="small")
    figure.savefig(output, dpi=110)
