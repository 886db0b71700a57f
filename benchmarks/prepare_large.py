"""How much memory and time ten million lines take: prepared, then trained on for some steps.

    python benchmarks/prepare_large.py [--lines 10000000] [--steps 200] [--folder FOLDER]

The text is generated: three numbers below a thousand in words to a line, so that hardly a line occurs twice. The
commands run as a user runs them, in processes of their own, whose anonymous resident memory (RssAnon of Linux: what is
not backed by a file, so not the mapped cache) is read every tenth of a second. `train` is run on a thousandth of the
lines, too: what it needs there is the model, the programs and the libraries, not the text.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
import yaml

from flax_transformer.data.synthetic import english_number_words, german_number_words

NUMBERS_A_LINE = 3
HELD_OUT = 200


@dataclass(frozen=True)
class Options:
    """Measures memory and time of large corpora.

    Attributes:
        lines: sentence pairs.
        steps: updates.
        folder: where text and caches are put while it runs; about 3 GB for ten million lines.
    """

    lines: int = 10_000_000
    steps: int = 200
    folder: Path = Path(tempfile.gettempdir())


def generate(folder: Path, name: str, lines: int, seed: int) -> None:
    """Writes NAME.source and NAME.target."""
    english = np.array([english_number_words(n) for n in range(1000)], object)
    german = np.array([german_number_words(n) for n in range(1000)], object)
    rng = np.random.default_rng(seed)
    with (folder / f"{name}.source").open("w") as source, (folder / f"{name}.target").open("w") as target:
        for start in range(0, lines, 100_000):
            numbers = rng.integers(0, 1000, (min(100_000, lines - start), NUMBERS_A_LINE))
            for file, words in ((source, english), (target, german)):
                file.writelines(" ".join(line) + "\n" for line in words[numbers])


def recipe(folder: Path, name: str, steps: int) -> Path:
    """Writes a configuration, and returns its path."""
    config = {
        "run": str(folder / f"run_{name}"),
        "data": {
            "kind": "parallel_text",
            "folder": str(folder),
            "train_source": f"{name}.source",
            "train_target": f"{name}.target",
            **{
                f"{part}_{side}": f"held_out.{side}" for part in ("validation", "test") for side in ("source", "target")
            },
        },
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


def measured(verb: str, config: Path, cache: Path) -> tuple[float, int, str]:
    """Runs a verb, and returns its seconds, its most anonymous bytes, and what it said."""
    started, most = time.monotonic(), 0
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "flax_transformer.cli.main", verb, "--config", str(config)],
            env=os.environ | {"XDG_CACHE_HOME": str(cache)},
            stdout=said,
            stderr=subprocess.STDOUT,
        )
        while process.poll() is None:
            most = max(most, anonymous_bytes(process.pid))
            time.sleep(0.1)
        said.seek(0)
        text = said.read()
    if process.returncode:
        raise SystemExit(f"{verb} failed:\n{text}")
    return time.monotonic() - started, most, text


def main() -> None:
    """Generates, prepares, trains, and prints what each took."""
    options = tyro.cli(Options)
    folder = Path(tempfile.mkdtemp(prefix="prepare_large_", dir=options.folder))
    try:
        sizes = {"small": max(options.lines // 1000, 1000), "large": options.lines}
        generate(folder, "held_out", HELD_OUT, seed=1)
        results = {}
        for name, lines in sizes.items():
            generate(folder, name, lines, seed=2)
            config = recipe(folder, name, options.steps)
            for verb in ("prepare", "train"):
                seconds, most, said = measured(verb, config, folder / f"cache_{name}")
                results[name, verb] = most
                print(f"{verb} of {lines:,} lines: {seconds:.0f} s, RssAnon at most {most // 10**6:,} MB", flush=True)
                print("  " + said.strip().splitlines()[0], flush=True)
        more = (results["large", "train"] - results["small", "train"]) / 1e9
        print(f"training on the large text takes {more:.2f} GB more anonymous memory than on the small")
        if more >= 2 or results["large", "prepare"] >= 2e9:
            raise SystemExit("the aim is less than 2 GB, of preparing as well as of training beyond the small text")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
