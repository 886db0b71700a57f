"""A figure with text of any script, as a file.

Matplotlib shapes text by HarfBuzz: Arabic runs from right to left and joins its letters, and vowel signs of Devanagari
find their places. Each token of an axis is shaped by itself, so its ends do not join the letters of its neighbours.
"""

import io
import textwrap
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.text import Text

from flax_transformer.errors import shortened
from flax_transformer.object_storage import AnyPath
from flax_transformer.plots.fonts import FontChoice, choose_fonts
from flax_transformer.small_files import write_atomically

DPI = 110
COLUMNS_PER_INCH = 9  # narrow letters of a title's size
TITLE_LINES = 2  # of each text in a title
MOST_NAMED = 5  # letters in a note


@dataclass(frozen=True)
class Picture:
    """A picture that was written.

    Attributes:
        path: its file, a PNG or an SVG.
        missing: its letters that no installed font has.
    """

    path: AnyPath
    missing: str = ""


def literal(text: str, most_columns: int) -> str:
    """Returns a text as a picture shows it: with codes for characters that have no letter, and no longer than asked.

    Args:
        text: any text.
        most_columns: the room for it, as a number of narrow letters. A Chinese one takes two.
    """
    without = {"Cc", "Cs", "Co", "Cn", "Zl", "Zp"}  # control, surrogate, private, unassigned; separators of lines
    shown = "".join(f"<U+{ord(c):04X}>" if unicodedata.category(c) in without else c for c in text)
    return shortened(shown, int(most_columns / _columns_per_letter(shown)))


def set_title(figure: Figure, *texts: str) -> None:
    """Writes texts above a figure, each on lines of its own, which are as wide as the figure."""
    columns = int(COLUMNS_PER_INCH * figure.get_figwidth())
    lines = []
    for text in texts:
        shown = literal(text, TITLE_LINES * (columns - len("...")))
        lines += textwrap.wrap(shown, int(columns / _columns_per_letter(shown)))
    figure.suptitle("\n".join(lines), x=0.01, ha="left", parse_math=False)  # a sentence may hold dollar signs


def write_picture(figure: Figure, output: AnyPath) -> Picture:
    """Writes a figure as PNG; as SVG if no installed font has some of its letters.

    The SVG holds text as text, so that whatever shows it draws the letters by fonts of its own. A browser has fonts for
    nearly all scripts.

    Args:
        figure: what to write.
        output: the file of a PNG. An SVG gets the same name with the suffix .svg. The other file is removed.
    """
    choice = _set_fonts(figure)
    png, svg = output.with_suffix(".png"), output.with_suffix(".svg")
    if not choice.missing:
        _write(figure, png, "png", dpi=DPI)
        svg.unlink(missing_ok=True)
        return Picture(png)
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        _write(figure, svg, "svg")
    png.unlink(missing_ok=True)
    return Picture(svg, choice.missing)


def png_of(figure: Figure) -> bytes:
    """Returns a figure as a PNG. Letters that no installed font has are boxes."""
    _set_fonts(figure)
    return _drawn(figure, "png", dpi=DPI)


def _set_fonts(figure: Figure) -> FontChoice:
    """Gives the texts of a figure fonts that have their letters, and returns the choice."""
    texts = [text for text in figure.findobj(Text) if isinstance(text, Text)]
    choice = choose_fonts("".join(text.get_text() for text in texts))
    for text in texts:
        text.set_fontfamily(choice.families)
    return choice


def _write(figure: Figure, output: AnyPath, kind: str, **options: Any) -> None:
    write_atomically(output, _drawn(figure, kind, **options))


def _drawn(figure: Figure, kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)  # the user is told otherwise
        figure.savefig(content, format=kind, **options)
    return content.getvalue()


def missing_letters_note(pictures: Sequence[Picture]) -> str:
    """Returns what to tell a user of letters that no font of the machine has; "" if none is missing."""
    missing = sorted({letter for picture in pictures for letter in picture.missing})
    if not missing:
        return ""
    named = " ".join(missing[:MOST_NAMED]) + (" ..." if missing[MOST_NAMED:] else "")
    files = ", ".join(str(picture.path) for picture in pictures if picture.missing)
    return (
        f"no font of this machine has {len(missing)} of the letters to draw ({named}). Each of these pictures is an "
        f"SVG in place of a PNG, and a web browser shows it by fonts of its own: {files}. For a PNG, install a font "
        "with these letters (on Debian and Ubuntu fonts-noto-cjk has Chinese, Japanese and Korean ones, "
        "fonts-noto-core most others) and draw again, which --resume does for a run."
    )


def _columns_per_letter(text: str) -> float:
    """Returns the mean width of a text's letters, from 1 (narrow) to 2 (wide, such as Chinese)."""
    wide = sum(unicodedata.east_asian_width(letter) in ("W", "F") for letter in text)
    return 1 + wide / max(len(text), 1)
