"""init: look at a corpus, split it, and write a first recipe for it and for this machine."""

import contextlib
import math
import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

from flax_transformer.config.commented_recipe import CommentedRecipe
from flax_transformer.data.held_out import (
    PARTS,
    SIDES,
    check_new,
    choose_split,
    given_keys,
    new_folder,
    write_split,
)
from flax_transformer.data.parallel_text import ParallelFiles, ParallelTextConfig
from flax_transformer.data.text_files import text_suffix
from flax_transformer.data.text_survey import source_key, survey_pairs
from flax_transformer.errors import ConfigError, InputError
from flax_transformer.experiment.corpus_report import check_survey, split_text, survey_text, survey_warnings
from flax_transformer.experiment.recipe_choice import ChosenRecipe, choose_recipe
from flax_transformer.experiment.training_time import duration_text
from flax_transformer.parallel import processes
from flax_transformer.progress import tracked
from flax_transformer.small_files import write_atomically

MEASURING = (
    "compiling the training, to measure its time; this takes minutes, and the training will find the programs in the "
    "cache (--no-measure leaves it out)"
)


# Mean number of running programs for each core, in the last minute, from which on a machine counts as busy.
BUSY_LOAD = 2.0


@dataclass(frozen=True)
class InitOptions:
    """Looks at parallel text, and writes a first recipe for it and for this machine, with the reason of each choice.

    Validation and test text that is not named is taken out of the training text. The parts are then written to a folder
    beside the recipe, and the training part has no source of the others. If both are named, the training text stays as
    it is. A warning then counts its pairs with such a source.

    Example: flax-transformer init --train my.en my.de --output my.yaml

    Attributes:
        train: training text: a file of each language, line n of one translating line n of the other, or one .tsv or
            .jsonl file with both. Files may be compressed.
        output: the recipe to write, such as my.yaml.
        validation: validation text, in the same forms.
        test: test text, in the same forms.
        held_out: number of pairs to take out for validation text, and for test text. None is a twentieth of the
            training text, from 100 to 2,000 pairs.
        hours: longest training. If the steps that the corpus needs take longer on this machine, there are fewer.
        measure: whether to compile the recipe and to take some steps, for the time that a training will take.
        replace: whether to replace a recipe and a folder of text that are there.
        source_column: column of the source side in .tsv files, counted from 1.
        target_column: column of the target side in .tsv files, counted from 1.
        source_key: key of the source side in .jsonl files.
        target_key: key of the target side in .jsonl files.
    """

    train: tuple[Path, ...]
    output: Path
    validation: tuple[Path, ...] = ()
    test: tuple[Path, ...] = ()
    held_out: int | None = None
    hours: float = 8.0
    measure: bool = True
    replace: bool = False
    source_column: int = 1
    target_column: int = 2
    source_key: str = "source"
    target_key: str = "target"

    @property
    def format(self) -> ParallelTextConfig:
        """Columns and keys of the files."""
        return ParallelTextConfig(
            source_column=self.source_column,
            target_column=self.target_column,
            source_key=self.source_key,
            target_key=self.target_key,
        )

    @property
    def folder(self) -> Path:
        """Folder for the parts of the text."""
        return self.output.with_name(f"{self.output.stem}.text")

    @property
    def texts(self) -> tuple[Path, ...]:
        """All files to read."""
        return (*self.train, *self.validation, *self.test)

    def files(self, part: str) -> ParallelFiles | None:
        """Returns the files of a part, or None if it is not named.

        Raises:
            InputError: the files cannot be read, or more than two are named.
        """
        paths: tuple[Path, ...] = getattr(self, part)
        if not paths:
            return None
        if len(paths) > 2:
            raise InputError(f"--{part} takes a file of each language, or one .tsv or .jsonl file; got {len(paths)}.")
        files = ParallelFiles(paths[0], paths[-1], self.format)
        files.check(repeatedly=True)
        return files

    def check(self) -> None:
        """Raises an `InputError` if the output cannot be written or is text to read, or an option is out of range."""
        if self.output.is_dir():
            raise InputError(f"--output {self.output} is a folder. Name a file, such as {self.output / 'my.yaml'}.")
        if not self.output.parent.is_dir():
            raise InputError(f"--output {self.output}: there is no folder {self.output.parent}. Make it first.")
        if not os.access(self.output.parent, os.W_OK | os.X_OK):
            raise InputError(f"--output {self.output}: the folder {self.output.parent} cannot be written.")
        for path in self.texts:
            if self.output.is_file() and path.is_file() and path.samefile(self.output):
                raise InputError(f"--output {self.output} is the file {path} that is read, too. Choose another name.")
        check_new(self.output, self.replace)
        if self.held_out is not None and self.held_out < 1:
            raise ConfigError(f"--held-out must be at least 1, got {self.held_out}.")
        if not 0 < self.hours < math.inf:
            raise ConfigError(f"--hours must be a finite number above 0, got {self.hours}.")

    def check_folder(self) -> None:
        """Raises an `InputError` if the folder for the text cannot be made, or has text to read."""
        if self.folder == self.output:
            raise InputError(
                f"--output {self.output} has the name of the folder for the text. Choose another, such as "
                f"{self.output.with_suffix('.yaml')}."
            )
        check_new(self.folder, self.replace)
        for path in self.texts:
            if self.folder.resolve() in path.resolve().parents:
                raise InputError(
                    f"{path} is text to read, and --replace would remove its folder {self.folder}. Choose another "
                    "--output."
                )


