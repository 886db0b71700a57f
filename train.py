"""Trains a model: `python train.py [--config FILE] [--section.field value ...]`; number words without arguments."""

import sys
from pathlib import Path

from flax_transformer.cli.main import run_verb, set_up_process


def train(arguments: list[str], program: str) -> int:
    """Returns the exit code of a training run."""
    from flax_transformer.cli.train import main  # now that the process is set up

    return main(arguments, program, default_config=Path(__file__).parent / "configs" / "number_words.yaml")


if __name__ == "__main__":
    set_up_process()
    sys.exit(run_verb(train, sys.argv[1:], "train.py"))
