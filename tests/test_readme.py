"""The README and the documents say what is there."""

import inspect
import re
import shlex
import shutil
from pathlib import Path
from typing import NoReturn

import pytest
import tyro
import yaml

from flax_transformer.cli import main as cli
from flax_transformer.cli import train
from flax_transformer.cli.process_group import take_flags
from flax_transformer.config.reading import from_dict, read_config, write_config
from flax_transformer.config.recipe import Config, DecodingConfig
from flax_transformer.inference.translation import EMPTY
from flax_transformer.inference.translator import Translator, changed
from flax_transformer.parallel.processes import ProcessGroup

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, file: str = "README.md") -> list[str]:
    """The fenced blocks of a language in a file, "" for those that name none."""
    text = (ROOT / file).read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def commands(file: str = "README.md") -> list[list[str]]:
    """The words of every command of ours in a file's blocks, from the program's name on."""
    lines = "".join(blocks("", file)).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        words = shlex.split(line, comments=True) if re.search(r"\.venv/bin/|^flax-transformer ", line) else []
        names = [i for i, word in enumerate(words) if word.endswith(("flax-transformer", "train.py"))]
        if names:
            end = next((i for i, word in enumerate(words) if word in "<>"), len(words))  # of redirected streams
            found.append([words[names[0]].removeprefix(".venv/bin/"), *words[names[0] + 1 : end]])
    return found


COMMANDS = commands()
OF_DECODING, OF_TRAINING = commands("docs/decoding.md"), commands("docs/training.md")
PAGES = (
    "docs/scale/README.md",
    "docs/guide/training_by_hand.md",
    "docs/interop.md",
    "docs/serving.md",
    "docs/reference/configuration.md",
)
ALL = [*COMMANDS, *OF_DECODING, *OF_TRAINING, *(words for page in PAGES for words in commands(page))]


class Parsed(Exception):
    """A command line has been understood; nothing is done."""


@pytest.fixture
def only_parsed(tmp_path, monkeypatch) -> None:
    """A folder with the recipes and runs that the README speaks of, and commands that end once they are understood."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copy(ROOT / "configs" / "multi30k_en_de.yaml", tmp_path / "my.yaml")
    recipe = read_config(tmp_path / "my.yaml")
    for run in ("number_words", "mine", "other", "opus", "two", "small"):
        (tmp_path / "runs" / run).mkdir(parents=True)
        write_config(recipe, tmp_path / "runs" / run / "config.yaml")
    monkeypatch.chdir(tmp_path)
    understand = tyro.cli

    def parse(*arguments, **settings) -> NoReturn:
        understand(*arguments, **settings)
        raise Parsed

    monkeypatch.setattr(tyro, "cli", parse)


@pytest.mark.parametrize("words", ALL, ids=map(" ".join, ALL))
def test_every_command_is_understood(words, only_parsed):
    program, *arguments = words
    flags, arguments = take_flags(arguments)
    ProcessGroup.parse(flags)
    with pytest.raises(Parsed):
        if program == "train.py":
            train.main(arguments, program, Path("configs/number_words.yaml"))
        else:
            cli.verb(arguments[0])(arguments[1:], f"flax-transformer {arguments[0]}")


def test_every_verb_but_prepare_has_its_command():
    verbs = {words[1] for words in COMMANDS if words[0] == "flax-transformer"}
    assert verbs == cli.VERBS.keys() - {"train", "prepare"}


@pytest.mark.parametrize("file", ["docs/data.md", "docs/training.md"])
def test_every_recipe_is_one_once_it_names_its_text(file):
    texts = blocks("yaml", file)
    assert texts
    named = {side: "text" for side in ("validation_source", "validation_target", "test_source", "test_target")}
    for text in texts:
        read = yaml.safe_load(text)
        from_dict(Config, read | ({"data": named | read["data"]} if "data" in read else {}))


def test_the_two_commands_set_everything_up():
    commands = re.findall(r"^python3 -m venv .*$", README, flags=re.MULTILINE)
    assert len(commands) == 2
    for command, end in zip(commands, ("train.py", "-m pytest"), strict=True):
        assert "pip install" in command and command.endswith(end)


def test_ci_runs_the_test_command_first():
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    steps = [line for line in lines if ("pytest" in line or "venv" in line) and not line.startswith("#")]
    assert "grep" in steps[0] and "README.md" in steps[0]


def test_it_can_be_skimmed():
    assert len(README.split()) <= 900


WRITTEN = ["README.md", "CHANGELOG.md", *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").rglob("*.md")))]
WRITTEN += [
    f"{folder}/{p.name}" for folder in ("configs", "benchmarks/results") for p in sorted((ROOT / folder).iterdir())
]


@pytest.mark.parametrize("file", WRITTEN)
def test_named_files_exist(file):
    path = ROOT / file
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"\]\(((?!http)[^)#]+)(?:#[^)]*)?\)", text):
        assert (path.parent / name).exists(), name
    for name in re.findall(r"configs/\w+\.yaml|(?<!:)benchmarks/results/[\w-]+\.md", text):  # not of a commit
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("file", sorted(str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")))
def test_each_test_that_a_table_names_is_there(file):
    there = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        there |= {path.stem, *re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)}
    rows = re.findall(r"^\|.*$", (ROOT / "docs" / file).read_text(encoding="utf-8"), flags=re.MULTILINE)
    named = set(re.findall(r"`(test_\w+)`", "\n".join(rows)))
    assert named <= there, named - there
    assert len(named) > {"decoding.md": 50, "training.md": 25, "scale/README.md": 8}.get(file, -1)


def test_the_python_of_decoding_is_understood(monkeypatch):
    """With a translator that checks what it is asked for and finds nothing."""
    signature, asked = inspect.signature(Translator.translate), []

    def translate(self, *sentences, **named):
        settings = signature.bind(self, *sentences, **named).arguments
        changed(DecodingConfig(), settings.get("changes", {}))
        asked.append(named)
        return [EMPTY] * len(*sentences)

    monkeypatch.setattr(Translator, "translate", translate)
    monkeypatch.setattr(Translator, "load", lambda *_, **__: object.__new__(Translator))
    exec("".join(blocks("python", "docs/decoding.md")), {})
    assert len(asked) >= 3 and len(OF_DECODING) >= 15
