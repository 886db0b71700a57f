"""The pages of the site do what they say: how-to pages are followed, quoted messages are in the source."""

import ast
import dataclasses
import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import flax_transformer
from tests.small_run import command
from tests.test_prose import MOST_WORDS, num_words, sentences
from tests.test_readme import blocks, commands

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
HOW_TO = sorted(path.name for path in (DOCS / "how_to").glob("*.md"))
NEW_FILE = re.compile(r"# (flax_transformer/[\w/]+\.py)\n")


def copy_of_the_package(page: str, folder: Path) -> list[str]:
    """Does to a copy of the package what a page says. Returns the code that the page checks it by."""
    shutil.copytree(
        ROOT / "flax_transformer", folder / "flax_transformer", ignore=shutil.ignore_patterns("__pycache__")
    )
    checks = []
    for code in blocks("python", f"docs/how_to/{page}"):
        if named := NEW_FILE.match(code):
            path = folder / named[1]
            assert not path.exists(), f"{path} is there already"
            path.write_text(code[named.end() :], encoding="utf-8")
        else:
            checks.append(code)
    for change in blocks("diff", f"docs/how_to/{page}"):
        subprocess.run(["git", "apply", "-"], input=change.encode(), cwd=folder, check=True, env=outside_git(folder))
    return checks


def outside_git(folder: Path) -> dict[str, str]:
    return os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}


