"""plot: the curves of one or several runs, finished or not, as pictures."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from flax_transformer.errors import ConfigError, RunFolderError
from flax_transformer.object_storage import AnyPath, any_path, resolved
from flax_transformer.plots.curves import plot_curves, plot_together
from flax_transformer.plots.picture import missing_letters_note
from flax_transformer.run_folder import RunFolder
from flax_transformer.training.metrics_file import read_metrics


@dataclass(frozen=True)
class PlotOptions:
    """Draws the curves of runs: loss, accuracy, learning rate and BLEU. A run may still be in training.

    Several runs get a picture each, and one with all of them. `compare` needs finished runs, and draws their quality
    over time and by length.

    Example: flax-transformer plot runs/mine runs/other --output curves

    Attributes:
        runs: run folders.
        output: folder for the pictures; created if it does not exist.
    """

    runs: tyro.conf.Positional[tuple[str, ...]]
    output: Path = Path("curves")


def main(arguments: list[str], program: str) -> int:
    """Returns the exit code.

    Raises:
        InputError: no run folder, or a run without records.
    """
    options = tyro.cli(PlotOptions, args=arguments, prog=program)
    if not options.runs:
        raise ConfigError(f"give the folder of a run or more, such as {program} runs/mine.")
    runs = dict(zip(unique_names(options.runs), map(records_of, options.runs), strict=True))
    options.output.mkdir(parents=True, exist_ok=True)
    pictures = [plot_curves(records, options.output / f"{name}.png", name) for name, records in runs.items()]
    if len(runs) > 1:
        pictures.append(plot_together(runs, options.output / "together.png"))
    for picture in pictures:
        print(picture.path)
    if note := missing_letters_note(pictures):
        print(f"note: {note}", file=sys.stderr)
    return 0


def unique_names(runs: Sequence[str]) -> list[str]:
    """Returns a name for each run folder: that of the folder, with a number where two have the same."""
    names: list[str] = []
    for run in runs:
        name = first = resolved(any_path(run)).name or "run"
        number = 2
        while name in (*names, "together"):
            name, number = f"{first}-{number}", number + 1
        names.append(name)
    return names


def records_of(run: AnyPath | str) -> list[dict[str, Any]]:
    """Returns the records of a run.

    Raises:
        RunFolderError: there is no run, or it has no progress line yet.
    """
    folder = RunFolder.open(run)
    records = read_metrics(folder.metrics_file) if folder.metrics_file.exists() else []
    if not any(record["kind"] == "train" for record in records):
        raise RunFolderError(
            f"{run} has no curve: there is no progress line in {folder.metrics_file.name} yet. Wait for one "
            "(training.log_every_steps), or name a run that was trained: converted and averaged ones were not."
        )
    return records