@dataclass
class Texts:
    """The texts that a command line names.

    Attributes:
        options: the command line.
        parts: files of each part; None for a part that is not named.
        given: keys of the sources of named validation and test text.
        num_known: number of training pairs whose source is in `given`.
    """

    options: InitOptions
    parts: dict[str, ParallelFiles | None]
    given: frozenset[int]
    num_known: int = 0

    @classmethod
    def of(cls, options: InitOptions) -> "Texts":
        """Returns the texts. It raises the errors of `InitOptions.files`, and of validation and test text."""
        parts = {part: options.files(part) for part in PARTS}
        return cls(options, parts, given_keys(files.pairs() for files in (parts["validation"], parts["test"]) if files))

    @property
    def train(self) -> ParallelFiles:
        """The training text."""
        files = self.parts["train"]
        assert files is not None, "the command line cannot do without it"
        return files

    @property
    def missing(self) -> list[str]:
        """The parts that are taken out of the training text."""
        return [part for part in PARTS if self.parts[part] is None]

    def training_pairs(self, what: str) -> Iterator[tuple[str, str]]:
        """Yields the training pairs, and shows progress."""
        self.num_known = 0
        for source, target in tracked(self.train.pairs(), f"{what} {self.train.name}", unit="pairs"):
            self.num_known += bool(self.given) and source_key(source) in self.given
            yield source, target

    def add_to(self, recipe: CommentedRecipe, folder: Path | None) -> None:
        """Adds section `data`. `folder` has the parts that were written, or is None."""
        recipe.set("", data__kind="parallel_text")
        if folder is not None:
            recipe.set("the parts that init made of the text", data__folder=str(folder.absolute()))
        formats = set()
        for part in PARTS:
            files = self.parts[part]
            if files is None or (part == "train" and folder is not None):
                names = [f"{part}.{side}" for side in SIDES]
            else:
                names = [str(path.absolute()) for path in (files.source, files.target)]
                formats |= {text_suffix(files.source), text_suffix(files.target)}
            recipe.set("", **{f"data__{part}_{side}": name for side, name in zip(SIDES, names, strict=True)})
        for suffix, name in ((".tsv", "column"), (".jsonl", "key")):
            if suffix in formats:
                fields = {f"{side}_{name}": getattr(self.options, f"{side}_{name}") for side in SIDES}
                recipe.set("", **{f"data__{field}": value for field, value in fields.items()})


