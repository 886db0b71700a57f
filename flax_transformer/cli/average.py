"""average: a new run folder with the mean of several checkpoints of a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from flax_transformer.object_storage import any_path
from flax_transformer.training.averaging import average_checkpoints


@dataclass(frozen=True)
class AverageOptions:
    """Averages the parameters of several checkpoints of a run, and writes them to a new run folder.

    The run must still have all of these checkpoints. A training keeps only a few, as training.keep_newest and
    training.keep_best say.

    Example: flax-transformer average --run runs/mine --output runs/mean --num 5

    Attributes:
        run: run folder.
        output: new run folder.
        num: number of checkpoints.
        of: "newest" averages the newest checkpoints, "best" the best ones on validation text.
    """

    run: Path
    output: Path
    num: int = 5
    of: Literal["newest", "best"] = "newest"


def main(arguments: list[str], program: str) -> int:
    """Returns the exit code.

    Raises:
        InputError: an invalid run folder, too few checkpoints, some that are no longer kept, or an output folder that
            is in use.
    """
    options = tyro.cli(AverageOptions, args=arguments, prog=program)
    steps = average_checkpoints(options.run, options.output, options.num, options.of)
    print(f"the mean of steps {', '.join(map(str, sorted(steps)))} lies in {any_path(options.output)}")
    return 0
