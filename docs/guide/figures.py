"""Figures that several pages draw with Matplotlib, and the style of all of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib_inline.backend_inline
import numpy as np
from cycler import cycler
from matplotlib import pyplot
from matplotlib.axes import Axes
from palette import ATTENTION, CYCLE, GREY, HEAT, INK, LIGHT


def use_style() -> None:
    """Sets Matplotlib's style for the pages. Figures are vector graphics."""
    matplotlib_inline.backend_inline.set_matplotlib_formats("svg")
    matplotlib.rcParams.update(
        {
            "figure.figsize": (7.2, 3.4),
            "figure.constrained_layout.use": True,
            "figure.facecolor": "white",
            "font.size": 10.5,
            "axes.titlesize": 11.5,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.labelcolor": INK,
            "axes.edgecolor": GREY,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": False,
            "axes.prop_cycle": cycler(color=CYCLE),
            "grid.color": LIGHT,
            "legend.frameon": False,
            "legend.fontsize": 9.5,
            "lines.linewidth": 2.0,
            "svg.hashsalt": "flax_transformer",  # the same file in each build
            "svg.fonttype": "none",  # text stays text
        }
    )


use_style()


def heat(
    axes: Axes,
    values: Any,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str = "",
    *,
    cmap: str = HEAT,
    limits: tuple[float, float] | None = (0.0, 1.0),
    numbers: bool = False,
) -> Any:
    """Draws a matrix with a name for each row and column. Returns the image, for a colour bar.

    Args:
        axes: where to draw.
        values: [rows, columns].
        rows, columns: their names.
        title: above the matrix.
        cmap: name of the colours.
        limits: values of the first and the last colour; None fits them to the values, around 0.
        numbers: whether entries other than 0 are written out.
    """
    values = np.asarray(values)
    low, high = limits or (-float(np.abs(values).max()), float(np.abs(values).max()))
    image = axes.imshow(values, cmap=cmap, vmin=low, vmax=high, aspect="auto")
    slanted = {"rotation": 60, "rotation_mode": "anchor", "ha": "right", "va": "center"}
    axes.set_xticks(range(len(columns)), columns, **(slanted if max(map(len, columns)) > 3 else {}))
    axes.set_yticks(range(len(rows)), rows)
    axes.set_title(title)
    axes.tick_params(length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    if numbers:
        middle = low + 0.62 * (high - low)
        for row, column in np.ndindex(*values.shape):
            value = values[row, column]
            if value == 0.0:
                continue
            dark = value > middle or (limits is None and abs(value) > 0.6 * high)
            axes.text(
                column, row, f"{value:.2f}", ha="center", va="center", fontsize=8.5, color="white" if dark else INK
            )
    return image


def weights(values: Any, rows: Sequence[str], columns: Sequence[str], title: str, **labels: str) -> None:
    """Draws one matrix of attention weights."""
    size = (min(7.2, 2.6 + 0.42 * len(columns)), 1.6 + 0.3 * len(rows))
    _, axes = pyplot.subplots(figsize=size)
    image = heat(axes, values, rows, columns, title)
    axes.set(**labels)
    axes.figure.colorbar(image, ax=axes, label="attention weight", shrink=0.9)


def shares(groups: Mapping[str, Mapping[str, float]], title: str, xlabel: str) -> None:
    """Draws one horizontal bar for each group, divided into named parts."""
    _, axes = pyplot.subplots(figsize=(7.2, 1.6 + 0.5 * len(groups)))
    names = list(dict.fromkeys(name for parts in groups.values() for name in parts))
    colours = {name: CYCLE[number % len(CYCLE)] for number, name in enumerate(names)}
    for row, parts in enumerate(groups.values()):
        left = 0.0
        for name, value in parts.items():
            label = name if name not in axes.get_legend_handles_labels()[1] else None
            axes.barh(row, value, left=left, color=colours[name], label=label, edgecolor="white")
            if value > 0.05:
                axes.text(
                    left + value / 2, row, f"{100 * value:.0f} %", ha="center", va="center", color="white", fontsize=9.5
                )
            left += value
    axes.set_yticks(range(len(groups)), list(groups))
    axes.invert_yaxis()
    axes.set(title=title, xlabel=xlabel, xlim=(0, 1))
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.figure.legend(loc="outside lower center", ncols=5)


def bars(axes: Axes, values: Mapping[str, float], ylabel: str, title: str, colours: Sequence[str] = ()) -> None:
    """Draws one bar for each name, with its value above it."""
    drawn = axes.bar(list(values), list(values.values()), color=colours or ATTENTION, width=0.6)
    axes.bar_label(drawn, fmt="%.3g", padding=2)
    axes.set(ylabel=ylabel, title=title)
    axes.margins(y=0.15)