def main(arguments: list[str], program: str) -> int:
    """Returns the exit code.

    Raises:
        InputError: text that cannot be read or is too small, an output that is there or cannot be written, or an option
            out of range.
    """
    options = tyro.cli(InitOptions, args=arguments, prog=program)
    if not processes.is_first():
        return 0
    options.check()
    texts = Texts.of(options)
    if texts.missing:
        options.check_folder()
    survey = survey_pairs(texts.training_pairs("reading"))
    check_survey(survey, texts.train.name)
    print(f"{texts.train.name}: {survey_text(survey)}", flush=True)
    for warning in survey_warnings(survey):
        print(f"warning: {warning}", file=sys.stderr)

    recipe = CommentedRecipe(*_title(options, texts, f"{program} {shlex.join(arguments)}"))
    recipe.set("the folder that the training makes", run=f"runs/{options.output.stem}")
    with contextlib.ExitStack() as opened:
        split = choose_split(survey, texts.missing, options.held_out, texts.given)
        folder, num_pairs = None, survey.pairs.num_distinct
        if texts.missing:
            folder = opened.enter_context(new_folder(options.folder, options.replace))
            sizes = write_split(texts.training_pairs("splitting"), split, folder)
            print(split_text(sizes, str(options.folder)), flush=True)
            num_pairs = sizes.num_distinct(num_pairs)
        elif texts.num_known:
            print(_known_warning(texts.num_known), file=sys.stderr)
        texts.add_to(recipe, folder)
        if options.measure:
            print(MEASURING, file=sys.stderr, flush=True)
        chosen = choose_recipe(recipe, survey, num_pairs, options.hours, options.measure)
    texts.add_to(recipe, options.folder if texts.missing else None)
    write_atomically(options.output, recipe.text)
    print(_summary(options, texts, chosen))
    return 0


def is_busy() -> bool:
    """Returns whether more programs want to run than this machine has cores, besides this one's own threads."""
    cores = os.cpu_count() or 1
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > BUSY_LOAD * cores


def _title(options: InitOptions, texts: Texts, command: str) -> list[str]:
    return [
        f"A first recipe for {texts.train.name}. Every value can be changed; those that are not here have their "
        "defaults (flax-transformer train --help).",
        f"Written by: {command}",
        f"Train: flax-transformer train --config {shlex.quote(str(options.output))}",
    ]


def _known_warning(number: int) -> str:
    return (
        f"warning: {number:,} training pairs have a source that is in validation or test text, too. Scores of such "
        "sentences say little. Take them out of the training text, or let init split the text."
    )


def _summary(options: InitOptions, texts: Texts, chosen: ChosenRecipe) -> str:
    """Returns what was chosen, the time of a training, and the next commands."""
    config = chosen.recipe.config
    training, output = config.training, shlex.quote(str(options.output))
    lines = [
        f"\n{output}: {config.tokenizer.vocab_size:,} pieces, model {config.model.description}, "
        f"{training.steps:,} steps ({chosen.epochs:.1f} epochs) on {chosen.machine.text}"
    ]
    if (time := chosen.time) is not None:
        about, least, most = map(duration_text, time.total(training.steps, chosen.evaluations))
        lines.append(
            f"the training will take about {about} ({least} to {most}): {time.step:.2f} s a step, {chosen.evaluations} "
            f"evaluations of about {time.evaluation:.0f} s. This was measured by some steps on this machine, just now. "
            "Other work on it makes the training slower."
        )
        if is_busy():
            lines.append(
                "Other programs use this machine now, so that a training which has it for itself is faster than this."
            )
        if chosen.wanted_steps > training.steps:
            lines.append(
                f"That is what --hours {options.hours:g} allows. A corpus of this size usually takes "
                f"{chosen.wanted_steps:,} steps, which would be "
                f"{duration_text(time.total(chosen.wanted_steps, chosen.evaluations)[0])}."
            )
    run = shlex.quote(config.run)
    folder = options.folder if texts.missing else Path()
    names = [chosen.recipe[f"data.test_{side}"] for side in SIDES]
    test = [shlex.quote(os.path.relpath(Path(folder, name))) for name in names]
    lines += [
        "\nnext:",
        f"  flax-transformer train --config {output}",
        f"  flax-transformer evaluate --run {run} --source {test[0]} --reference {test[1]}",
        f"  flax-transformer translate --run {run} < FILE",
    ]
    if Path(config.run).exists():
        lines.append(f"  ({config.run} is there already: add --run FOLDER to train)")
    return "\n".join(lines)
