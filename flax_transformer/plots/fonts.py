"""Fonts that have the letters of a text, among those that are installed."""

import contextlib
import functools
import unicodedata
from dataclasses import dataclass

import matplotlib
from matplotlib import font_manager
from matplotlib.font_manager import FontProperties
from matplotlib.ft2font import FaceFlags, FT2Font

# The end of a family's name where fonts draw Han characters in several national forms.
JAPANESE, KOREAN, SIMPLIFIED_CHINESE = "JP", "KR", "SC"


@dataclass(frozen=True)
class FontChoice:
    """Fonts for a text.

    Attributes:
        families: names of font families, for Matplotlib to look through in this order.
        missing: characters of the text that no installed font has, sorted.
    """

    families: list[str]
    missing: str


def choose_fonts(text: str) -> FontChoice:
    """Returns the families of Matplotlib's setting `font.family`, and as few more as have the other characters.

    Of families that have equally many, the national form of Han characters decides, then a plain design. Kana in the
    text ask for the Japanese form, Hangul for the Korean one. All other text gets the simplified Chinese one. Unifont,
    whose letters are made of few pixels, is taken for what nothing else has.
    """
    families = list(matplotlib.rcParams["font.family"])
    missing = set(filter(_is_drawn, text))
    for family in families:
        missing -= _covered(missing, font_manager.get_font(font_manager.findfont(FontProperties(family=[family]))))
    form = _national_form(text)
    covered = _coverage(missing) if missing else {}
    while missing and covered:
        best = max(covered, key=lambda family: _suitability(family, len(covered[family] & missing), form))
        if not covered[best] & missing:
            break
        missing -= covered[best]
        families.append(best)
    return FontChoice(families, "".join(sorted(missing)))


def _suitability(family: str, num_characters: int, form: str) -> tuple[int, ...]:
    """Returns how well a family suits a text of which it has some characters, to be compared."""
    pixels, has_form = family.startswith("Unifont"), family.endswith(form)
    return num_characters > 0, not pixels, num_characters, has_form, "Sans" in family, "Mono" not in family


def _is_drawn(character: str) -> bool:
    """Returns whether a character has a glyph. Spaces, ends of lines and marks of format need none."""
    category = unicodedata.category(character)
    selector = category == "Mn" and unicodedata.name(character, "").startswith("VARIATION SELECTOR")
    return category not in ("Cc", "Cf", "Zs", "Zl", "Zp") and not selector


def _national_form(text: str) -> str:
    names = [unicodedata.name(character, "") for character in set(text)]
    if any(name.startswith(("HIRAGANA", "KATAKANA")) for name in names):
        return JAPANESE
    return KOREAN if any(name.startswith("HANGUL") for name in names) else SIMPLIFIED_CHINESE


def _covered(characters: set[str], font: FT2Font) -> set[str]:
    return {c for c in characters if font.get_char_index(ord(c))}


def _coverage(characters: set[str]) -> dict[str, set[str]]:
    """Returns which of some characters each installed family can draw. Each font is open for a moment: there are many.

    Matplotlib does not paint colours. So letters of fonts of colours, such as emoji, may have no shape for it.
    """
    covered = {}
    for family, entry in _installed_fonts().items():
        with contextlib.suppress(OSError, RuntimeError):  # such as a font that was removed meanwhile
            font = FT2Font(entry.fname, face_index=entry.index)
            if FaceFlags.COLOR not in font.face_flags:
                covered[family] = _covered(characters, font)
    return covered


@functools.cache
def _installed_fonts() -> dict[str, font_manager.FontEntry]:
    """Returns the regular font of each installed family that has one.

    Matplotlib keeps a list of fonts on disk, which does not know what was installed later. So the machine is asked.
    Matplotlib's font of last resort is left out: its letters are boxes.
    """
    manager = font_manager.fontManager
    known = {entry.fname for entry in manager.ttflist}
    for path in font_manager.findSystemFonts():
        if path not in known:
            with contextlib.suppress(OSError, RuntimeError):  # damaged, or bitmaps (NotImplementedError)
                manager.addfont(path)
    fonts: dict[str, font_manager.FontEntry] = {}
    for entry in manager.ttflist:
        regular = (entry.weight, entry.style, entry.variant, entry.stretch) == (400, "normal", "normal", "normal")
        if regular and "lastresort" not in entry.name.replace(" ", "").lower():
            fonts.setdefault(entry.name, entry)
    return fonts
