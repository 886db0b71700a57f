"""completion: a script for a shell that completes verbs and their options."""

import contextlib
import dataclasses
import io
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

import tyro

from flax_transformer.config.recipe import Config


@dataclass(frozen=True)
class CompletionOptions:
    """Prints a script that completes the verbs and options of flax-transformer in a shell.

    In bash, load it by: source <(flax-transformer completion bash)

    For zsh, write it to a folder of fpath: flax-transformer completion zsh > ~/.zfunc/_flax-transformer

    Example: flax-transformer completion bash

    Attributes:
        shell: the shell.
    """

    shell: tyro.conf.Positional[Literal["bash", "zsh"]]


@dataclass(frozen=True)
class ConvertOptions:
    """Options of `convert`, whose directions have options of their own."""

    direction: tyro.conf.Positional[Literal["to-hf", "from-hf"]]
    output: str = ""
    checkpoint: Literal["best", "last"] = "best"


def main(arguments: list[str], program: str) -> int:
    """Returns the exit code."""
    options = tyro.cli(CompletionOptions, args=arguments, prog=program)
    print(script(options.shell, program.split()[0]))
    return 0


def options_of_verbs() -> dict[str, Any]:
    """Returns the class of each verb's options."""
    from flax_transformer.cli.attention import AttentionOptions
    from flax_transformer.cli.average import AverageOptions
    from flax_transformer.cli.compare import CompareOptions
    from flax_transformer.cli.evaluate import EvaluateOptions
    from flax_transformer.cli.init import InitOptions
    from flax_transformer.cli.plan import PlanOptions
    from flax_transformer.cli.plot import PlotOptions
    from flax_transformer.cli.score import ScoreOptions
    from flax_transformer.cli.translate import TranslateOptions

    prepare = dataclasses.make_dataclass("PrepareOptions", [("config", str, "")], bases=(Config,), frozen=True)
    train = dataclasses.make_dataclass("TrainOptions", [("resume", bool, False)], bases=(prepare,), frozen=True)
    own = [
        (field.name, field.type, "" if field.default is dataclasses.MISSING else field.default)
        for field in dataclasses.fields(PlanOptions)
        if field.name != "config"
    ]
    plan = dataclasses.make_dataclass("PlanRecipeOptions", own, bases=(prepare,), frozen=True)
    return {
        "init": InitOptions,
        "prepare": prepare,
        "train": train,
        "translate": TranslateOptions,
        "attention": AttentionOptions,
        "score": ScoreOptions,
        "evaluate": EvaluateOptions,
        "average": AverageOptions,
        "convert": ConvertOptions,
        "plot": PlotOptions,
        "compare": CompareOptions,
        "plan": plan,
        "completion": CompletionOptions,
    }


def script(shell: str, program: str) -> str:
    """Returns the script for a shell, which tyro writes from the options of all verbs."""
    verbs = [
        Annotated[tyro.conf.AvoidSubcommands[options], tyro.conf.subcommand(name=verb)]
        for verb, options in options_of_verbs().items()
    ]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        tyro.cli(Union[tuple(verbs)], args=["--tyro-print-completion", shell], prog=program)  # type: ignore[arg-type]  # noqa: UP007
    return printed.getvalue().rstrip("\n")
