"""The course of a training run as a picture."""

from typing import Any

from matplotlib.figure import Figure

from flax_transformer.object_storage import AnyPath
from flax_transformer.plots.picture import Picture, set_title, write_picture


def plot_curves(records: list[dict[str, Any]], output: AnyPath, title: str) -> Picture:
    """Writes a picture of loss, accuracy, learning rate with gradient norm, and validation BLEU over steps.

    Args:
        records: of metrics.jsonl, kinds "train" and "validation".
        output: the file to write.
        title: above the picture.
    """
    train = [r for r in records if r["kind"] == "train"]
    validation = [r for r in records if r["kind"] == "validation"]

    def series(of: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
        return [r["step"] for r in of], [r[name] for r in of]

    figure = Figure(figsize=(11, 7), layout="constrained")
    set_title(figure, title)
    ((loss, accuracy), (rate, bleu)) = figure.subplots(2, 2)
    loss.plot(*series(train, "loss"), label="training (with smoothing and dropout)")
    loss.plot(*series(validation, "loss"), "o-", label="validation (with smoothing)")
    loss.set(ylabel="loss, nats per target token")
    loss.legend()
    accuracy.plot(*_percent(series(train, "accuracy")), label="training (with dropout)")
    accuracy.plot(*_percent(series(validation, "accuracy")), "o-", label="validation")
    accuracy.set(ylabel="token accuracy, %")
    accuracy.legend()
    rate.plot(*series(train, "learning_rate"), color="tab:green", label="learning rate")
    rate.set(ylabel="learning rate", ylim=(0, None))
    norm = rate.twinx()
    norm.plot(*series(train, "gradient_norm"), color="tab:gray", linewidth=0.8, label="gradient norm")
    norm.set(ylabel="gradient norm", ylim=(0, None))
    lines = [*rate.get_lines(), *norm.get_lines()]
    rate.legend(lines, [str(line.get_label()) for line in lines])
    bleu.plot(*series(validation, "bleu"), "o-", label="BLEU")
    bleu.plot(*series(validation, "exact_match"), "s--", label="exact match, %")
    bleu.set(ylabel="validation, beam search", ylim=(0, 103))
    bleu.legend()
    for axes in (loss, accuracy, rate, bleu):
        axes.set(xlabel="step", xlim=(0, None))
        axes.grid(alpha=0.3)
    return write_picture(figure, output)


def _percent(series: tuple[list[int], list[float]]) -> tuple[list[int], list[float]]:
    steps, values = series
    return steps, [100 * v for v in values]
