"""Whether two commits compute the same on this machine, to the bit.

    python benchmarks/same_results.py BEFORE AFTER [--data FOLDER] [--work FOLDER] [--time differing]

Each commit runs from its own files, by its commands alone, so the two may differ inside in any way. AFTER trains by the
complete configuration that BEFORE wrote into its run folder: no default can differ. These are compared:

    training: loss, gradient norm and learning rate of every step, validation, checksums of the state, tokenizer files.
    translation: bytes of n-best lists with scores of runs that BEFORE trained, in float32 and with 8-bit weights.
    export: bytes of the MarianMT folder of a run that BEFORE trained.
    programs: text that XLA made of the train step, the evaluation step and the search (commits/program_text.py).

If programs differ, `--time differing` runs training steps and translations of both commits in turns. It prints the 95 %
interval of the mean ratio of their times. An interval that excludes a loss of one twentieth is accepted.

The results of a commit are kept under WORK/HASH, so a baseline is computed once. Results that also depend on BEFORE
have its hash in their names.

Exit code 0 means that all results are equal. 1 means a difference or a failed command, and 2 wrong usage.
"""

import dataclasses
import itertools
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from commits.commit import Commit, Failed, check_out, kept
from commits.program_text import read_program
from commits.verdicts import (
    Verdict,
    checksums,
    compare_lines,
    compare_mappings,
    compare_programs,
    compare_records,
    contents,
    records,
)
from harness import Report, machine
from scipy import stats

from flax_transformer.data.text_files import iterate_lines
from flax_transformer.errors import InputError

STEPS = 50
LINES = 200  # of the test part, translated by every run
LEARNT = "number_words_learnt"  # a run that has learnt something, which both commits read
QUANTIZED = {"float32": "none", "int8": "int8"}
MOST_LOSS = 1.05  # of time, that an interval must exclude

# Recipe -> settings beside its own.
RECIPES: dict[str, list[str]] = {
    "number_words": [],
    LEARNT: ["--model.zero-start"],
    "multi30k_en_de_rnn_attention": [],
    "multi30k_en_de_tiny": [],
}

SMALLEST_PROGRAM = 300  # instructions; smaller ones move and fill arrays


@dataclass(frozen=True)
class Options:
    """Compares what two commits compute.

    Attributes:
        before: the commit that is right.
        after: the commit that must compute the same.
        data: the clone of multi30k/dataset, where one of its recipes is among the recipes.
        work: folder for what the commits compute; kept.
        recipes: which recipes are trained and translated with.
        step_programs: what BEFORE calls its train and evaluation steps; in AFTER they may be called otherwise.
        search_programs: what BEFORE calls its search.
        time: which recipes are timed: none, those whose programs differ, or all.
        pairs: of timings, in turns.
        output: file for the result, in Markdown; none is written when left out.
    """

    before: tyro.conf.Positional[str]
    after: tyro.conf.Positional[str]
    data: Path = Path("data/multi30k")
    work: Path = Path("runs/same_results")
    recipes: tuple[str, ...] = tuple(RECIPES)
    step_programs: tuple[str, ...] = ("jit_step",)
    search_programs: tuple[str, ...] = ("jit_search",)
    time: Literal["none", "differing", "all"] = "none"
    pairs: int = 20
    output: Path | None = None


# --- What is computed


def text_flags(options: Options, recipe: str) -> list[str]:
    """Returns the flags that name the files of a recipe's text, with a test part of `LINES` lines."""
    if recipe.startswith("number_words"):
        return ["--data.num-test", str(LINES)]
    tokenised = recipe == "multi30k_en_de_tiny"
    folder = options.data.resolve() / "data" / "task1" / ("tok" if tokenised else "raw")
    flags = ["--data.folder", str(folder)]
    for side, other, language in (("source", "de", "en"), ("target", "en", "de")):
        form = "{}.lc.norm.tok.{}" if tokenised else "{}.{}.gz"
        train = [form.format("train", each) for each in ((language, other) if tokenised else (language,))]
        flags += [f"--data.train-{side}", *train, f"--data.validation-{side}", form.format("val", language)]
        test = folder / form.format("test_2016_flickr", language)
        short = options.work.resolve() / "data" / test.name.removesuffix(".gz")
        if not short.exists():
            short.parent.mkdir(parents=True, exist_ok=True)
            lines = itertools.islice(iterate_lines(test), LINES)
            short.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        flags += [f"--data.test-{side}", str(short)]
    return flags


def intervals(steps: int, log_every: int = 1) -> list[str]:
    """Returns the flags for a training of so many steps, with one evaluation and one checkpoint at its end."""
    values = {"steps": steps, "log-every-steps": log_every, "evaluate-every-steps": steps, "evaluate-sentences": 64}
    values["checkpoint-every-steps"] = steps
    return [part for name, value in values.items() for part in (f"--training.{name}", str(value))]


