"""Seconds from the command to its first training step: cold, with nothing in the user's cache folder, and warm.

    python benchmarks/start.py [--config FILE] [--rounds 3]

The command runs as a user runs it, in a process of its own, until it has printed the first step; warm is the same
command again: tokenizer, tokenised text and compiled programs are found in the cache.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from paired import machine


@dataclass(frozen=True)
class Options:
    """Measures how long a training takes to begin.

    Attributes:
        config: recipe.
        rounds: pairs of a cold and a warm start.
    """

    config: Path = Path("configs/number_words.yaml")
    rounds: int = 3


def seconds_to_first_step(config: Path, run: Path, cache: Path) -> float:
    """Starts a training of two steps with a line for each, and returns when the first line came."""
    command = [sys.executable, "-m", "flax_transformer.cli.main", "train", "--config", str(config), "--run", str(run)]
    command += ["--training.steps", "2", "--training.log-every-steps", "1"]
    started = time.monotonic()
    with subprocess.Popen(
        command,
        env=os.environ | {"XDG_CACHE_HOME": str(cache), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if "] 1/2 " in line:
                seconds = time.monotonic() - started
                process.kill()
                return seconds
    raise SystemExit(f"no first step:\n{''.join(said)}")


def main() -> None:
    """Takes turns, cold then warm, and prints both."""
    options = tyro.cli(Options)
    print(f"{options}\n{machine('jax', 'flax')}\n")
    seconds: dict[str, list[float]] = {"cold": [], "warm": []}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory(prefix="start_") as folder:
            for kind in seconds:
                seconds[kind].append(seconds_to_first_step(options.config, Path(folder) / kind, Path(folder) / "cache"))
    for kind, values in seconds.items():
        print(f"{kind}: {statistics.median(values):.1f} s ({min(values):.1f} to {max(values):.1f})")


if __name__ == "__main__":
    main()
