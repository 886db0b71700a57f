"""The pages of the guide have their parts, and their cells name what exists. The site's build runs them (.ci/run)."""

import ast
import importlib
import json
import re
from pathlib import Path

import pytest

from tests.test_prose import MOST_WORDS, num_words, sentences

GUIDE = Path(__file__).parent.parent / "docs" / "guide"
PAGES = sorted(path for path in GUIDE.glob("*.md") if path.stem != "index")
MODULES = sorted([*GUIDE.glob("*.py"), *(GUIDE / "results").glob("*.py")])
PARTS = ["Answer", "Experiment", "What would have refuted it"]


def cells(path: Path) -> list[str]:
    """The code of a page, without the tags of its cells."""
    found = re.findall(
        r"^```\{code-cell\} ipython3\n(.*?)^```$", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    return [re.sub(r"^:tags:.*\n", "", cell) for cell in found]


def name_of(path: Path) -> str:
    return str(path.relative_to(GUIDE))


def test_the_index_leads_to_each_chapter():
    _, tree = (GUIDE / "index.md").read_text("utf-8").split("```{toctree}")
    chapters = [line for line in tree.split("```")[0].splitlines() if re.fullmatch(r"\w+", line)]
    assert chapters == ["one_vector", "transformer", "training_by_hand", "beam_search", "questions"]
    assert sorted(chapters) == [path.stem for path in PAGES]


def test_each_question_has_its_parts():
    text = re.sub(r"^```.*?^```$", "", (GUIDE / "questions.md").read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    questions = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    assert [int(question.split(".")[0]) for question in questions] == list(range(1, 10))
    for question in questions:
        assert question.splitlines()[0].endswith("?")
        headings = re.split(r"^### (.+)$", question, flags=re.MULTILINE)
        assert headings[1::2] == PARTS
        assert all(len(part.split()) >= 10 for part in headings[2::2]), question.splitlines()[0]


@pytest.mark.parametrize("path", [*PAGES, *MODULES], ids=name_of)
def test_what_is_imported_exists(path):
    texts = cells(path) if path.suffix == ".md" else [path.read_text("utf-8")]
    assert texts
    nodes = [node for text in texts for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    for node in nodes:
        module = node.module or ""
        names = {alias.name for alias in node.names}
        if module.startswith("flax_transformer"):
            imported = importlib.import_module(module)
            assert all(hasattr(imported, name) for name in names), (module, names)
        for file in (GUIDE / f"{module}.py", GUIDE / "results" / f"{module}.py"):
            if file.exists():
                assert names <= top_level_names(file), (module, names)


def top_level_names(file: Path) -> set[str]:
    """The names that a module defines or imports, without running it."""
    found: set[str] = set()
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            found |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
    return found


def test_boxes_lead_to_lines_that_exist(monkeypatch):
    """A diagram is not drawn if a box names a line that its function does not have."""
    monkeypatch.syspath_prepend(str(GUIDE))
    for module, pictures in {
        "recurrent_diagrams": ["one_vector", "with_attention"],
        "transformer_diagrams": ["encoder", "decoder", "attention"],
    }.items():
        for picture in pictures:
            drawn = getattr(importlib.import_module(module), picture)()._repr_html_()
            linked = re.findall(r'href="code:([^#"]+)#L(\d+)"', drawn)
            assert len(linked) >= 4
            for file, line in linked:
                assert int(line) <= len((GUIDE.parent.parent / file).read_text("utf-8").splitlines())


@pytest.mark.parametrize("path", sorted((GUIDE / "results").glob("*.json")), ids=name_of)
def test_a_result_says_where_it_comes_from(path):
    record = json.loads(path.read_text("utf-8"))
    assert record.keys() == {"date", "machine", "versions", "command", "seeds", "note", "results"}
    assert record["command"].endswith(f"docs/guide/results/{path.stem}.py") and path.with_suffix(".py").exists()
    assert {run["seed"] for run in record["results"]} == set(record["seeds"])


@pytest.mark.parametrize("path", [*PAGES, GUIDE / "index.md"], ids=name_of)
def test_sentences_are_short(path):
    text = re.sub(r"\A---.*?^---$|^```.*?^```$", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    blocks = [
        " ".join(block.split()) for block in re.split(r"\n\s*\n|^\s*(?:[-*]|\d+\.) |^#+ ", text, flags=re.MULTILINE)
    ]
    long = [s for block in blocks for s in sentences(block) if num_words(s) > MOST_WORDS]
    assert not long
