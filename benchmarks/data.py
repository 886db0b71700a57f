"""Data: how fast batches are made, what large text takes, and how soon a training begins.

    python benchmarks/data.py loader [--config FILE] [--data FOLDER] [--rounds 5]
    python benchmarks/data.py large [--lines 10000000] [--steps 200] [--folder FOLDER]
    python benchmarks/data.py start [--config FILE] [--data FOLDER] [--rounds 3]

`pip install grain` gives the loader a peer.
"""

import dataclasses
import importlib
import importlib.util
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from harness import Benchmark, RecipeBenchmark, Report, run, spread, take_turns, user_environment

# --- The loader


@dataclass(frozen=True)
class Loader(RecipeBenchmark):
    """Making the batches of an epoch, without training, beside grain where it is installed.

    Each makes every batch of an epoch from the same tokenised pairs. Grain shuffles, looks pairs up and packs them
    first-fit into as many open rows. It does so in this process or in worker processes, of which each packs a share of
    the pairs; their start counts, once an epoch. Grain has no batches by length.
    """

    packages = ("numpy", "grain") if importlib.util.find_spec("grain") else ("numpy",)

    def measure(self, report: Report) -> None:
        """Adds a row for each loader."""
        from flax_transformer.data.batching import LengthSummary
        from flax_transformer.data.corpus import load_corpus
        from flax_transformer.data.packing import packed_shape
        from flax_transformer.data.preparation import prepare_tokenizers, prepare_training_pairs

        config = self.recipe()
        parts = load_corpus(config.data).train
        tokenizers = prepare_tokenizers(parts, config.tokenizer)
        limits = config.model.max_source_length, config.model.max_target_length
        (pairs, *_) = prepare_training_pairs(parts, tokenizers, config.filters, *limits)
        forms = {form: dataclasses.replace(config.batching, form=form) for form in ("bucketed", "packed")}
        loaders: dict[str, Any] = {form: Epochs(our_batches, pairs, batching) for form, batching in forms.items()}
        row = packed_shape(LengthSummary.of(pairs.lengths), forms["packed"])
        if "grain" in self.packages:
            importlib.import_module("absl.flags").FLAGS.mark_as_parsed()  # grain's workers ask for theirs
            loaders["packed by grain"] = Epochs(grain_batches, pairs, row, 0)
            loaders["packed by grain, 2 workers"] = Epochs(grain_batches, pairs, row, 2)
        seconds = take_turns(loaders, self.rounds)
        report.say(f"{len(pairs):,} pairs; packed rows {row}\n")
        report.table(
            ["loader", "target tokens/s", "padding"],
            (
                [name, spread([loader.target_tokens / value for value in seconds[name]], 0), f"{loader.padding:.1%}"]
                for name, loader in loaders.items()
            ),
        )


class Epochs:
    """A loader that makes one epoch in each call.

    Args:
        batches: (pairs, ..., epoch) -> for each batch its target tokens, and positions of both sides.
        pairs: tokenised.
        arguments: the others of `batches`.
    """

    def __init__(self, batches: Callable[..., Iterator[tuple[int, int]]], pairs: Any, *arguments: Any):
        self.batches, self.arguments, self.epochs = batches, (pairs, *arguments), itertools.count()
        self.pair_tokens = pairs.lengths.sum()
        self.target_tokens, self.padding = 0, 0.0

    def __call__(self) -> None:
        """Makes the batches of the next epoch."""
        sizes = np.array(list(self.batches(*self.arguments, next(self.epochs))))
        self.target_tokens, positions = sizes.sum(axis=0)
        self.padding = 1 - self.pair_tokens / positions


def our_batches(pairs: Any, batching: Any, epoch: int) -> Iterator[tuple[int, int]]:
    """Yields the sizes of an epoch's batches; planning the epoch is part of it."""
    from flax_transformer.data.batching import Position
    from flax_transformer.data.loader import training_batches, training_plan

    plan = training_plan([pairs], batching, seed=0)
    for batch, position in training_batches([pairs], plan, Position(epoch, 0)):
        yield int(np.count_nonzero(batch.target_segments)), batch.source_tokens.size + batch.target_tokens.size
        if position.epoch > epoch:
            return


def grain_batches(pairs: Any, shape: Any, workers: int, epoch: int) -> Iterator[tuple[int, int]]:
    """Yields the sizes of an epoch's packed batches, as grain makes them in so many processes beside this one."""
    from flax_transformer.data.packing import OPEN_ROWS

    grain: Any = importlib.import_module("grain")

    def look_up(index: int) -> dict[str, np.ndarray]:
        line = pairs.kept[index]
        sides = {"source": pairs.source, "target": pairs.target}
        return {name: np.asarray(s.ids[s.offsets[line] : s.offsets[line + 1]]) for name, s in sides.items()}

    dataset = grain.MapDataset.range(len(pairs)).shuffle(seed=epoch).map(look_up).to_iter_dataset()
    packed = grain.experimental.FirstFitPackIterDataset(
        dataset,
        length_struct={"source": shape.source_length, "target": shape.target_length},
        num_packing_bins=OPEN_ROWS,
        seed=epoch,
    )
    batches = packed.batch(shape.rows)
    if workers:
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    for batch in batches:
        yield int(np.count_nonzero(batch["target_segment_ids"])), batch["source"].size + batch["target"].size


# --- Large text


NUMBERS_A_LINE = 3
HELD_OUT = 200


