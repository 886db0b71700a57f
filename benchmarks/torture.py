"""Kills trainings and translations at random moments, and compares what they leave with undisturbed ones, bit by bit.

    python -m benchmarks.torture [--kills 100] [--translation-kills 20] [--seed 0] [--folder DIR]

A training is killed several times, resumed each time, and then left alone until its end. Its checkpoints must have the
arrays of the undisturbed training, its metrics.jsonl the same figures, and its translations the same text. Moments are
drawn from the phases in turn. Most signals are SIGKILL; SIGTERM and SIGHUP save the state first.
"""

import itertools
import json
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tyro
import yaml

from benchmarks.harness import machine
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
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGKILL, signal.SIGHUP)
KILLS_OF_A_RUN = 6

# What a clock measures is different in each training.
CLOCKED = {"elapsed_seconds", "seconds", "mfu", "flops_per_second"}


@dataclass(frozen=True)
class Options:
    """Kills commands at random moments.

    Attributes:
        kills: number of kills of trainings.
        translation_kills: number of kills of translations.
        seed: seed of the moments and the signals.
        folder: new folder for all runs; None makes one, and removes it at the end if all results are equal.
    """

    kills: int = 100
    translation_kills: int = 20
    seed: int = 0
    folder: Path | None = None


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
        print(f"  {signal.Signals(number).name} in {phase!r}", flush=True)

    @property
    def kills(self) -> int:
        """Number of kills."""
        return self.signals.total()


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


def check_stopped(code: int, number: int, log: Path) -> None:
    """Checks the exit code after a signal: that of the signal, or 3 if a training has saved its state."""
    saved = number != signal.SIGKILL and code == 3
    if not saved and code != -number or "Traceback" in log.read_text():
        raise SystemExit(f"exit code {code} after {signal.Signals(number).name}:\n{log.read_text()[-4_000:]}")


def torture(
    recipe: Path, run: Path, kills: Iterator[tuple[Moment, int]], tally: Tally, settings: dict[str, Any] | None = None
) -> bool:
    """Kills a training at each of some moments, lets it end, and returns whether all signals stop without a trace.

    Args:
        recipe: recipe of the training.
        run: its folder.
        kills: moments, counted from the present start, and signals.
        tally: tally of all kills.
        settings: settings of JAX.
    """
    log, exact = run.with_suffix(".log"), True
    for moment, number in kills:
        command = train(recipe, run, settings)
        if not command.kill_at(moment, number):
            break  # it has ended before
        check_stopped(command.wait(), number, log)
        tally.add(command, moment, number)
        exact = exact and number == signal.SIGKILL
    finish(train(recipe, run, settings), log)
    return exact


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


def moments(phases: tuple[str, ...], reference: Command, rng: random.Random) -> Iterator[Moment]:
    """Yields random moments without end, from the phases in turn.

    Args:
        phases: names of phases.
        reference: undisturbed command, which has the number of each phase and its durations.
        rng: source of randomness.
    """
    for phase in itertools.cycle(phases):
        seconds = reference.phases.seconds[phase]
        occurrence = rng.randint(1, min(len(seconds), 3 if phase != "step" else 9))
        yield Moment(phase, occurrence, rng.uniform(0.0, seconds[occurrence - 1]))


def kill_trainings(options: Options, folder: Path, rng: random.Random) -> Tally:
    """Kills trainings of all recipes in turn."""
    tally, recipes, references = Tally(), {}, {}
    signals = itertools.cycle(SIGNALS)
    for number in itertools.count():
        if tally.kills >= options.kills:
            return tally
        name = list(RECIPES)[number % len(RECIPES)]
        place = folder / name.replace(", ", "_").replace(" ", "_")
        if name not in recipes:
            place.mkdir(parents=True)
            recipes[name] = write_recipe(RECIPES[name], place)
            finish(train(recipes[name], place / "warm"), place / "warm.log")  # fills the caches
            references[name] = finish(train(recipes[name], place / "reference"), place / "reference.log")
        print(f"training {number + 1}: {name}", flush=True)
        run, before = place / f"run{number}", tally.kills
        drawn = moments(PHASES[before % len(PHASES) :] + PHASES[: before % len(PHASES)], references[name], rng)
        kills = itertools.islice(zip(drawn, signals, strict=False), min(KILLS_OF_A_RUN, options.kills - before))
        torture(recipes[name], run, kills, tally)
        if wrong := differences(place / "reference", run):
            raise SystemExit(f"{run} is not {place / 'reference'}:\n" + "\n".join(wrong))
        shutil.rmtree(run)
    raise AssertionError


def kill_translations(options: Options, folder: Path, rng: random.Random) -> Tally:
    """Kills `translate --output --resume`, by the reference run of the first recipe."""
    tally, run = Tally(), next(folder.glob("*/reference"))
    text = folder / "input.txt"
    pairs = number_words_corpus(NumberWordsConfig(400, 16, 16)).train[0].pairs()
    text.write_text("".join(f"{source}\n" for source, _ in pairs))
    settings = {"lines_at_once": 16}

    def translate(output: Path) -> Command:
        resume = ["--resume"] if output.with_name(f"{output.name}.partial").exists() else []
        arguments = ["translate", "--run", str(run), "--input", str(text), "--output", str(output), *resume]
        return Command(arguments, output.with_suffix(".log"), dict(settings))

    finish(translate(folder / "warm.txt"), folder / "warm.log")
    expected = folder / "expected.txt"
    reference = finish(translate(expected), expected.with_suffix(".log"))
    drawn, signals = moments(TRANSLATION_PHASES, reference, rng), itertools.cycle(SIGNALS)
    for number in itertools.count():
        if tally.kills >= options.translation_kills:
            return tally
        output = folder / f"output{number}.txt"
        print(f"translation {number + 1}", flush=True)
        for moment, kill in itertools.islice(zip(drawn, signals, strict=False), KILLS_OF_A_RUN):
            command = translate(output)
            if not command.kill_at(moment, kill):
                break
            check_stopped(command.wait(), kill, output.with_suffix(".log"))
            tally.add(command, moment, kill)
            if output.exists() or tally.kills >= options.translation_kills:
                break
        if not output.exists():
            finish(translate(output), output.with_suffix(".log"))
        if output.read_bytes() != expected.read_bytes():
            raise SystemExit(f"{output} is not {expected}")
    raise AssertionError


def main() -> None:
    """Prints each kill, and the numbers of all."""
    options = tyro.cli(Options)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="torture_"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{options}\n{machine('jax', 'flax', 'orbax-checkpoint')}\nfolder {folder}\n", flush=True)
    rng, started = random.Random(options.seed), time.monotonic()
    for what, kill in (("trainings", kill_trainings), ("translations", kill_translations)):
        before = time.monotonic()
        tally = kill(options, folder, rng)
        print(
            f"\n{tally.kills} kills of {what} in {time.monotonic() - before:.0f} s, all results equal\n"
            f"  by phase: {dict(tally.phases)}\n  by signal: {dict(tally.signals)}\n",
            flush=True,
        )
    print(f"{time.monotonic() - started:.0f} s in all")
    if options.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
