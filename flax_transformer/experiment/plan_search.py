"""The best meshes, batch sizes and rematerialisation for a recipe on described hardware.

Many choices are estimated by formula (`step_estimate.py`). The best of those that fit are compiled, and ranked by what
their programs show.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from flax_transformer.config.recipe import Config
from flax_transformer.data.batching import round_up
from flax_transformer.errors import ConfigError
from flax_transformer.experiment.hardware_plan import HardwarePlan, longest_batch, plan_hardware, vocabulary_of_recipe
from flax_transformer.experiment.step_estimate import StepEstimate, divisors, estimate_step
from flax_transformer.parallel.memory import available_bytes
from flax_transformer.parallel.mesh import MeshConfig, make_mesh
from flax_transformer.parallel.program_cost import SPEEDS
from flax_transformer.parallel.topology import described_devices

# Largest number of devices that split heads and feed-forward units.
MOST_TENSOR = 16
# Batches to try, as multiples of the recipe's, or of the smallest that gives each device whole rows.
BATCHES = (1, 2, 4)
# Number of choices that are compiled.
COMPILED = 3
# Share of a device's memory that the formula may fill, since it is not exact.
FILLED = 0.8


@dataclasses.dataclass(frozen=True)
class Ranked:
    """A choice of mesh, batch and rematerialisation.

    Attributes:
        config: the recipe with these settings.
        tokens: target tokens of a step on all devices, padding included.
        estimate: what the formula says.
        plan: what the compiled program says; None if it was not compiled.
    """

    config: Config
    tokens: int
    estimate: StepEstimate
    plan: HardwarePlan | None = None

    @property
    def tokens_per_second(self) -> float:
        """Target tokens a second on all devices if no exchange is hidden, padding included. 0 if it does not fit."""
        if self.plan is None:
            return self.tokens / self.estimate.seconds
        if self.plan.too_large or self.plan.train.seconds is None:
            return 0.0
        return self.tokens / self.plan.train.seconds[1]


def rank_plans(config: Config, topology: str, length: int | None = None) -> list[Ranked]:
    """Returns the best choices for a recipe on described hardware, the fastest first.

    Args:
        config: the recipe. Its mesh is not considered, nor `batching.row_multiple`.
        topology: name of the hardware.
        length: tokens of each side of a pair; None is the most that the recipe allows.

    Raises:
        ConfigError: an unknown topology, hardware whose speed is not known, or no choice that fits.
    """
    devices = described_devices(topology)
    if topology.partition(":")[0] not in SPEEDS:
        raise ConfigError(
            f"--search needs hardware of known speed, which {topology} is not. Known: {', '.join(SPEEDS)}."
        )
    available = available_bytes(make_mesh(MeshConfig(), devices))
    assert available is not None, "all described hardware has a known memory"
    vocabulary = vocabulary_of_recipe(config)
    found: list[Ranked] = []
    fitting: list[Ranked] = []
    for choice in choices(config, len(devices), length):
        for rematerialize in (False, True) if hasattr(config.model, "rematerialize") else (None,):
            recipe = choice if rematerialize is None else _with_model(choice, rematerialize=rematerialize)
            with contextlib.suppress(ConfigError):  # an axis does not divide a dimension
                shape = longest_batch(recipe, length)
                estimate = estimate_step(recipe, vocabulary, shape, topology)
                found.append(Ranked(recipe, shape.rows * shape.target_length, estimate))
                if estimate.needed_bytes <= FILLED * available:  # rematerialisation costs time, and then buys nothing
                    fitting.append(found[-1])
                    break
    if not fitting:
        least = min((ranked.estimate.needed_bytes for ranked in found), default=0)
        raise ConfigError(
            f"no mesh of {topology} fits the recipe: by formula the best one needs {least / 2**30:.1f} GiB of each "
            f"device, and may use {FILLED * available / 2**30:.1f} GiB. Take more devices, or a smaller model or batch."
        )
    first = sorted(fitting, key=lambda ranked: -ranked.tokens_per_second)[:COMPILED]
    compiled = [
        dataclasses.replace(ranked, plan=plan_hardware(ranked.config, topology, length, search=False))
        for ranked in first
    ]
    return sorted(compiled, key=lambda ranked: -ranked.tokens_per_second)


def choices(config: Config, num_devices: int, length: int | None = None) -> Iterator[Config]:
    """Yields a recipe with each mesh and batch size that is to be tried."""
    for tensor in (n for n in divisors(num_devices) if n <= MOST_TENSOR):
        for fsdp in divisors(num_devices // tensor):
            mesh = MeshConfig(num_devices // tensor // fsdp, fsdp, tensor)
            rows_divide_by = mesh.data * mesh.fsdp
            multiple = round_up(rows_divide_by, 8) if rows_divide_by < 8 or rows_divide_by % 8 else rows_divide_by
            batching = dataclasses.replace(config.batching, row_multiple=multiple)
            longest = length or max(config.model.max_source_length, config.model.max_target_length)
            if batching.packing:
                longest = length or batching.row_length
            least = max(batching.tokens_per_batch, batching.rows_divide_by * longest)
            for times in BATCHES:
                tokens = dataclasses.replace(batching, tokens_per_batch=times * least)
                yield dataclasses.replace(config, mesh=mesh, batching=tokens)


def _with_model(config: Config, **fields: Any) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))
