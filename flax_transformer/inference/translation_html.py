"""A translation as a piece of HTML, as a notebook shows it. It has no script, and its styles are inside."""

import html
from collections.abc import Sequence

import numpy as np

from flax_transformer.inference.alignment import word_alignment

# Most tokens of a side whose attention is shown. Larger tables are not read.
MOST_TOKENS = 40

CELL = "padding:2px 6px;border:0;text-align:center;font-variant-numeric:tabular-nums"
TEXT = "padding:2px 12px 2px 0;border:0;text-align:start;font-variant-numeric:tabular-nums"
NARROW = "padding:4px 6px;border:0;vertical-align:bottom"
RIGHT = "padding:2px 8px 2px 0;border:0;text-align:right;white-space:pre"


def isolated(text: str) -> str:
    """Returns a text escaped, with a direction of its own. NUL, which HTML lacks, becomes its picture."""
    return f'<bdi dir="auto">{html.escape(text.replace(chr(0), chr(0x2400)))}</bdi>'


def hypotheses_table(rows: Sequence[tuple[str, float, bool]]) -> str:
    """Returns a table of outputs, best first: (text, score, whether it is finished)."""
    lines = [
        f'<tr><td style="{CELL}">{rank}</td><td style="{CELL}">{score:.4f}</td>'
        f'<td style="{TEXT}">{isolated(text)}{"" if finished else " <i>(cut at the maximum length)</i>"}</td></tr>'
        for rank, (text, score, finished) in enumerate(rows, start=1)
    ]
    names = f'<th style="{CELL}">rank</th><th style="{CELL}">score</th><th style="{TEXT}">output</th>'
    return f'<table style="border-collapse:collapse"><tr>{names}</tr>{"".join(lines)}</table>'


def attention_table(source: Sequence[str], target: Sequence[str], weights: np.ndarray) -> str:
    """Returns a table of attention: a row for each target token, a column for each source token.

    Args:
        source: source pieces.
        target: target pieces.
        weights: [T, S], at least as many as there are pieces.
    """
    if max(len(source), len(target)) > MOST_TOKENS:
        return ""
    upright = "writing-mode:vertical-rl;white-space:pre;font-weight:normal"
    names = "".join(f'<th style="{NARROW}"><span style="{upright}">{isolated(piece)}</span></th>' for piece in source)
    lines = []
    for piece, row in zip(target, weights, strict=False):
        cells = "".join(_cell(float(weight)) for weight in row[: len(source)])
        lines.append(f'<tr><th style="{RIGHT};font-weight:normal">{isolated(piece)}</th>{cells}</tr>')
    return (
        f'<table style="border-collapse:collapse;font-size:90%"><tr><td style="{NARROW}"></td>{names}</tr>'
        f"{''.join(lines)}</table>"
    )


def _cell(weight: float) -> str:
    """Returns a cell whose shade and text tell a weight."""
    colour = f"background:rgba(31,90,150,{weight:.2f});color:{'#fff' if weight > 0.5 else '#1b2330'}"
    return f'<td style="{CELL};{colour}" title="{weight:.4f}">{weight:.2f}</td>'


def alignment_line(
    sentence_words: Sequence[Sequence[int]], output_words: Sequence[Sequence[int]], weights: np.ndarray
) -> str:
    """Returns a line with the aligned words; see `alignment.word_alignment` for the arguments."""
    pairs = word_alignment(sentence_words, output_words, weights)
    return f"<p>aligned words (source-target): {pairs}</p>" if pairs else ""
