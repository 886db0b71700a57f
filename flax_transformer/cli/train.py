"""train: a configuration to a run folder."""

from pathlib import Path

from flax_transformer.config import Config, override, read_config
from flax_transformer.errors import ConfigError
from flax_transformer.experiment import run_experiment


def main(arguments: list[str], program: str = "train.py", default_config: Path | None = None) -> int:
    """Returns the exit code of a training run.

    Args:
        arguments: `[--config FILE] [--resume] [--section.field value ...]`.
        program: name in the help.
        default_config: recipe used without --config; the defaults of `Config` when None.

    Raises:
        InputError: bad files, a bad configuration, or a run folder in the wrong state.
    """
    path, resume, rest = default_config, False, []
    position = 0
    while position < len(arguments):
        name, equals, value = arguments[position].partition("=")
        if name == "--config":
            if not equals:
                position += 1
                if position == len(arguments):
                    raise ConfigError("--config needs the path of a YAML file.")
                value = arguments[position]
            path = Path(value)
        elif arguments[position] == "--resume":
            resume = True
        else:
            if name in ("-h", "--help"):
                print(f"{program} [--config FILE] [--resume] [--data.kind KIND] [--section.field VALUE ...]\n")
            rest.append(arguments[position])
        position += 1
    config = override(Config() if path is None else read_config(path), rest, program)
    outcome = run_experiment(config, resume)
    return 0 if outcome.signal is None else 3
