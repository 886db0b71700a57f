"""Docstrings and comments can be skimmed: short sentences, no measurements, and citations that lead somewhere."""

import ast
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MOST_WORDS = 25
FILES = sorted(path for folder in ("flax_transformer", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
FILES.append(ROOT / "train.py")

FORMULA = re.compile(r"^\s{4,}.*(=|->|\|)")  # an indented line of a formula or a drawing
FIELD = re.compile(r"^\s*[*\w, ]{1,60}: ")  # "name: " at the beginning of an argument
MEASUREMENT = re.compile(
    r"\b(?!95 %)\d[\d,.]*\s?"
    r"(%|ms\b|us\b|seconds?\b|minutes?\b|hours?\b|times (as|the|faster|slower)|MB\b|GB\b|BLEU\b|tok/s)"
)


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yields line and text of each docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node):
                yield node.body[0].lineno, text


def comments(path: Path) -> Iterator[tuple[int, str]]:
    """Yields line and text of each comment; lines of comment that follow one another are one."""
    first, last, lines = 0, -1, []
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type != tokenize.COMMENT:
                continue
            row, text = token.start[0], token.string.lstrip("#!: ")
            if row != last + 1 or token.line.strip() != token.string:
                if lines:
                    yield first, " ".join(lines)
                first, lines = row, []
            lines.append(text)
            last = row
    if lines:
        yield first, " ".join(lines)


def paragraphs(docstring: str) -> Iterator[str]:
    """Yields the running text of a docstring: no references, examples or formulas; each argument by itself."""
    part: list[str] = []
    skipping = False
    for line in docstring.splitlines():
        title = re.match(r"^(\s*)(References|Example|Legend|Usage)\b.*:?", line)
        if not line.strip() or title or FIELD.match(line) or FORMULA.match(line):
            if part:
                yield " ".join(part)
            part = []
        if title:
            skipping = True
        elif skipping and line.strip() and not line.startswith(" "):
            skipping = False
        if skipping or not line.strip() or FORMULA.match(line) and not FIELD.match(line):
            continue
        part.append(FIELD.sub("", line).strip())
    if part:
        yield " ".join(part)


def sentences(text: str) -> Iterator[str]:
    """Yields the sentences of a text."""
    text = re.sub(r"``?[^`]+``?", "code", text)
    yield from re.split(r"(?<=[.!?])[\"')]?\s+(?=[A-Z\"'`(\d])", text)


def num_words(sentence: str) -> int:
    """Returns the number of words; signs and numbers in brackets are none."""
    return sum(bool(re.search("[A-Za-z]", word)) for word in sentence.split())


def faults(path: Path) -> list[str]:
    """Returns what is wrong with the prose of a file."""
    found = []
    texts = [(row, part) for row, text in docstrings(ast.parse(path.read_text())) for part in paragraphs(text)]
    texts += [(row, text) for row, text in comments(path) if not text.startswith(("type: ", "noqa", "fmt: "))]
    for row, text in texts:
        for sentence in sentences(text):
            if num_words(sentence) > MOST_WORDS:
                found.append(f"{path.relative_to(ROOT)}:{row}: {num_words(sentence)} words: {sentence}")
        if MEASUREMENT.search(text):
            found.append(f"{path.relative_to(ROOT)}:{row}: a measurement: {text}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sentences_are_short_and_hold_no_measurement(path):
    assert not faults(path)


def test_what_is_cited_of_the_lab_book_is_a_heading():
    headings = re.findall(r"^#+ (.+)$", (ROOT / "docs/lab_book.md").read_text(), flags=re.MULTILINE)
    cited = set()
    for path in FILES:
        text = re.sub(r"\s*\n\s*#?\s*", " ", path.read_text())
        cited |= set(re.findall(r'docs/lab_book\.md, "([^"]+)"', text))
        assert len(re.findall(r"lab_book", text)) == len(re.findall(r'docs/lab_book\.md, "', text)), path
    assert cited and cited <= set(headings), cited - set(headings)
