"""Kills trainings and translations at random moments, and compares what they leave with undisturbed ones, bit by bit.

    python -m benchmarks.torture trainings [--kills 100] [--seed 0] [--folder DIR]
    python -m benchmarks.torture translations [--kills 20]

A training is killed several times, resumed each time, and then left alone until its end. Its checkpoints must have the
arrays of the undisturbed training, its metrics.jsonl the same figures, and its translations the same text. Moments are
drawn from the phases in turn. Most signals are SIGKILL; SIGTERM and SIGHUP save the state first.
"""

import abc
import itertools
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import yaml

from benchmarks import harness
from benchmarks.harness import Benchmark, Report
from flax_transformer.data.synthetic import NumberWordsConfig, number_words_corpus
from flax_transformer.training.metrics_file import read_metrics
from tests.faults.kills import Command, Moment

RECIPE = """
data: {kind: number_words, num_train: 400, num_validation: 16, num_test: 16}
tokenizer: {vocab_size: 60}
model: {model_dim: 16, num_heads: 2, feed_forward_dim: 32, num_encoder_layers: 1, num_decoder_layers: 1,
        max_source_length: 64, max_target_length: 48, dropout: 0.1}
batching: {tokens_per_batch: 640, num_buckets: 1}
optimizer: {warmup_steps: 10}
training: {steps: 24, log_every_steps: 4, evaluate_every_steps: 6, checkpoint_every_steps: 3, evaluate_sentences: 8}
decoding: {beam_size: 2, batch_size: 8, max_length_factor: 1.0, max_length_offset: 4}
evaluation: {bleu_tokenizer: char}
mesh: {data: 1}
"""
PACKED = {"packing": True, "row_length": 96, "tokens_per_batch": 1600}
RECIPES: dict[str, dict[str, Any]] = {
    "bucketed": {},
    "packed, accumulation": {"batching": PACKED | {"gradient_accumulation_steps": 2}},
    "several corpora, average": {"data": "files", "training": {"ema_decay": 0.9}},
    "packed, several corpora, average, accumulation": {
        "data": "files",
        "batching": PACKED | {"gradient_accumulation_steps": 2},
        "training": {"ema_decay": 0.9},
    },
}
PHASES = ("start", "step", "evaluation", "checkpoint write", "removal", "end")
TRANSLATION_PHASES = ("start", "translation", "write", "end")
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)
KILLS_OF_A_RUN = 6

# What a clock measures is different in each training.
CLOCKED = {"elapsed_seconds", "seconds", "mfu", "flops_per_second"}


@dataclass
class Tally:
    """Kills so far: by phase, and by signal."""

    phases: Counter[str] = field(default_factory=Counter)
    signals: Counter[str] = field(default_factory=Counter)

    def add(self, command: Command, moment: Moment, number: int) -> None:
        """Counts a kill, by the phase that was aimed at if it had not ended."""
        open_now = command.phases.open
        phase = moment.phase if moment.phase in open_now else next(reversed(open_now), "between phases")
        self.phases[phase] += 1
        self.signals[signal.Signals(number).name] += 1

    @property
    def kills(self) -> int:
        """Number of kills."""
        return self.signals.total()

    def tell(self, report: Report, seconds: float) -> None:
        """Adds the numbers to a report."""
        report.say(f"{self.kills} kills, {seconds / max(self.kills, 1):.1f} s each; all results are equal.\n")
        report.table(["phase", "kills"], sorted(self.phases.items()))
        report.table(["signal", "kills"], sorted(self.signals.items()))


def write_recipe(changes: dict[str, Any], folder: Path) -> Path:
    """Writes a recipe, and its corpora if there are several, and returns its path."""
    config = yaml.safe_load(RECIPE)
    for section, values in changes.items():
        if values == "files":
            config[section] = write_corpora(folder)
        else:
            config[section] |= values
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def write_corpora(folder: Path) -> dict[str, Any]:
    """Writes three corpora with weights, and returns section `data`."""
    corpus = number_words_corpus(NumberWordsConfig(400, 16, 16))
    pairs = list(corpus.train[0].pairs())
    parts = {
        "first": pairs[:200], "second": pairs[200:300], "third": pairs[300:],
        "validation": list(corpus.validation.pairs()), "test": list(corpus.test.pairs()),
    }  # fmt: skip
    for name, part in parts.items():
        for side, lines in zip(("source", "target"), zip(*part, strict=True), strict=True):
            (folder / f"{name}.{side}").write_text("".join(f"{line}\n" for line in lines))
    training = ["first", "second", "third"]
    data: dict[str, Any] = {"kind": "parallel_text", "folder": str(folder), "train_weights": [0.5, 1, 2]}
    for side in ("source", "target"):
        data[f"train_{side}"] = [f"{name}.{side}" for name in training]
        data |= {f"{name}_{side}": f"{name}.{side}" for name in ("validation", "test")}
    return data


