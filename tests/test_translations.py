"""An edition in another language says what the English one says: the same parts, code, links and numbers.

A page that is edited in one language alone fails here, and the message names the lines of both pages.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parent.parent
CHINESE = {
    "README.md": "README.zh.md",
    "docs/tutorial.md": "docs/zh/tutorial.md",
    **{f"docs/guide/{p.name}": f"docs/zh/guide/{p.name}" for p in sorted((ROOT / "docs" / "guide").glob("*.md"))},
}
MOST_SIGNS = 75  # of a Chinese sentence
FRONT_MATTER = re.compile(r"\A---\n.*?^---\n", flags=re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
HAN, LATIN = r"[\u4e00-\u9fff]", r"[A-Za-z0-9]"
TYPOGRAPHY = {
    "no space between Chinese and Latin text": re.compile(f"{HAN}{LATIN}|{LATIN}{HAN}"),
    "punctuation of Latin text": re.compile(rf"{HAN} ?[,.;:?!](?!\w)|{HAN} ?\(|\) ?{HAN}"),
    "a space beside Chinese punctuation": re.compile(r" [，。；：？！、）”]|[，。；：？！、（“] "),
}


@dataclasses.dataclass(frozen=True)
class Part:
    """A heading, paragraph, list item's text, cell of a table or block of code.

    Attributes:
        line: where it begins in its file.
        kind: what it is, such as "h2", "paragraph in li" or "fence ```".
        text: the text of a reader, with the word "code" for inline code; the content of a block of code.
        facts: what does not depend on the language, by name.
    """

    line: int
    kind: str
    text: str
    facts: dict[str, Counter[str]]


def place(target: str, folder: Path) -> str:
    """Returns what a link leads to: a file of the repository by its English name, or an address as it is."""
    if re.match(r"https?:|#", target):
        return target
    path, *heading = target.split("#")
    name = (folder / path).resolve().relative_to(ROOT).as_posix()
    assert (ROOT / name).exists(), f"{target} is linked to and is not there"
    return "#".join([name, *heading])


def facts(inline: list[Token], folder: Path) -> dict[str, Counter[str]]:
    """Returns what a text has in every language."""
    return {
        "numbers": Counter(n for token in inline if token.type == "text" for n in NUMBER.findall(token.content)),
        "code": Counter(token.content for token in inline if token.type == "code_inline"),
        "links": Counter(place(str(t.attrs["href"]), folder) for t in inline if t.type == "link_open"),
        "images": Counter(place(str(token.attrs["src"]), folder) for token in inline if token.type == "image"),
        "emphasis": Counter(token.type for token in inline if token.type in ("strong_open", "em_open")),
    }


def parts(file: str) -> Iterator[Part]:
    """Yields the parts of a file in their order; the line that only leads to the other language is left out."""
    text = (ROOT / file).read_text(encoding="utf-8")
    front = FRONT_MATTER.match(text)
    above = front[0].count("\n") if front else 0
    folder = (ROOT / file).parent
    inside: list[str] = []
    row = 0
    for token in MarkdownIt("commonmark").enable("table").parse(text[front.end() if front else 0 :]):
        row = above + token.map[0] + 1 if token.map else row
        if token.nesting == 1:
            inside.append(token.tag)
        elif token.nesting == -1:
            inside.pop()
        elif token.type == "inline":
            inline = token.children or []
            read = "".join("code" if t.type == "code_inline" else t.content for t in inline if t.type != "image")
            if read not in ("English", "中文"):
                yield Part(row, " in ".join(reversed(inside)), read, facts(inline, folder))
        else:
            content = token.markup + token.info + "\n" + token.content
            yield Part(row, token.type, content, {"content": Counter([content])})


def in_chinese(part: Part) -> Part:
    """Returns a part of an English page with the links of the Chinese one."""
    if "links" not in part.facts:
        return part
    links = Counter({CHINESE.get(target, target): n for target, n in part.facts["links"].items()})
    return dataclasses.replace(part, facts=part.facts | {"links": links})


def differences(english: str, chinese: str) -> Iterator[str]:
    """Yields each fact that one page has and the other lacks; stops where the parts no longer match."""
    for mine, other in zip_longest(map(in_chinese, parts(english)), parts(chinese)):
        if mine is None or other is None or mine.kind != other.kind:
            here, there = (
                f"{file}:{part.line}: {part.kind} {part.text[:60]!r}" if part else f"{file}: the end"
                for file, part in ((english, mine), (chinese, other))
            )
            yield f"{here}\n  stands beside\n{there}"
            return
        for name in mine.facts:
            only = [(mine.facts[name] - other.facts[name]), (other.facts[name] - mine.facts[name])]
            for (file, line), found in zip(((english, mine.line), (chinese, other.line)), only, strict=True):
                if found:
                    yield f"{file}:{line}: only this page has the {name} {list(found.elements())}"


@pytest.mark.parametrize("english", CHINESE)
def test_both_editions_have_the_same_parts(english):
    assert not list(differences(english, CHINESE[english])), "\n" + "\n".join(differences(english, CHINESE[english]))


@pytest.mark.parametrize("english", CHINESE)
def test_a_chinese_page_leads_to_the_english_one(english):
    lines = (ROOT / CHINESE[english]).read_text(encoding="utf-8").splitlines()
    links = [match[1] for line in lines if (match := re.fullmatch(r"\[English\]\((.+)\)", line))]
    assert [place(link, (ROOT / CHINESE[english]).parent) for link in links] == [english]


def test_the_readme_leads_to_the_chinese_one():
    assert "\n[中文](README.zh.md)\n" in (ROOT / "README.md").read_text(encoding="utf-8")


def prose(file: str) -> Iterator[tuple[int, str]]:
    """Yields line and text of each part that is no code."""
    for part in parts(file):
        if "numbers" in part.facts:
            yield part.line, part.text


@pytest.mark.parametrize("file", [*CHINESE.values(), "docs/zh/index.md"])
def test_chinese_is_set_as_chinese(file):
    found = [
        f"{file}:{line}: {fault}: {text[max(match.start() - 10, 0) : match.end() + 10]}"
        for line, text in prose(file)
        for fault, pattern in TYPOGRAPHY.items()
        for match in pattern.finditer(text)
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("file", [*CHINESE.values(), "docs/zh/index.md"])
def test_chinese_sentences_are_short(file):
    """As tests/test_guide.py asks of the English ones; here signs are counted."""
    found = [
        f"{file}:{line}: {len(re.findall(HAN, sentence))} signs: {sentence}"
        for line, text in prose(file)
        for sentence in re.split(r"(?<=[。；：？！])", text)
        if len(re.findall(HAN, sentence)) > MOST_SIGNS
    ]
    assert not found, "\n" + "\n".join(found)


EDITS = {
    "a number": ("10,259", "10,258"),
    "a heading": ("## Train\n", "### Train\n"),
    "code": ('echo "Delete', 'echo "Remove'),
    "a row of the table": ("| the loss stands still", "\n| the loss stands still"),
    "inline code": ("`web.de`", "`web.text`"),
    "a paragraph": ("No pair of", "\n\nNo pair of"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_one_edition_is_named(edit, tmp_path, monkeypatch):
    page = "docs/tutorial.md"
    for file in (page, CHINESE[page]):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text((ROOT / file).read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr("tests.test_translations.ROOT", tmp_path)
    assert not list(differences(page, CHINESE[page]))
    before, after = EDITS[edit]
    text = (tmp_path / page).read_text(encoding="utf-8")
    assert before in text
    (tmp_path / page).write_text(text.replace(before, after, 1), encoding="utf-8")
    line = text[: text.index(before)].count("\n") + 1
    found = list(differences(page, CHINESE[page]))
    assert found and any(abs(int(n) - line) <= 2 for n in re.findall(rf"{page}:(\d+)", "\n".join(found))), found
