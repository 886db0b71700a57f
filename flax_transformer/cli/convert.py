"""convert: a run to a MarianMT model of Hugging Face, or a MarianMT model to a run."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

from flax_transformer.errors import ConfigError, did_you_mean
from flax_transformer.inference.translator import Translator
from flax_transformer.interop.marian import options_left_out, write_marian
from flax_transformer.interop.marian_reader import read_marian
from flax_transformer.models.transformer_config import TransformerConfig
from flax_transformer.object_storage import any_path
from flax_transformer.run_folder import RunFolder
from flax_transformer.training.checkpoint import Choice

USAGE = "flax-transformer convert to-hf RUN --output FOLDER, or flax-transformer convert from-hf FOLDER --output RUN"


@dataclass(frozen=True)
class ToHfOptions:
    """Writes a run as a folder for Hugging Face's MarianMTModel and MarianTokenizer.

    Example: flax-transformer convert to-hf runs/mine --output marian

    Attributes:
        run: run folder of a Transformer.
        output: new folder.
        checkpoint: "best" is the best one on validation text, "last" the newest.
    """

    run: tyro.conf.Positional[Path]
    output: Path
    checkpoint: Choice = "best"


@dataclass(frozen=True)
class FromHfOptions:
    """Writes a run folder from the folder of a MarianMT model.

    Example: flax-transformer convert from-hf opus-mt-en-de --output runs/opus

    Attributes:
        folder: folder with config.json, model.safetensors (or pytorch_model.bin), vocab.json, source.spm and
            target.spm.
        output: new run folder.
    """

    folder: tyro.conf.Positional[Path]
    output: Path


def to_hf(arguments: list[str], program: str) -> None:
    """Writes the MarianMT folder of a run."""
    options = tyro.cli(ToHfOptions, args=arguments, prog=program)
    model = RunFolder.open(options.run).read_config().model
    lost = write_marian(Translator.load(options.run, checkpoint=options.checkpoint), model, options.output)
    if lost:
        print(
            f"warning: Hugging Face's generate may give other outputs than this run, since it does not have: "
            f"{'; '.join(lost)} (of section 'decoding').",
            file=sys.stderr,
        )
    assert isinstance(model, TransformerConfig)  # no other can be written
    if left_out := options_left_out(model):
        print(
            f"warning: a MarianMT model has no place for {'; '.join(left_out)} (of section 'model').", file=sys.stderr
        )
    if not model.zero_start:
        print(
            "warning: CTranslate2 begins every output with a vector of zeros, and this run with a learnt one "
            "(model.zero_start: false), so a CTranslate2 model made of this folder would translate otherwise. "
            "Hugging Face's does not. For CTranslate2 train with model.zero_start: true.",
            file=sys.stderr,
        )
    print(f"{options.output}: a MarianMT model of {any_path(options.run)}")


def from_hf(arguments: list[str], program: str) -> None:
    """Writes the run folder of a MarianMT folder."""
    options = tyro.cli(FromHfOptions, args=arguments, prog=program)
    run, lost = read_marian(options.folder, options.output)
    if lost:
        print(
            f"warning: outputs may be other than Hugging Face's, since these settings of {options.folder} have no "
            f"equivalent here: {'; '.join(lost)}.",
            file=sys.stderr,
        )
    print(f"{run.path}: {run.read_config().model.description} of {options.folder}")


DIRECTIONS: dict[str, Callable[[list[str], str], None]] = {"to-hf": to_hf, "from-hf": from_hf}


def main(arguments: list[str], program: str) -> int:
    """Returns the exit code.

    Raises:
        InputError: an invalid folder, or a model that cannot be converted.
    """
    direction = arguments[0] if arguments else ""
    if direction in ("-h", "--help"):
        print(USAGE)
        return 0
    if direction not in DIRECTIONS:
        raise ConfigError(f"say what to convert: {USAGE}.{did_you_mean(direction, DIRECTIONS)}")
    DIRECTIONS[direction](arguments[1:], f"{program} {direction}")
    return 0