@pytest.mark.parametrize("page", HOW_TO)
def test_what_a_page_adds_fits_the_package(page, tmp_path):
    """New files are new, changes apply, and the style is that of the project."""
    checks = copy_of_the_package(page, tmp_path)
    assert checks and "assert" in "".join(checks)
    written = [named[1] for code in blocks("python", f"docs/how_to/{page}") if (named := NEW_FILE.match(code))]
    assert written or blocks("diff", f"docs/how_to/{page}")
    ruff = [str(Path(sys.executable).parent / "ruff"), "--config", str(ROOT / "pyproject.toml")]
    for path in [tmp_path / name for name in written]:
        ast.parse(path.read_text(encoding="utf-8"))
        subprocess.run([ruff[0], "check", "-q", *ruff[1:], str(path)], check=True)
        subprocess.run([ruff[0], "format", "-q", "--check", *ruff[1:], str(path)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("page", HOW_TO)
def test_a_page_that_is_followed_works(page, tmp_path):
    checks = copy_of_the_package(page, tmp_path)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(checks)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_page_that_is_wrong_is_noticed(tmp_path, monkeypatch):
    wrong = [
        code.replace("class BagSeq2Seq", "class BagSeq2Seq(") for code in blocks("python", "docs/how_to/add_a_model.md")
    ]
    monkeypatch.setattr(sys.modules[__name__], "blocks", lambda language, file: wrong if language == "python" else [])
    with pytest.raises(SyntaxError):
        test_what_a_page_adds_fits_the_package("add_a_model.md", tmp_path)


# --- pages whose code runs in this process


def run_page(page: str, folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    exec(compile("\n".join(blocks("python", page)), page, "exec"), {})


@pytest.mark.slow
def test_the_code_of_the_page_on_serving_runs(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "runs" / "number_words")
    run_page("docs/serving.md", tmp_path, monkeypatch)


@pytest.mark.parity
def test_the_page_on_marian_writes_what_transformers_reads(run, tmp_path, monkeypatch, capsys):
    to_hf = next(words for words in commands("docs/interop.md") if words[2] == "to-hf")
    shutil.copytree(run, tmp_path / "runs" / "mine")
    monkeypatch.chdir(tmp_path)
    assert command(*to_hf[1:]) == 0
    capsys.readouterr()
    run_page("docs/interop.md", tmp_path, monkeypatch)
    assert capsys.readouterr().out.startswith("[")


# --- messages


@functools.cache
def messages() -> str:
    """All texts of the package, one a line; what an f-string inserts is an ellipsis."""
    found = []
    for path in (ROOT / "flax_transformer").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def quoted() -> list[str]:
    """The messages that the FAQ quotes."""
    return [
        line.removeprefix("> ")
        for line in (DOCS / "faq.md").read_text(encoding="utf-8").splitlines()
        if line[:2] == "> "
    ]


def fixed_words(message: str) -> list[str]:
    """The parts of a message between its ellipses that have several words; it may consist of several texts."""
    return [part.strip() for part in re.split("…", message) if len(part.split()) > 1]


@pytest.mark.parametrize("message", quoted())
def test_each_message_of_the_faq_is_in_the_source(message):
    parts = fixed_words(message)
    assert parts and max(len(part.split()) for part in parts) >= 4
    missing = [part for part in parts if part not in messages()]
    assert not missing


def test_the_faq_has_an_answer_to_each_message():
    text = (DOCS / "faq.md").read_text(encoding="utf-8")
    entries = re.split(r"^### ", text, flags=re.MULTILINE)[1:]
    assert 15 <= len(entries) <= 30
    for entry in entries:
        question, message, answer = entry.strip().split("\n\n", 2)
        assert message.startswith("> ") and len(answer.split()) >= 12, question


# --- the words

OF_PROSE = [
    "CONTRIBUTING.md",
    *(f"docs/{name}.md" for name in ("faq", "interop", "serving")),
    *(f"docs/how_to/{name}" for name in HOW_TO),
    *(str(path.relative_to(ROOT)) for path in sorted((DOCS / "reference").rglob("*.md"))),
]


@pytest.mark.parametrize("page", OF_PROSE)
def test_sentences_are_short(page):
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for paragraph in re.split(r"\n\s*\n|\n(?=[-|#>]|\d\.)", re.sub(r"\]\([^)]*\)", "]", text)):
        for sentence in sentences(" ".join(paragraph.split()).lstrip("- ")):
            assert paragraph.startswith("|") or num_words(sentence) <= MOST_WORDS, sentence


# --- the entrance


def test_the_citation_has_what_its_schema_requires_and_the_version_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"authors", "cff-version", "message", "title"} <= citation.keys()
    assert citation["version"] == flax_transformer.__version__ and citation["license"] == "Apache-2.0"


def test_contributing_names_what_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in re.findall(r"\]\(((?!http)[^)#]+)(?:#[^)]*)?\)", text) + re.findall(r"`(tests/\w+\.py)`", text):
        assert (ROOT / name).exists(), name
    (test_command,) = re.findall(r"^python3 -m venv .*$", text, flags=re.MULTILINE)
    assert test_command in (ROOT / "README.md").read_text(encoding="utf-8")


# --- the site


def test_each_page_is_in_the_contents():
    """A page that no toctree names cannot be found."""
    named = set()
    for path in DOCS.rglob("*.md"):
        for tree in re.findall(r"```\{toctree\}\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL):
            for line in tree.splitlines():
                target = re.sub(r"^.*<(.*)>$", r"\1", line.strip())
                if target and not target.startswith(":"):
                    named.add(os.path.normpath(path.parent.relative_to(DOCS) / target))
    pages = {str(path.relative_to(DOCS).with_suffix("")) for path in DOCS.rglob("*.md")} - {"index"}
    assert pages == named


def test_the_configuration_page_has_every_field_and_says_what_it_means(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    import configuration_page

    text = configuration_page.tables()
    for section, cls in configuration_page.sections():
        for field in dataclasses.fields(cls):
            key = f"{section}.{field.name}" if section else field.name
            if not dataclasses.is_dataclass(getattr(cls(), field.name)):
                row = re.search(rf"^\| `{re.escape(key)}` \| (.+) \| (.+) \| (.+) \|$", text, flags=re.MULTILINE)
                assert row and len(row[3].split()) > 1, key
    assert len(re.findall(r"^## ", text, flags=re.MULTILINE)) >= 14
    assert "| `translate` | translate a file" in configuration_page.commands()
    assert "| `optimizer.beta2` | number | `0.98` | decay of the second moment" in text
