"""Every example in a docstring runs and prints what it says, and every public name has one."""

import ast
import doctest
import functools
import importlib
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_transformer

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "flax_transformer"
PAGES = sorted((ROOT / "docs" / "reference" / "api").glob("*.md"))
# Examples that train, load or compile a whole model.
SLOW = {
    "Translator",
    "Scorer",
    "Transformer",
    "RecurrentSeq2Seq",
    "TreeRecorder",
    "SteppedSearch",
    "run_experiment",
    "init_state",
    "batch_loss",
    "jit_train_step",
    "jit_evaluation_step",
    "compile_steps",
    "train_loop",
    "beam_search",
    "sample",
    "train_step",
    "as_json",
    "start",
    "advance",
    "finish",
    "is_running",
}


def examples(path: Path) -> list[str]:
    """The names of the objects of a file whose docstrings have examples, such as "ParameterInfo.matrix_axes"."""
    found = []

    def visit(node: Any, prefix: str) -> None:
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef):
                name = f"{prefix}{child.name}"
                if ">>>" in (ast.get_docstring(child) or ""):
                    found.append(name)
                if isinstance(child, ast.ClassDef):
                    visit(child, f"{name}.")

    visit(ast.parse(path.read_text(encoding="utf-8")), "")
    return found


EXAMPLES = [
    pytest.param(module, name, id=f"{module}:{name}", marks=[pytest.mark.slow] if name in SLOW else [])
    for path in sorted(PACKAGE.rglob("*.py"))
    for module in [".".join(path.relative_to(ROOT).with_suffix("").parts)]
    for name in examples(path)
]


def on_pages() -> dict[str, set[str]]:
    """The names that each module has on the pages of the API."""
    found: dict[str, set[str]] = {}
    for page in PAGES:
        module = ""
        for line in page.read_text(encoding="utf-8").splitlines():
            if named := re.fullmatch(r"\.\. currentmodule:: (\S+)", line):
                module = named[1]
            elif named := re.fullmatch(r"\.\. auto(?:class|function):: (\S+)", line):
                found.setdefault(module, set()).add(named[1])
    return found


def test_every_public_name_is_on_a_page_and_has_an_example():
    pages = on_pages()
    with_example = {tuple(param.values) for param in EXAMPLES}
    listed = {(module, name) for module, names in pages.items() for name in names}
    assert len(listed) > 80 and not listed - with_example, listed - with_example
    exported = {(f"flax_transformer.{home}", name) for name, home in flax_transformer._HOMES.items()}
    assert exported <= listed, exported - listed


def docstring(module: str, name: str) -> str:
    return functools.reduce(getattr, name.split("."), importlib.import_module(module)).__doc__ or ""


def run_example(module: str, name: str) -> doctest.TestResults:
    """Runs the examples of one docstring. Their names are those of the module, and the usual short ones."""
    home = importlib.import_module(module)
    names = {**vars(home), "jax": jax, "jnp": jnp, "np": np, "nnx": nnx}
    test = doctest.DocTestParser().get_doctest(docstring(module, name), names, name, home.__file__, 0)
    return doctest.DocTestRunner(optionflags=doctest.REPORT_ONLY_FIRST_FAILURE | doctest.ELLIPSIS).run(test)


@pytest.mark.parametrize("module, name", EXAMPLES)
def test_it_runs(module, name, tmp_path, monkeypatch, request):
    if 'load("runs/number_words"' in docstring(module, name):
        shutil.copytree(request.getfixturevalue("run"), tmp_path / "runs" / "number_words")
    monkeypatch.chdir(tmp_path)
    results = run_example(module, name)
    assert results.attempted and not results.failed


def test_an_example_that_is_wrong_fails(monkeypatch):
    from flax_transformer.ops import attention

    text = docstring("flax_transformer.ops.attention", "masked_softmax")
    monkeypatch.setattr(attention.masked_softmax, "__doc__", text.replace("0.5, 0.5", "0.5, 0.4"))
    assert run_example("flax_transformer.ops.attention", "masked_softmax").failed == 1


def raised(node: Any) -> set[str]:
    """The errors that a function, or the making of an object, raises in its own code."""
    bodies = [node]
    if isinstance(node, ast.ClassDef):
        bodies = [each for each in node.body if getattr(each, "name", "") in ("__init__", "__post_init__")]
    found = [each for body in bodies for each in ast.walk(body) if isinstance(each, ast.Raise)]
    return {
        each.exc.func.id for each in found if isinstance(each.exc, ast.Call) and isinstance(each.exc.func, ast.Name)
    }


def test_public_names_say_what_they_raise():
    for module, names in on_pages().items():
        path = ROOT / f"{module.replace('.', '/')}.py"
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name in names:
                text = ast.get_docstring(node) or ""
                assert not raised(node) or "Raises:" in text, f"{module}.{node.name} raises {raised(node)}"
