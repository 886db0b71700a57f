"""compare: a table and two pictures of finished runs."""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from flax_transformer.inference.comparison import common_quality, comparison_table, read_runs
from flax_transformer.plots.comparison import plot_bleu_by_length, plot_quality_over_time
from flax_transformer.plots.picture import missing_letters_note


@dataclass(frozen=True)
class CompareOptions:
    """Prints a table of finished runs of one corpus, and draws quality over time and BLEU by source length.

    Example: flax-transformer compare runs/mine runs/other --output comparison

    Attributes:
        runs: run folders.
        output: folder for comparison.md, quality_over_time.png and bleu_by_length.png; created if it does not exist.
            A picture is an SVG if no font of the machine has its letters.
        quality: validation BLEU; the table shows the time to reach it. None is the highest whole BLEU that all runs
            reached.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    output: Path = Path("comparison")
    quality: float | None = None


def main(arguments: list[str], program: str) -> int:
    """Returns the exit code.

    Raises:
        InputError: runs that do not exist, are not finished, or cannot be compared.
    """
    options = tyro.cli(CompareOptions, args=arguments, prog=program)
    runs = read_runs(options.runs)
    quality = common_quality(runs) if options.quality is None else options.quality
    table = comparison_table(runs, quality)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "comparison.md").write_text(f"{table}\n", encoding="utf-8")
    pictures = [
        plot_quality_over_time(runs, options.output / "quality_over_time.png"),
        plot_bleu_by_length(runs, options.output / "bleu_by_length.png"),
    ]
    print(f"{table}\n\nthe table and two pictures lie in {options.output}")
    if note := missing_letters_note(pictures):
        print(f"note: {note}", file=sys.stderr)
    return 0
