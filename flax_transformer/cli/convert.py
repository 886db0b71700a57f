"""convert: a run as another system's model."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from flax_transformer.errors import ConfigError
from flax_transformer.inference.translator import Translator
from flax_transformer.interop.marian import write_marian
from flax_transformer.run_folder import RunFolder
from flax_transformer.training.checkpoint import Choice

USAGE = "flax-transformer convert to-hf --run RUN --output FOLDER"


@dataclass(frozen=True)
class ToHfOptions:
    """Writes a run as a folder that Hugging Face's MarianMTModel and MarianTokenizer load.

    Attributes:
        run: run folder of a Transformer.
        output: folder to write; it must not be there yet.
        checkpoint: the one that was best on validation text, or the last.
    """

    run: Path
    output: Path
    checkpoint: Choice = "best"


def main(arguments: list[str], program: str) -> int:
    """Returns the exit code.

    Raises:
        InputError: a bad run folder, or a model that cannot be converted.
    """
    if not arguments or arguments[0] != "to-hf":
        raise ConfigError(f"say what to convert to: {USAGE}")
    options = tyro.cli(ToHfOptions, args=arguments[1:], prog=f"{program} to-hf")
    model = RunFolder.open(options.run).read_config().model
    write_marian(Translator.load(options.run, checkpoint=options.checkpoint), model, options.output)
    print(f"{options.output}: a MarianMT model of {options.run}")
    return 0
