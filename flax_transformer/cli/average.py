"""average: the mean of several checkpoints of a run, as a run folder of its own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from flax_transformer.training.averaging import average_checkpoints


@dataclass(frozen=True)
class AverageOptions:
    """Averages the parameters of checkpoints of a run and writes a run folder to translate with or to start from.

    A run keeps few checkpoints unless training.keep_newest or training.keep_best says more; where one of those that are
    asked for is gone, nothing is averaged.

    Attributes:
        run: run folder.
        output: the folder to make.
        num: how many checkpoints.
        of: the newest that the run has saved, or those that were best on validation text.
    """

    run: Path
    output: Path
    num: int = 5
    of: Literal["newest", "best"] = "newest"


def main(arguments: list[str], program: str) -> int:
    """Returns the exit code.

    Raises:
        InputError: a bad run folder, too few checkpoints, some of the newest or best no longer kept, or an output
            folder that is in use.
    """
    options = tyro.cli(AverageOptions, args=arguments, prog=program)
    steps = average_checkpoints(options.run, options.output, options.num, options.of)
    print(f"the mean of steps {', '.join(map(str, sorted(steps)))} lies in {options.output}")
    return 0
