"""Pictures of what a run does, with text of any script."""

import dataclasses
import shutil
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from fontTools.colorLib.builder import buildCOLR, buildCPAL
from fontTools.ttLib import TTFont
from matplotlib import font_manager
from matplotlib.figure import Figure

from flax_transformer.inference.attention_map import AttentionMap
from flax_transformer.inference.comparison import read_runs
from flax_transformer.models.recurrent_config import RecurrentConfig
from flax_transformer.models.transformer_config import TransformerConfig
from flax_transformer.plots import fonts
from flax_transformer.plots.attention import plot_attention
from flax_transformer.plots.comparison import plot_bleu_by_length, plot_quality_over_time
from flax_transformer.plots.fonts import choose_fonts
from flax_transformer.plots.picture import literal, missing_letters_note, set_title
from tests.small_run import command
from tests.test_compare import REFERENCES, make_run

CIRCLED = "Ⓕ"  # of the fonts that come with Matplotlib STIXGeneral alone has it
CHINESE = "日本文字"  # they have none of it
DATA = Path(matplotlib.get_data_path())


@pytest.fixture
def few_fonts(monkeypatch):
    """A machine whose only fonts are those that come with Matplotlib."""
    own = [entry for entry in font_manager.fontManager.ttflist if Path(entry.fname).is_relative_to(DATA)]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    monkeypatch.setattr(font_manager, "findSystemFonts", list)
    fonts._installed_fonts.cache_clear()
    yield own
    fonts._installed_fonts.cache_clear()


def attention_of(source: list[str], target: list[str], layers: int = 1) -> AttentionMap:
    return AttentionMap(source, target, np.full((layers, 2, len(target), len(source)), 1 / len(source)))


def texts_of(svg: Path) -> list[str]:
    """All text of an SVG, which must be well-formed."""
    return [element.text or "" for element in ElementTree.parse(svg).iter() if element.tag.endswith("}text")]


def size_of(png: Path) -> tuple[int, int]:
    header = png.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    width, height = (int.from_bytes(header[at : at + 4]) for at in (16, 20))  # PNG, section 11.2.2
    return width, height


# --- fonts


def test_no_more_fonts_are_chosen_than_a_text_needs(few_fonts):
    default = matplotlib.rcParams["font.family"]
    assert choose_fonts("▁plain ⁇ Ελληνικά\n\u200d\U000e0100\u3000") == fonts.FontChoice(default, "")
    assert choose_fonts(f"a{CIRCLED}") == fonts.FontChoice([*default, "STIXGeneral"], "")
    choice = choose_fonts(f"a{CIRCLED}{CHINESE}")
    assert choice.missing == "".join(sorted(CHINESE))
    assert not any("Last" in family for family in choice.families)  # it has boxes for all characters


def test_a_font_that_was_installed_after_matplotlib_made_its_list_is_found(few_fonts, monkeypatch, tmp_path):
    stix = shutil.copy(DATA / "fonts" / "ttf" / "STIXGeneral.ttf", tmp_path)
    (tmp_path / "damaged.ttf").write_bytes(b"no font")
    few_fonts[:] = [entry for entry in few_fonts if "STIX" not in entry.name]
    assert choose_fonts(CIRCLED).missing == CIRCLED
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(tmp_path / "damaged.ttf"), stix])
    fonts._installed_fonts.cache_clear()
    assert choose_fonts(CIRCLED) == fonts.FontChoice([*matplotlib.rcParams["font.family"], "STIXGeneral"], "")


def test_a_font_that_was_removed_is_left_out(few_fonts):
    found = fonts._installed_fonts()
    found["STIXGeneral"] = dataclasses.replace(found["STIXGeneral"], fname="/nowhere/removed.ttf")
    assert choose_fonts(CIRCLED).missing == CIRCLED


def test_a_font_of_colours_is_left_out(few_fonts, tmp_path):
    """Its letters may have no outlines but layers, which Matplotlib does not paint."""
    font = TTFont(DATA / "fonts" / "ttf" / "STIXGeneral.ttf")
    font["COLR"], font["CPAL"] = buildCOLR({"A": [("B", 0)]}), buildCPAL([[(1.0, 0.0, 0.0, 1.0)]])
    font.save(tmp_path / "coloured.ttf")
    found = fonts._installed_fonts()
    found["STIXGeneral"] = dataclasses.replace(found["STIXGeneral"], fname=str(tmp_path / "coloured.ttf"))
    assert choose_fonts(CIRCLED).missing == CIRCLED


@pytest.mark.parametrize(
    "text, family",
    [("日本の", "Some Sans JP"), ("한국", "Some Sans KR"), ("中国", "Some Sans SC"), ("ไทย", "Unifont")],
)
def test_han_letters_are_drawn_in_the_form_of_their_language(monkeypatch, text, family):
    """All families have Chinese, Japanese and Korean; Unifont, of few pixels, has Thai, too."""
    everything = ["Unifont", "Some Serif JP", "Some Sans JP", "Some Sans KR", "Some Sans Mono SC", "Some Sans SC"]

    def coverage(characters):
        thai = {c for c in characters if "\u0e00" <= c < "\u0e80"}
        return {name: characters if name == "Unifont" else characters - thai for name in everything}

    monkeypatch.setattr(fonts, "_coverage", coverage)
    assert choose_fonts(text).families[1:] == [family]


# --- text


def test_characters_without_a_letter_are_named_by_their_codes():
    assert (
        literal("a\x07\tb\nc\ue000\ufdd0\u2028\ud800", 99)
        == "a<U+0007><U+0009>b<U+000A>c<U+E000><U+FDD0><U+2028><U+D800>"
    )
    assert literal("▁न\u094d\u200d⁇<unk>", 99) == "▁न\u094d\u200d⁇<unk>"


