"""The course of training runs as pictures."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from flax_transformer.object_storage import AnyPath
from flax_transformer.plots.picture import Picture, literal, set_title, write_picture

NAME_COLUMNS = 30  # room for the name of a run


def plot_curves(records: list[dict[str, Any]], output: AnyPath, title: str) -> Picture:
    """Writes a picture of loss, accuracy, learning rate with gradient norm, and validation BLEU over steps.

    Args:
        records: of metrics.jsonl, kinds "train" and "validation".
        output: the file to write.
        title: above the picture.
    """

    def series(kind: str, name: str) -> tuple[list[int], list[float]]:
        return _series(records, kind, name)

    figure = Figure(figsize=(11, 7), layout="constrained")
    set_title(figure, title)
    ((loss, accuracy), (rate, bleu)) = figure.subplots(2, 2)
    loss.plot(*series("train", "loss"), label="training (with smoothing and dropout)")
    loss.plot(*series("validation", "loss"), "o-", label="validation (with smoothing)")
    loss.set(ylabel="loss, nats per target token")
    loss.legend()
    accuracy.plot(*_percent(series("train", "accuracy")), label="training (with dropout)")
    accuracy.plot(*_percent(series("validation", "accuracy")), "o-", label="validation")
    accuracy.set(ylabel="token accuracy, %")
    accuracy.legend()
    rate.plot(*series("train", "learning_rate"), color="tab:green", label="learning rate")
    rate.set(ylabel="learning rate", ylim=(0, None))
    norm = rate.twinx()
    norm.plot(*series("train", "gradient_norm"), color="tab:gray", linewidth=0.8, label="gradient norm")
    norm.set(ylabel="gradient norm", ylim=(0, None))
    lines = [*rate.get_lines(), *norm.get_lines()]
    rate.legend(lines, [str(line.get_label()) for line in lines])
    bleu.plot(*series("validation", "bleu"), "o-", label="BLEU")
    bleu.plot(*series("validation", "exact_match"), "s--", label="exact match, %")
    bleu.set(ylabel="validation, beam search", ylim=(0, 103))
    bleu.legend()
    for axes in (loss, accuracy, rate, bleu):
        axes.set(xlabel="step", xlim=(0, None))
        axes.grid(alpha=0.3)
    return write_picture(figure, output)


def _series(records: list[dict[str, Any]], kind: str, name: str) -> tuple[list[int], list[float]]:
    """Returns the steps and the values of the records of a kind."""
    chosen = [record for record in records if record["kind"] == kind]
    return [record["step"] for record in chosen], [record[name] for record in chosen]


def _percent(series: tuple[list[int], list[float]]) -> tuple[list[int], list[float]]:
    steps, values = series
    return steps, [100 * v for v in values]


def plot_together(runs: Mapping[str, list[dict[str, Any]]], output: AnyPath) -> Picture:
    """Writes a picture of several runs over steps: loss in training, and loss and BLEU on validation text.

    Args:
        runs: records of metrics.jsonl by the names of the runs.
        output: the file to write.
    """
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    panels = figure.subplots(1, 3)
    lines = []
    for records in runs.values():
        (line,) = panels[0].plot(*_series(records, "train", "loss"))
        lines.append(line)
        panels[1].plot(*_series(records, "validation", "loss"), "o-", markersize=4)
        panels[2].plot(*_series(records, "validation", "bleu"), "o-", markersize=4)
    names = ("training loss, nats per token", "validation loss, nats per token", "validation BLEU, beam search")
    for axes, name in zip(panels, names, strict=True):
        axes.set(xlabel="step", ylabel=name, xlim=(0, None))
        axes.grid(alpha=0.3)
    panels[2].set(ylim=(0, None))
    labels = [literal(name, NAME_COLUMNS) for name in runs]
    for text in panels[0].legend(lines, labels, fontsize="small").get_texts():
        text.set_parse_math(False)
    return write_picture(figure, output)
