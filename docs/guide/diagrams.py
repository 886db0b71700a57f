"""Diagrams of boxes and arrows, as SVG inside the page. A box may be a link to the line of code that it stands for."""

import dataclasses
import inspect
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any, Literal

from palette import ATTENTION, GREY, INK, LIGHT, PALE, SOURCE, TARGET

import flax_transformer

ROOT = Path(flax_transformer.__file__).parent.parent
Side = Literal["top", "bottom", "left", "right"]
FILLS = {
    "plain": ("#ffffff", GREY),
    "data": (PALE, LIGHT),
    "source": ("#e3effa", SOURCE),
    "target": ("#fbeadd", TARGET),
    "attention": ("#f0e6f6", ATTENTION),
}


def code_line(function: Callable[..., Any], text: str) -> str:
    """Returns a link to the line of a function that contains a text.

    Raises:
        ValueError: no line contains it, so a picture would show code that does not exist.
    """
    function = inspect.unwrap(function)  # of jitted functions, and of those with their own derivative
    lines, first = inspect.getsourcelines(function)
    for number, line in enumerate(lines):
        if text in line:
            file = Path(inspect.getsourcefile(function) or "").relative_to(ROOT)
            return f"code:{file.as_posix()}#L{first + number}"
    raise ValueError(f"{function.__qualname__} has no line with {text!r}.")


@dataclasses.dataclass(frozen=True)
class Box:
    """A rectangle in a diagram, in pixels."""

    x: float
    y: float
    width: float
    height: float

    def at(self, side: Side, shift: float = 0.0) -> tuple[float, float]:
        """Returns the middle of a side, moved along it."""
        if side in ("top", "bottom"):
            return self.x + self.width / 2 + shift, self.y + (self.height if side == "bottom" else 0)
        return self.x + (self.width if side == "right" else 0), self.y + self.height / 2 + shift


class Diagram:
    """A picture of boxes, arrows and text. A notebook shows it as the value of a cell.

    Args:
        width, height: size in pixels; a page shows at most 720.
        description: what the picture shows, for readers who do not see it.
    """

    def __init__(self, width: float, height: float, description: str):
        self.width, self.height, self.description = width, height, description
        self._parts: list[str] = []

    def box(
        self,
        x: float,
        y: float,
        text: str,
        *,
        kind: str = "plain",
        code: str = "",
        link: str = "",
        width: float = 150,
        height: float | None = None,
    ) -> Box:
        """Adds a box and returns it.

        Args:
            x, y: its left upper corner.
            text: its name; a line end divides it.
            kind: key of `FILLS`.
            code: line of code below the name.
            link: target of a click, such as `code_line` returns.
            width: its width.
            height: its height; None fits the text.
        """
        names = text.split("\n")
        height = height or 14 + 17 * len(names) + (16 if code else 0)
        fill, stroke = FILLS[kind]
        rows = [(name, 'font-weight="600" font-size="13"') for name in names]
        if code:
            rows.append((code, f'font-family="monospace" font-size="11" fill="{SOURCE if link else GREY}"'))
        top = y + (height - 17 * len(rows)) / 2 + 13
        inner = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="5" fill="{fill}" stroke="{stroke}"/>'
        for number, (row, style) in enumerate(rows):
            place = f'x="{x + width / 2}" y="{top + 17 * number}"'
            inner += f'<text {place} text-anchor="middle" {style}>{escape(row)}</text>'
        self._parts.append(f'<a href="{link}">{inner}</a>' if link else inner)
        return Box(x, y, width, height)

    def frame(self, x: float, y: float, width: float, height: float, text: str) -> None:
        """Adds a dashed frame around boxes, with a text in its right upper corner. Add it before them."""
        self._parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="9" fill="none" stroke="{GREY}" '
            'stroke-dasharray="5 4"/>'
        )
        self.text(x + width - 8, y + 17, text, anchor="end", colour=GREY)

    def text(self, x: float, y: float, text: str, *, anchor: str = "middle", colour: str = INK, size: int = 12) -> None:
        """Adds text around a point. A white edge keeps lines behind it away."""
        self._parts.append(
            f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" fill="{colour}" paint-order="stroke" '
            f'stroke="white" stroke-width="4">{escape(text)}</text>'
        )

    def line(self, *points: tuple[float, float], colour: str = INK, width: float = 1.4, head: bool = True) -> None:
        """Adds an arrow through points; without its head it is a line."""
        path = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        end = f' marker-end="url(#head-{colour[1:]})"' if head else ""
        self._parts.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{end}/>')

    def arrow(
        self,
        start: tuple[float, float],
        end: tuple[float, float],
        text: str = "",
        *,
        via: tuple[tuple[float, float], ...] = (),
        colour: str = INK,
        width: float = 1.4,
        beside: tuple[float, float] = (7, 4),
        anchor: str = "start",
    ) -> None:
        """Adds an arrow with a text, such as the shape of what flows along it.

        Args:
            start, end: its ends.
            text: its text, beside the middle of its first part.
            via: corners between its ends.
            colour, width: of the line.
            beside: from that middle to the text.
            anchor: which end of the text is there: "start", "middle" or "end".
        """
        self.line(start, *via, end, colour=colour, width=width)
        if text:
            corner = via[0] if via else end
            x, y = (start[0] + corner[0]) / 2 + beside[0], (start[1] + corner[1]) / 2 + beside[1]
            self.text(x, y, text, anchor=anchor, colour=GREY)

    def _repr_html_(self) -> str:
        heads = "".join(
            f'<marker id="head-{colour[1:]}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="10" markerHeight="10" '
            'markerUnits="userSpaceOnUse" orient="auto-start-reverse">'
            f'<path d="M0 0 L10 5 L0 10 z" fill="{colour}"/></marker>'
            for colour in (INK, GREY, SOURCE, TARGET, ATTENTION)
        )
        return (
            f'<svg class="diagram" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" role="img" aria-label="{escape(self.description)}" '
            f'font-family="sans-serif" fill="{INK}"><defs>{heads}</defs>'
            f'<rect width="{self.width}" height="{self.height}" fill="white"/>{"".join(self._parts)}</svg>'
        )
