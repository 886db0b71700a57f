"""Colours and style of all figures in the guide. One colour means one thing on all pages."""

import matplotlib
import matplotlib_inline.backend_inline
from cycler import cycler

INK, GREY, LIGHT, PALE = "#1f2430", "#6b7280", "#d7dbe2", "#f3f5f8"
SOURCE = "#1b6ca8"  # encoder, keys, source side
TARGET = "#c2571a"  # decoder, queries, target side
ATTENTION = "#7a3e9d"  # weights and what they sum
GOOD, BAD = "#2a7f62", "#b3261e"  # with and without what a page is about
CYCLE = [SOURCE, TARGET, GOOD, ATTENTION, "#a3862a", "#4a4e58"]
HEAT = "Purples"  # attention weights, 0 to 1
SIGNED = "RdBu_r"  # scores around 0


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
