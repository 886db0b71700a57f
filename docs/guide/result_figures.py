"""Figures of results that take minutes to make. Their numbers are files in `results/`, beside the scripts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from figures import pyplot
from palette import ATTENTION, BAD, CYCLE, GREY, SOURCE, TARGET
from short_training import number_text

RESULTS = Path(__file__).parent / "results"
COLOURS = {"one vector": BAD, "recurrent with attention": SOURCE, "transformer": ATTENTION}


def read_result(name: str) -> dict[str, Any]:
    """Returns a result, and prints where it comes from."""
    record = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    print(f"{record['date']}, {record['machine']}, JAX {record['versions']['jax']}, seeds {record['seeds']}")
    return record


def copying() -> None:
    """Draws how many lines each model copies, by their length, and the course of its loss."""
    record = read_result("copying")
    _, (left, right) = pyplot.subplots(1, 2, figsize=(7.2, 3.3), width_ratios=(3, 2))
    edges = [(1, 4), (5, 8), (9, 12), (13, 16), (17, 20), (21, 24)]
    for name, colour in COLOURS.items():
        runs = [run for run in record["results"] if run["model"] == name]
        lengths = np.concatenate([run["lengths"] for run in runs])
        exact = np.concatenate([run["exact"] for run in runs])
        share = [100 * exact[(lengths >= low) & (lengths <= high)].mean() for low, high in edges]
        left.plot(range(len(edges)), share, "o-", color=colour, label=name)
        right.plot(np.mean([run["losses"] for run in runs], axis=0), color=colour, linewidth=1.4)
    left.set_xticks(range(len(edges)), [f"{low}-{high}" for low, high in edges])
    left.set(xlabel="letters of a line", ylabel="copied exactly, %", ylim=(-3, 104))
    left.set_title("Copies by length")
    right.set(xlabel="training step", ylabel="loss, nats per token", title="Training loss")
    left.figure.legend(loc="outside lower center", ncols=3)


def head_counts() -> None:
    """Draws loss and exact translations of models that differ in their number of heads alone."""
    record = read_result("head_counts")
    _, (left, right) = pyplot.subplots(1, 2, figsize=(7.2, 3.3), width_ratios=(3, 2))
    heads = sorted({run["heads"] for run in record["results"]})
    for number, count in enumerate(heads):
        runs = [run for run in record["results"] if run["heads"] == count]
        losses = np.array([run["losses"] for run in runs])
        smooth = np.apply_along_axis(lambda row: np.convolve(row, np.ones(15) / 15, "valid"), 1, losses)
        steps = np.arange(smooth.shape[1]) + 7
        left.plot(steps, smooth.mean(0), color=CYCLE[number], linewidth=1.6, label=f"{count} head{'s'[: count - 1]}")
        exact = [run["exact"] for run in runs]
        right.plot([number] * len(exact), exact, "o", color=CYCLE[number], alpha=0.5, markersize=6)
        right.plot([number - 0.25, number + 0.25], [np.mean(exact)] * 2, color=CYCLE[number])
    left.set(xlabel="training step", ylabel="training loss, nats per token", title="Loss, mean of the seeds")
    left.set_ylim(0.8, 2.2)
    left.legend()
    right.set_xticks(range(len(heads)), [str(count) for count in heads])
    right.set(xlabel="heads", ylabel="unseen numbers exact, %", title="After 300 steps, by seed")


def smoothed_entropy(counts: np.ndarray) -> float:
    """Returns the lowest loss with label smoothing of 0.1 for a model that knows these counts alone.

    Args:
        counts: [contexts, V], how often each token follows each context.
    """
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    smoothed = 0.9 * shares + 0.1 / counts.shape[1]
    entropies = -(smoothed * np.log(smoothed)).sum(1)
    return float((entropies * counts.sum(1)).sum() / counts.sum())


def losses_without_source() -> dict[str, float]:
    """Returns the lowest losses of models that read no source."""
    text = number_text()
    tokens, start = np.asarray(text.train.target.ids), text.vocabulary.start_token
    first = np.zeros(len(tokens), bool)
    first[np.asarray(text.train.target.offsets)[: len(text.train.kept)]] = True
    previous = np.where(first, start, np.roll(tokens, 1))
    counts = np.zeros((text.vocabulary.target_size,) * 2)
    np.add.at(counts, (previous, tokens), 1)
    return {
        "knows how frequent tokens are": smoothed_entropy(counts.sum(0, keepdims=True)),
        "knows the token before, too": smoothed_entropy(counts),
    }


def residuals() -> None:
    """Draws the losses of deep models with and without residual connections."""
    record = read_result("residuals")
    _, axes = pyplot.subplots(figsize=(7.2, 3.4))
    for run in record["results"]:
        name = f"{run['norm']}-norm, {'with' if run['residual'] else 'without'}"
        colour = ATTENTION if run["norm"] == "post" else TARGET
        axes.plot(run["losses"], color=colour, linestyle="-" if run["residual"] else "--", linewidth=1.5, label=name)
    for name, loss in losses_without_source().items():
        axes.axhline(loss, color=GREY, linestyle=":", linewidth=1.2)
        axes.text(300, loss + 0.2, name, color=GREY, ha="right", fontsize=9)
    axes.set(
        xlabel="training step",
        ylabel="training loss, nats per token",
        title="Eight encoder layers, trained",
        ylim=(0.5, None),
    )
    axes.figure.legend(title="residual connections", loc="outside right center")
