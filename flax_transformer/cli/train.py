"""train: from a configuration to a run folder."""

from pathlib import Path

from flax_transformer.config.command_line import override
from flax_transformer.config.installed import recipe_path
from flax_transformer.config.reading import read_config
from flax_transformer.config.recipe import Config
from flax_transformer.errors import ConfigError
from flax_transformer.experiment.run import run_experiment
from flax_transformer.run_folder import RunFolder


def read_recipe(arguments: list[str], program: str, default_config: Path | None = None) -> tuple[Config, bool]:
    """Returns the configuration that a command line describes, and whether it resumes a run.

    A configuration that lies in a run folder belongs to that run, whatever folder it names.

    Args:
        arguments: `[--config FILE] [--section.field value ...]`, or `--run FOLDER --resume [--section.field ...]`. The
            name of an installed recipe may stand for a file.
        program: name of the program in the help.
        default_config: recipe used without --config; None if one must be given.

    Raises:
        ConfigError: an invalid configuration, or no configuration.
    """
    path, run, resume, rest = None, None, False, []
    position = 0
    while position < len(arguments):
        name, equals, value = arguments[position].partition("=")
        if name == "--config":
            if not equals:
                position += 1
                if position == len(arguments):
                    raise ConfigError("--config needs the path of a YAML file, or the name of an installed recipe.")
                value = arguments[position]
            path = recipe_path(value)
        elif arguments[position] == "--resume":
            resume = True
        else:
            if name == "--run":
                run = value if equals else "".join(arguments[position + 1 : position + 2])
            if name in ("-h", "--help"):
                print(f"{program} [--config FILE] [--resume] [--data.kind KIND] [--section.field VALUE ...]\n")
                print(f"Example: {program} --config my.yaml --run runs/mine --training.steps 5000\n")
            rest.append(arguments[position])
        position += 1
    if path is None and any(name in rest for name in ("-h", "--help")):
        return override(Config(), rest, program), resume  # prints the help and exits
    if path is None and resume and run:  # the run folder has the configuration
        path = RunFolder.open(run).config_file
    elif path is None:
        path = default_config
    if path is None:
        raise ConfigError(
            "give a recipe by --config FILE, an installed one by --config number_words, or a run to go on with by "
            "--run FOLDER --resume."
        )
    folder = RunFolder.of_config(path)
    config = read_config(path) if folder is None else folder.read_config()
    return override(config, rest, program), resume


def main(arguments: list[str], program: str = "train.py", default_config: Path | None = None) -> int:
    """Returns the exit code of a training run. The arguments are those of `read_recipe`.

    Raises:
        InputError: invalid files, an invalid configuration, or a run folder in the wrong state.
    """
    config, resume = read_recipe(arguments, program, default_config)
    outcome = run_experiment(config, resume)
    return 0 if outcome.signal is None else 3