class Reference(NamedTuple):
    """An undisturbed training: its recipe, its run folder, and the command that has its phases."""

    recipe: Path
    run: Path
    command: Command


def undisturbed(changes: dict[str, Any], folder: Path) -> Reference:
    """Trains by a recipe with some changes. A training before it fills the caches, so that its phases are typical."""
    folder.mkdir(parents=True)
    recipe = write_recipe(changes, folder)
    finish(train(recipe, folder / "warm"), folder / "warm.log")
    run = folder / "reference"
    return Reference(recipe, run, finish(train(recipe, run), run.with_suffix(".log")))


# --- one training


def train(recipe: Path, run: Path, settings: dict[str, Any] | None = None) -> Command:
    """Starts a training, or resumes it if the run has begun."""
    begun = (run / "config.yaml").exists()
    arguments = ["train", "--run", str(run), *(["--resume"] if begun else ["--config", str(recipe)])]
    return Command(arguments, run.with_suffix(".log"), settings)


def finish(command: Command, log: Path) -> Command:
    """Waits until a command has ended well."""
    if (code := command.wait()) != 0:
        raise SystemExit(f"exit code {code}:\n{log.read_text()[-4_000:]}")
    return command


def check_stopped(command: Command, number: int, log: Path) -> None:
    """Checks the exit code after a signal: that of the signal, or 3 if a training has saved its state."""
    code = command.wait()
    saved = number != signal.SIGKILL and code == 3
    if not saved and code != -number or "Traceback" in log.read_text():
        place = ", ".join(command.phases.open) or "no phase"
        raise SystemExit(
            f"exit code {code} after {signal.Signals(number).name} in {place}:\n{log.read_text()[-4_000:]}"
        )


def torture(
    recipe: Path, run: Path, kills: Iterator[tuple[Moment, int]], tally: Tally, settings: dict[str, Any] | None = None
) -> None:
    """Kills a training at each of some moments, and lets it end.

    Args:
        recipe: recipe of the training.
        run: its folder.
        kills: moments, counted from the present start, and signals.
        tally: tally of all kills.
        settings: settings of JAX.
    """
    log = run.with_suffix(".log")
    for moment, number in kills:
        command = train(recipe, run, settings)
        if not command.kill_at(moment, number):
            break  # it has ended before
        check_stopped(command, number, log)
        tally.add(command, moment, number)
    finish(train(recipe, run, settings), log)


# --- comparison


def arrays(run: Path) -> dict[str, np.ndarray]:
    """Returns all arrays of all checkpoints of a run, by step, part and path."""
    found = {}
    with ocp.StandardCheckpointer() as checkpointer:
        for part in sorted(run.glob("checkpoints/*/*")):
            if part.name in ("params", "trained", "optimizer"):
                leaves = jax.tree_util.tree_leaves_with_path(checkpointer.restore(part.resolve()))
                found |= {f"{part.parent.name}/{part.name}{jax.tree_util.keystr(p)}": np.asarray(a) for p, a in leaves}
    return found