def train(options: Options, commit: Commit, recipe: str, before: Commit | None = None) -> Path:
    """Returns the folder of a training: `run` and `programs`.

    Args:
        options: of the command line.
        commit: trains.
        recipe: name of a recipe.
        before: whose complete configuration is used; None takes the commit's own recipe.
    """
    steps = 6 * STEPS if recipe == LEARNT else STEPS
    if before is None:
        name = "number_words" if recipe == LEARNT else recipe
        flags = ["--config", f"configs/{name}.yaml", *RECIPES[recipe], *text_flags(options, recipe), *intervals(steps)]
    else:
        flags = ["--config", str(train(options, before, recipe) / "run" / "config.yaml")]

    def make(folder: Path) -> None:
        commit.command("train", *flags, "--run", folder / "run", dump=folder / "dump")
        keep_programs(folder)

    folder = commit.folder / (f"train-{recipe}" if before is None else f"train-{recipe}-by-{before.short}")
    return kept(folder, f"{commit.short} trains {recipe}", make)


def translate(options: Options, commit: Commit, recipe: str, weights: str, before: Commit) -> Path:
    """Returns the folder of a translation by a run that `before` trained: `n_best.jsonl` and `programs`."""
    run = train(options, before, recipe) / "run"

    def make(folder: Path) -> None:
        done = commit.command(
            "translate", "--run", run, "--input", run / "samples" / "test.sources.txt", "--json",
            "--num-hypotheses", "4", "--quantize", QUANTIZED[weights], dump=folder / "dump",
        )  # fmt: skip
        (folder / "n_best.jsonl").write_bytes(done.stdout)
        keep_programs(folder)

    folder = commit.folder / f"translate-{recipe}-{weights}-of-{before.short}"
    return kept(folder, f"{commit.short} translates by {recipe} of {before.short}, {weights}", make)


def export(options: Options, commit: Commit, before: Commit) -> Path:
    """Returns the folder of an export, `marian`, of a run that `before` trained."""
    run = train(options, before, LEARNT) / "run"

    def make(folder: Path) -> None:
        commit.command("convert", "to-hf", run, "--output", folder / "marian")

    folder = commit.folder / f"export-{LEARNT}-of-{before.short}"
    return kept(folder, f"{commit.short} exports {LEARNT} of {before.short}", make)


def keep_programs(folder: Path) -> None:
    """Keeps of a dump the optimised programs that are more than a few instructions."""
    programs = folder / "programs"
    programs.mkdir()
    for path in (folder / "dump").glob("*after_optimizations.txt"):
        if read_program(path).instructions.total() >= SMALLEST_PROGRAM:
            shutil.move(path, programs / path.name)
    shutil.rmtree(folder / "dump")


# --- What is compared


def compare_recipe(options: Options, recipe: str, before: Commit, after: Commit) -> Iterator[Verdict]:
    """Trains and translates by a recipe with both commits, and compares all that came out."""
    pairs = []
    if recipe != LEARNT:
        old, new = train(options, before, recipe), train(options, after, recipe, before)
        pairs.append((old, new))
        runs = old / "run", new / "run"
        yield from compare_records(recipe, runs)
        yield compare_mappings(recipe, "checksums of the state", checksums(runs[0]), checksums(runs[1]))
        yield compare_mappings(recipe, "tokenizer files", *(contents(run / "tokenizer") for run in runs))
        files = (runs[0] / "samples" / "test.hypotheses.txt", runs[1] / "samples" / "test.hypotheses.txt")
        yield compare_lines(recipe, "translations of the test part", files)
    for weights in QUANTIZED:
        old, new = (translate(options, commit, recipe, weights, before) for commit in (before, after))
        pairs.append((old, new))
        yield compare_lines(recipe, f"n-best lists, {weights}", (old / "n_best.jsonl", new / "n_best.jsonl"))
    if recipe == LEARNT:
        old, new = (export(options, commit, before) / "marian" for commit in (before, after))
        yield compare_mappings(recipe, "files of the MarianMT folder", contents(old), contents(new))
    trained = recipe != LEARNT
    yield from compare_programs(recipe, pairs, options.step_programs * trained + options.search_programs)


