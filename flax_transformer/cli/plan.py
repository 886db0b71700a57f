"""plan: what a recipe needs on hardware that is not there."""

import contextlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

import jax
import tyro

from flax_transformer.cli.train import read_recipe
from flax_transformer.errors import ConfigError
from flax_transformer.experiment.hardware_plan import plan_hardware
from flax_transformer.experiment.plan_report import describe_plan, describe_ranking
from flax_transformer.experiment.plan_search import rank_plans
from flax_transformer.parallel.topology import set_up_compilers


@dataclass(frozen=True)
class PlanOptions:
    """Compiles the train step and the search of a recipe for hardware that is not there. Nothing is run.

    It prints what each device needs: memory, products, bytes, exchanges, and a bound of the time. It says whether the
    recipe fits, or what to change. The extra "plan" has the compilers. Further options change fields of the recipe,
    as for train: --mesh.fsdp 8, --batching.tokens-per-batch 100000.

    Example: flax-transformer plan --config my.yaml --topology h100_sxm:8 --mesh.fsdp 8

    Attributes:
        config: the recipe.
        topology: the hardware, such as v5e:4x4 or v5p:8x8x8 (chips of a slice), h100_sxm:8 (GPUs of a host), or cpu:2
            (cores of this machine).
        length: number of tokens of each side of a pair; None is the most that the recipe allows.
        search: whether to try meshes, rematerialisation and batch sizes, and to rank them.
    """

    config: Path
    topology: str
    length: int | None = None
    search: bool = False


def main(arguments: list[str], program: str) -> int:
    """Returns the exit code.

    Args:
        arguments: `--config FILE --topology NAME [--length N] [--search] [--section.field value ...]`.
        program: name of the program in the help.

    Raises:
        ConfigError: an unknown topology, an invalid configuration, or a recipe that does not fit.
    """
    options, rest = tyro.cli(PlanOptions, args=arguments, prog=program, return_unknown_args=True)
    if options.length is not None and options.length < 1:
        raise ConfigError(f"--length must be at least 1, got {options.length}.")
    config, resume = read_recipe(["--config", str(options.config), *rest], program)
    if resume:
        raise ConfigError("plan is for runs to come. Leave out --resume.")
    name, _, number = options.topology.partition(":")
    if name == "cpu" and number.isdecimal():
        with contextlib.suppress(RuntimeError):  # JAX has begun; a topology of more cores than it has is an error
            jax.config.update("jax_num_cpu_devices", int(number))
    with tempfile.TemporaryDirectory() as log_folder:
        set_up_compilers(Path(log_folder))
        if options.search:
            print(describe_ranking(rank_plans(config, options.topology, options.length)))
            return 0
        plan = plan_hardware(config, options.topology, options.length)
    print(describe_plan(plan))
    plan.check_fits()
    return 0
