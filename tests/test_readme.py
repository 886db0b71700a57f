"""The README says what is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_two_commands_set_everything_up():
    commands = re.findall(r"^python3 -m venv .*$", README, flags=re.MULTILINE)
    assert len(commands) == 2
    for command, end in zip(commands, ("train.py", "-m pytest"), strict=True):
        assert "pip install" in command and command.endswith(end)


def test_ci_runs_the_test_command_first():
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    steps = [line for line in lines if ("pytest" in line or "venv" in line) and not line.startswith("#")]
    assert "grep" in steps[0] and "README.md" in steps[0]


def test_every_module_stands_in_the_file_tree():
    tree = README[README.index("## What is where") : README.index("## Limits")]
    for path in (ROOT / "flax_transformer").rglob("*.py"):
        if path.name != "__init__.py":
            assert re.search(rf"\b{path.stem}\b", tree), f"{path.name} is missing from the README's file tree"


def test_named_files_exist():
    for name in re.findall(r"\]\(((?!http)[^)#]+)\)", README) + re.findall(r"configs/\w+\.yaml", README):
        assert (ROOT / name).exists(), name