def test_text_is_shortened_to_its_room_in_which_chinese_letters_take_two_columns():
    assert literal("x" * 20, 20) == "x" * 20 and literal("x" * 21, 20) == "x" * 20 + "..."
    assert literal("猫" * 10, 20) == "猫" * 10 and literal("猫" * 11, 20) == "猫" * 10 + "..."


@pytest.mark.parametrize("sentence", ["a long sentence " * 40, "長い文" * 120, "x" * 600])
def test_a_title_is_no_wider_than_its_figure(few_fonts, sentence):
    figure = Figure(figsize=(4, 3))
    set_title(figure, sentence, "and its translation")
    lines = figure.get_suptitle().split("\n")
    assert len(lines) == 3 and lines[1].endswith("...") and lines[2] == "and its translation"
    assert max(map(len, lines)) <= 36


# --- pictures


def test_the_picture_of_a_long_sentence_is_no_larger_than_a_screen_or_two(tmp_path):
    """With all its 400 tokens named it would take minutes and gigabytes."""
    tokens = [f"t{number}" for number in range(400)]
    plot_attention(attention_of(tokens, tokens), tmp_path / "long.png", "long")
    width, height = size_of(tmp_path / "long.png")
    assert 1500 < width < 2200 and 1500 < height < 2200


def test_letters_of_another_font_are_drawn_without_a_warning(few_fonts, tmp_path):
    """Matplotlib would warn of each letter that it draws as a box, and here a warning is an error."""
    picture = plot_attention(attention_of(["▁a", CIRCLED], [CIRCLED]), tmp_path / "a.png", CIRCLED)
    assert (picture.path, picture.missing) == (tmp_path / "a.png", "")
    assert size_of(picture.path) > (300, 300)
    assert missing_letters_note([picture]) == ""


def test_a_picture_with_letters_that_no_font_has_is_an_svg_that_holds_them_as_text(few_fonts, tmp_path):
    (tmp_path / "a.png").write_text("of another run")
    picture = plot_attention(attention_of(list(CHINESE), ["a", "</s>"], 2), tmp_path / "a.png", f"{CHINESE}\na")
    assert picture.path == tmp_path / "a.svg" and not (tmp_path / "a.png").exists()
    texts = texts_of(picture.path)
    assert texts.count(CHINESE) == 1 and all(texts.count(letter) == 2 for letter in CHINESE)
    assert texts.count("</s>") == 2
    note = missing_letters_note([picture, picture])
    assert note.startswith("no font of this machine has 4 of the letters to draw (字 文 日 本).")
    assert f"{tmp_path / 'a.svg'}" in note and "fonts-noto-cjk" in note
    plot_attention(attention_of(["a"], ["b"]), tmp_path / "a.png", "a")
    assert not picture.path.exists() and size_of(tmp_path / "a.png")


def test_nothing_that_a_token_may_be_breaks_a_picture(few_fonts, tmp_path):
    """Neither markup of Matplotlib and XML, nor control characters, emoji and marks without a base, nor long tokens."""
    source = ["$\\frac{$", "$", "\\alpha", "_under", "a\nb", "\t", "\x00", "\ue000", "", "x" * 3000]
    target = [
        "$x^{$",
        "\u0301",
        "🚀",
        "👩\u200d🚀",
        "\u200d",
        "&amp;",
        "<unk>",
        "⁇",
        "]]>",
        "長" * 3000,
        "مرحبا",
        "\ufffe",
    ]
    title = "$\\frac{ & <b>$\n🚀"
    picture = plot_attention(attention_of(source, target, 2), tmp_path / "odd.png", title)
    assert set(picture.missing) == set("🚀👩長")
    texts = texts_of(picture.path)
    for literally in ("$\\frac{$", "$x^{$", "_under", "a<U+000A>b", "<U+0000>", "&amp;", "👩\u200d🚀", "<U+FFFE>"):
        assert texts.count(literally) == 2  # once a layer
    assert title.split("\n")[0] in texts
    assert max(map(len, texts)) < 40
    few = [token for token in target if not set(token) & set(picture.missing)]
    assert size_of(plot_attention(attention_of(source, few, 2), tmp_path / "odd.png", "$x_{$").path)


def test_runs_of_any_name_are_in_the_legend(few_fonts, tmp_path):
    """Matplotlib hides what begins with "_", and reads what stands between dollar signs as a formula."""
    names = [f"_{CHINESE}", "$\\frac{$"]
    models = [RecurrentConfig(attention="none"), TransformerConfig()]
    paths = [make_run(tmp_path / n, m, [10.0, 20.0], REFERENCES) for n, m in zip(names, models, strict=True)]
    runs = read_runs(paths)
    for plot in (plot_quality_over_time, plot_bleu_by_length):
        picture = plot(runs, tmp_path / "runs.png")
        assert {f"{run.name}: {run.model}" for run in runs} <= set(texts_of(picture.path))


def test_a_run_tells_once_of_the_letters_that_no_font_has(few_fonts, run, tmp_path, capsys):
    """Here a run that has ended, which is tested and drawn once more."""
    folder = tmp_path / CHINESE
    shutil.copytree(run, folder)
    assert command("train", "--config", str(run / "config.yaml"), "--run", str(folder), "--resume") == 0
    captured = capsys.readouterr()
    assert captured.out.replace("\n", " ").count("note: no font of this machine has 4 of the letters") == 1
    assert "Glyph" not in captured.out + captured.err
    assert {file.name for file in (folder / "plots").iterdir()} == {"curves.svg", "attention.png"}
    assert f"training of {folder}" in texts_of(folder / "plots" / "curves.svg")