def figures(record: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures of a record that no clock has measured, as text, so that NaN equals NaN."""
    return {k: repr(v) for k, v in record.items() if k not in CLOCKED and not k.endswith("_per_second")}


def different_metrics(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[str]:
    """Returns what is different in the metrics of two trainings.

    A signal that saves the state ends a window of progress. Such windows must have the same tokens together.
    """
    wrong = []
    for kind in ("validation", "train"):
        first = 0
        for record in (r for r in expected if r["kind"] == kind):
            window = [r for r in found if r["kind"] == kind and first < r["step"] <= record["step"]]
            first = record["step"]
            if len(window) == 1 or kind == "validation":
                same = [figures(r) for r in window] == [figures(record)]
            else:
                names = ("source_tokens", "target_tokens", "skipped")
                same = all(sum(r[name] for r in window) == record[name] for name in names)
            if not same:
                wrong.append(f"{kind} up to step {first}: expected {record}, got {window}")
    return wrong


def differences(expected: Path, found: Path) -> list[str]:
    """Returns what is different in two runs; an empty list if nothing is."""
    here, there = arrays(found), arrays(expected)
    wrong = [f"arrays of one alone: {sorted(here.keys() ^ there.keys())[:5]}"] if here.keys() != there.keys() else []
    wrong += [name for name in here.keys() & there.keys() if here[name].tobytes() != there[name].tobytes()]
    wrong += different_metrics(read_metrics(expected / "metrics.jsonl"), read_metrics(found / "metrics.jsonl"))
    cards = [json.loads((run / "run_card.json").read_text()) for run in (expected, found)]
    wrong += [name for name in ("test", "steps", "tested_step") if cards[0][name] != cards[1][name]]
    name = "samples/test.hypotheses.txt"
    wrong += [name] if (expected / name).read_bytes() != (found / name).read_bytes() else []
    return wrong + [f"left behind: {path}" for pattern in ("*.partial", "*orbax*tmp*") for path in found.rglob(pattern)]


# --- random moments


def random_kills(phases: tuple[str, ...], reference: Command, rng: random.Random) -> Iterator[tuple[Moment, int]]:
    """Yields random moments without end, from the phases in turn, each with a signal.

    Args:
        phases: names of phases.
        reference: undisturbed command, which has the number of each phase and its durations.
        rng: source of randomness.
    """
    for phase in itertools.cycle(phases):
        seconds = reference.phases.seconds[phase]
        occurrence = rng.randint(1, min(len(seconds), 3 if phase != "step" else 9))
        yield Moment(phase, occurrence, rng.uniform(0.0, seconds[occurrence - 1])), rng.choice(SIGNALS)


@dataclass(frozen=True)
class Torture(Benchmark):
    """Kills commands at random moments.

    Attributes:
        kills: number of kills.
        seed: seed of the moments.
        folder: new folder for all runs and caches; None makes one, and removes it if all results are equal.
    """

    packages: ClassVar[tuple[str, ...]] = ("jax", "flax", "orbax-checkpoint")

    kills: int = 100
    seed: int = 0
    folder: Path | None = None

    def measure(self, report: Report) -> None:
        """Kills, and reports the number of kills of each phase."""
        folder = self.folder or Path(tempfile.mkdtemp(prefix="torture_"))
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        started, tally = time.monotonic(), Tally()
        self.kill(folder, random.Random(self.seed), tally)
        tally.tell(report, time.monotonic() - started)
        if self.folder is None:
            shutil.rmtree(folder)

    @abc.abstractmethod
    def kill(self, folder: Path, rng: random.Random, tally: Tally) -> None:
        """Kills commands until there are `kills`."""


@dataclass(frozen=True)
class Trainings(Torture):
    """Trainings that are killed at random moments and resumed, beside undisturbed ones."""

    def kill(self, folder: Path, rng: random.Random, tally: Tally) -> None:
        """Kills trainings of all recipes in turn."""
        references: dict[str, Reference] = {}
        for number in itertools.count():
            if tally.kills >= self.kills:
                return
            name = list(RECIPES)[number % len(RECIPES)]
            if name not in references:
                references[name] = undisturbed(RECIPES[name], folder / str(number))
            recipe, reference, command = references[name]
            run, turn = reference.with_name(f"run{number}"), tally.kills % len(PHASES)
            kills = random_kills(PHASES[turn:] + PHASES[:turn], command, rng)
            torture(recipe, run, itertools.islice(kills, min(KILLS_OF_A_RUN, self.kills - tally.kills)), tally)
            if wrong := differences(reference, run):
                raise SystemExit(f"{run} is not {reference}:\n" + "\n".join(wrong))
            print(f"training {number + 1}, {name}: {tally.kills} kills so far", flush=True)
            shutil.rmtree(run)


@dataclass(frozen=True)
class Translations(Torture):
    """`translate --output --resume` that is killed at random moments, beside an undisturbed one."""

    kills: int = 20

    def kill(self, folder: Path, rng: random.Random, tally: Tally) -> None:
        """Kills translations of one text."""
        text, expected = folder / "input.txt", folder / "expected.txt"
        _, run, _ = undisturbed(RECIPES["bucketed"], folder / "run")
        pairs = number_words_corpus(NumberWordsConfig(400, 16, 16)).train[0].pairs()
        text.write_text("".join(f"{source}\n" for source, _ in pairs))
        finish(translate(run, text, folder / "warm.txt"), folder / "warm.log")
        reference = finish(translate(run, text, expected), expected.with_suffix(".log"))
        kills = random_kills(TRANSLATION_PHASES, reference, rng)
        for output in (folder / f"output{number}.txt" for number in itertools.count()):
            if tally.kills >= self.kills:
                return
            log = output.with_suffix(".log")
            while not output.exists() and tally.kills < self.kills:
                command, (moment, number) = translate(run, text, output), next(kills)
                if command.kill_at(moment, number):
                    check_stopped(command, number, log)
                    tally.add(command, moment, number)
            if not output.exists():
                finish(translate(run, text, output), log)
            if output.read_bytes() != expected.read_bytes():
                raise SystemExit(f"{output} is not {expected}")
            print(f"{output.name}: {tally.kills} kills so far", flush=True)


def translate(run: Path, text: Path, output: Path) -> Command:
    """Starts a translation, or resumes it if its output has begun."""
    resume = ["--resume"] if output.with_name(f"{output.name}.partial").exists() else []
    arguments = ["translate", "--run", str(run), "--input", str(text), "--output", str(output), *resume]
    return Command(arguments, output.with_suffix(".log"), {"lines_at_once": 16})


if __name__ == "__main__":
    harness.run({"trainings": Trainings, "translations": Translations})