@dataclass(frozen=True)
class Large(Benchmark):
    """Memory and time that large text takes, prepared and then trained on for some steps.

    The text is generated: three numbers below a thousand in words to a line, so that hardly a line occurs twice. The
    memory is the anonymous resident memory of each command (RssAnon of Linux), read every tenth of a second. The mapped
    cache does not count in it. A thousandth of the lines shows what model, programs and libraries need.

    Attributes:
        lines: sentence pairs.
        steps: updates.
        folder: where text and caches are put while it runs.
    """

    lines: int = 10_000_000
    steps: int = 200
    folder: Path = Path(tempfile.gettempdir())

    def measure(self, report: Report) -> None:
        """Adds a row for each command and size."""
        most = {}

        def rows(folder: Path) -> Iterator[list[str]]:
            generate(folder, "held_out", HELD_OUT, seed=1)
            for name, lines in {"small": max(self.lines // 1000, 1000), "large": self.lines}.items():
                generate(folder, name, lines, seed=2)
                config = write_recipe(folder, name, self.steps)
                for verb in ("prepare", "train"):
                    seconds, most[name, verb] = command_costs(verb, config, folder / f"cache_{name}")
                    yield [verb, f"{lines:,}", f"{seconds:.0f}", f"{most[name, verb] // 10**6:,}"]

        with tempfile.TemporaryDirectory(prefix="large_", dir=self.folder) as folder:
            report.table(["command", "lines", "s", "RssAnon at most, MB"], rows(Path(folder)))
        more = (most["large", "train"] - most["small", "train"]) / 1e9
        report.say(f"Training on the large text takes {more:.2f} GB more than on the small.")
        if more >= 2 or most["large", "prepare"] >= 2e9:
            raise SystemExit("the aim is less than 2 GB, of preparing as well as of training beyond the small text")


def generate(folder: Path, name: str, lines: int, seed: int) -> None:
    """Writes NAME.source and NAME.target."""
    from flax_transformer.data.synthetic import english_number_words, german_number_words

    words = {
        "source": np.array([english_number_words(n) for n in range(1000)], object),
        "target": np.array([german_number_words(n) for n in range(1000)], object),
    }
    rng = np.random.default_rng(seed)
    for start in range(0, lines, 100_000):
        numbers = rng.integers(0, 1000, (min(100_000, lines - start), NUMBERS_A_LINE))
        for side, of in words.items():
            with (folder / f"{name}.{side}").open("a", encoding="utf-8") as file:
                file.writelines(" ".join(line) + "\n" for line in of[numbers])


def write_recipe(folder: Path, name: str, steps: int) -> Path:
    """Writes a configuration, and returns its path."""
    parts = {"train": name, "validation": "held_out", "test": "held_out"}
    files = {f"{part}_{side}": f"{file}.{side}" for part, file in parts.items() for side in ("source", "target")}
    config = {
        "run": str(folder / f"run_{name}"),
        "data": {"kind": "parallel_text", "folder": str(folder), **files},
        "filters": {"drop_duplicates": True, "max_length_ratio": 9.0},
        "tokenizer": {"vocab_size": 200},
        "model": {"model_dim": 64, "feed_forward_dim": 128, "max_source_length": 64, "max_target_length": 64},
        "training": {"steps": steps, "evaluate_every_steps": steps, "checkpoint_every_steps": steps},
        "decoding": {"beam_size": 1},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def anonymous_bytes(process: int) -> int:
    """Returns RssAnon of a process, or 0 when it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)


def command_costs(verb: str, config: Path, cache: Path) -> tuple[float, int]:
    """Runs a verb, and returns its seconds and its most anonymous bytes."""
    started, most = time.monotonic(), 0
    command = [sys.executable, "-m", "flax_transformer.cli.main", verb, "--config", str(config)]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, env=user_environment(cache), stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None:
            most = max(most, anonymous_bytes(process.pid))
            time.sleep(0.1)
        said.seek(0)
        if process.returncode:
            raise SystemExit(f"{verb} failed:\n{said.read()}")
    return time.monotonic() - started, most


# --- The start


@dataclass(frozen=True)
class Start(RecipeBenchmark):
    """Seconds from the command to its first training step, with an empty cache folder and once more.

    Cold has nothing in the user's cache folder. Warm is the same command again: tokenizer, tokenised text and compiled
    programs are found there.
    """

    config: Path = Path("configs/number_words.yaml")
    rounds: int = 3

    def measure(self, report: Report) -> None:
        """Adds a row for each kind of start."""
        seconds: dict[str, list[float]] = {"cold": [], "warm": []}
        for _ in range(self.rounds):
            with tempfile.TemporaryDirectory(prefix="start_") as folder:
                for kind in seconds:
                    seconds[kind].append(self.seconds_to_first_step(Path(folder) / kind, Path(folder) / "cache"))
        report.table(["start", "s"], ([kind, spread(values)] for kind, values in seconds.items()))

    def seconds_to_first_step(self, run_folder: Path, cache: Path) -> float:
        """Starts a training of two steps with a line for each, and returns when the first line came."""
        command = [sys.executable, "-m", "flax_transformer.cli.main", "train", "--config", str(self.config)]
        command += ["--run", str(run_folder), "--training.steps", "2", "--training.log-every-steps", "1"]
        command += ["--data.folder", str(self.data)] if self.data else []
        environment = user_environment(cache) | {"PYTHONUNBUFFERED": "1"}
        started, said = time.monotonic(), []
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                said.append(line)
                if "] 1/2 " in line:
                    seconds = time.monotonic() - started
                    process.kill()
                    return seconds
        raise SystemExit(f"no first step:\n{''.join(said)}")


if __name__ == "__main__":
    run({"loader": Loader, "large": Large, "start": Start})