def judge(options: Options, recipe: str, before: Commit, after: Commit) -> list[Verdict]:
    """Returns all verdicts of a recipe; times, where they are asked for, decide where programs differ."""
    found: list[Verdict] = []
    try:
        for verdict in compare_recipe(options, recipe, before, after):
            found.append(verdict)
        unlike = [v for v in found if v.what.startswith("program") and v.equal is False]
        if options.time == "all" or options.time == "differing" and unlike:
            times = list(time_pairs(options, recipe, before, after))
            if all(v.equal for v in times):
                found = [dataclasses.replace(v, equal=None) if v in unlike else v for v in found]
            found += times
    except Failed as error:
        print(f"FAILED: {error}", file=sys.stderr)
        found.append(Verdict(recipe, "all that follows", False, "a command failed"))
    return found


# --- Timings


def training_seconds(options: Options, commit: Commit, recipe: str, before: Commit) -> float:
    """Returns the seconds of 30 training steps, after 10 to warm up."""
    config = train(options, before, recipe) / "run" / "config.yaml"
    run = commit.folder / "timed"
    shutil.rmtree(run, ignore_errors=True)
    commit.command("train", "--config", config, "--run", run, *intervals(40, 10), cached=True)
    return sum(record["seconds"] for record in records(run, "train", ("step", "seconds"))[1:])


def translation_seconds(options: Options, commit: Commit, recipe: str, before: Commit) -> float:
    """Returns the seconds a sentence of translating the test part ten times over."""
    run = train(options, before, recipe) / "run"
    text = commit.folder / "timed.txt"
    text.write_text(10 * (run / "samples" / "test.sources.txt").read_text(encoding="utf-8"), encoding="utf-8")
    said = commit.command("translate", "--run", run, "--input", text, cached=True).stderr.decode(errors="replace")
    found = re.search(r"([\d,.]+) sentences/s", said)
    if found is None:
        raise Failed(f"{commit.short}: translate said nothing of its speed:\n{said}")
    return 1 / float(found[1].replace(",", ""))


def time_pairs(options: Options, recipe: str, before: Commit, after: Commit) -> Iterator[Verdict]:
    """Times both commits in turns: the first of a pair is the second of the next."""
    for what, measure in (("training", training_seconds), ("translation", translation_seconds)):
        if what == "training" and recipe == LEARNT:
            continue
        commits, seconds = (before, after), np.zeros((options.pairs, 2))
        for commit in commits:
            measure(options, commit, recipe, before)  # fills the cache of compiled programs
        for number in range(options.pairs):
            for which in (0, 1) if number % 2 else (1, 0):
                seconds[number, which] = measure(options, commits[which], recipe, before)
        ratios = np.log(seconds[:, 1] / seconds[:, 0])
        half = float(stats.t.ppf(0.975, len(ratios) - 1)) * float(np.std(ratios, ddof=1)) / len(ratios) ** 0.5
        mean, low, high = (float(np.exp(np.mean(ratios) + d)) for d in (0.0, -half, half))
        detail = f"time {mean:.3f} of before, 95 % interval {low:.3f} to {high:.3f}, {options.pairs} pairs"
        yield Verdict(recipe, f"time of {what}", high < MOST_LOSS, detail)


# --- The result


def check_environment(options: Options) -> str:
    """Returns what results depend on beside the commit, the same as when the folder `work` was begun.

    Raises:
        SystemExit: it is not the same.
    """
    settings = {name: value for name, value in os.environ.items() if name.startswith(("JAX_", "GLIBC_"))}
    found = machine("jax", "jaxlib", "flax", "optax", "numpy", "sentencepiece")
    found += f", settings {settings}" * bool(settings)
    file = options.work / "environment.txt"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(found, encoding="utf-8")
    if (past := file.read_text(encoding="utf-8")) != found:
        print(
            f"error: {options.work} holds results of {past}, and this is {found}. Choose another --work.",
            file=sys.stderr,
        )
        raise SystemExit(2)
    return found


def main(arguments: list[str]) -> int:
    """Compares, prints a line for each verdict, and returns the exit code."""
    options = tyro.cli(Options, args=arguments)
    if unknown := set(options.recipes) - set(RECIPES):
        print(f"error: unknown recipes {sorted(unknown)}; known are {', '.join(RECIPES)}.", file=sys.stderr)
        return 2
    environment = check_environment(options)
    try:
        before, after = (check_out(commit, options.work) for commit in (options.before, options.after))
        for recipe in options.recipes:
            text_flags(options, recipe)  # which reads the text
    except (Failed, InputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report, verdicts = Report(options.output), []

    def rows() -> Iterator[tuple[str, ...]]:
        for recipe in options.recipes:
            for verdict in judge(options, recipe, before, after):
                verdicts.append(verdict)
                yield verdict.row

    report.head(f"{after.short} against {before.short}", environment)
    report.table(("recipe", "what", "verdict", "detail"), rows())
    wrong = sum(verdict.equal is False for verdict in verdicts)
    report.say(f"{len(verdicts)} verdicts, {wrong} different")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
