"""The pages of the site do what they say: how-to pages are followed, quoted messages are in the source."""

import ast
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_readme import blocks, commands

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
HOW_TO = sorted(path.name for path in (DOCS / "how_to").glob("*.md"))
NEW_FILE = re.compile(r"# (flax_transformer/[\w/]+\.py)\n")


def copy_of_the_package(page: str, folder: Path) -> list[str]:
    """Does to a copy of the package what a page says. Returns the code that the page checks it by."""
    shutil.copytree(ROOT / "flax_transformer", folder / "flax_transformer", ignore=shutil.ignore_patterns("__pycache__"))
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
    wrong = [code.replace("class BagSeq2Seq", "class BagSeq2Seq(") for code in blocks("python", "docs/how_to/add_a_model.md")]
    monkeypatch.setattr(sys.modules[__name__], "blocks", lambda language, file: wrong if language == "python" else [])
    with pytest.raises(SyntaxError):
        test_what_a_page_adds_fits_the_package("add_a_model.md", tmp_path)
