"""What a recipe needs on hardware that is only described: its programs are compiled for it, and read.

The train step and the search are those of a real run. The compiled programs tell memory, products, bytes and
exchanges. Times are bounds for these programs: the kernels' (`parallel/program_cost.py`) and the exchanges'
(`parallel/exchanges.py`). They are not calibrated by any measurement; a real step takes longer.
"""

import dataclasses
import functools
import math
import re

import jax
from jax.sharding import Mesh
from jax.stages import Traced

from flax_transformer.config.recipe import Config, DecodingConfig
from flax_transformer.data.batching import BatchShape, round_up, rows_within
from flax_transformer.data.tokenizer_pair import learnt_kind
from flax_transformer.errors import ConfigError
from flax_transformer.experiment.recipe_programs import RecipePrograms
from flax_transformer.inference.parameters import must_be_sharded
from flax_transformer.models.build import VocabularyInfo
from flax_transformer.optim.optimizer import make_optimizer
from flax_transformer.optim.schedule import make_schedule
from flax_transformer.parallel.exchanges import Exchange, read_exchanges
from flax_transformer.parallel.memory import available_bytes, needed_bytes, stored_bytes
from flax_transformer.parallel.mesh import make_mesh
from flax_transformer.parallel.program_cost import SPEEDS, Cost, largest_loop, read_kernels
from flax_transformer.parallel.topology import described_devices
from flax_transformer.training.state import StateLayout, describe_parameters, make_layout

GIB = 2**30
# What libtpu says when a program is too large, such as "Used 20.12G of 15.75G hbm".
TOO_LARGE = re.compile(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm")


# --- The work of a recipe


def vocabulary_of_recipe(config: Config) -> VocabularyInfo:
    """Returns the vocabulary that a recipe asks for. The tokenizers of its text may turn out smaller."""
    tokenizer = config.tokenizer
    start_token = learnt_kind(tokenizer).special_ids(tokenizer).start
    return VocabularyInfo(tokenizer.vocab_size, tokenizer.vocab_size, start_token)


def longest_batch(config: Config, length: int | None = None) -> BatchShape:
    """Returns the shape of a batch of a recipe's longest pairs, which needs the most memory.

    Args:
        config: the recipe.
        length: tokens of each side; None is the most that the recipe allows.

    Raises:
        ConfigError: `tokens_per_batch` is too small for the rows.
    """
    model, batching = config.model, config.batching
    if batching.packing:
        source = target = length or batching.row_length
    else:
        source, target = (min(length or most, most) for most in (model.max_source_length, model.max_target_length))
    rows = rows_within(batching.tokens_per_batch, max(source, target), batching.rows_divide_by)
    return BatchShape(rows, source, target)


def most_output_tokens(config: Config, source_length: int) -> int:
    """Returns the maximum length of an output, end token included, for a source of that length."""
    decoding = config.decoding
    most = int(decoding.max_length_factor * source_length + decoding.max_length_offset) + 1
    return min(most, config.model.max_target_length)


# --- What the programs need


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """What one program needs on one device.

    Attributes:
        name: "train step" or "search".
        memory: bytes, by what they hold.
        cost: products, bytes and least time of the kernels of a step; None if the speed of the hardware is not known.
        exchanges: exchanges between devices in a step.
        tokens: target tokens of a step on all devices, padding included.
        flops_utilization: share of the peak that products reach if exchanges are hidden; None without `cost`.
    """

    name: str
    memory: dict[str, int]
    cost: Cost | None
    exchanges: list[Exchange]
    tokens: int
    flops_utilization: float | None

    @property
    def needed(self) -> int:
        """Bytes of the program with all that it reads and writes."""
        return sum(self.memory.values())

    @property
    def seconds(self) -> tuple[float, float] | None:
        """Least time of a step, if exchanges are hidden behind kernels, and if none is. None if it is not known."""
        if self.cost is None:
            return None
        exchanged = sum(exchange.seconds for exchange in self.exchanges)
        return max(self.cost.seconds, exchanged), self.cost.seconds + exchanged


@dataclasses.dataclass(frozen=True)
class HardwarePlan:
    """What the programs of a recipe need on described hardware.

    Attributes:
        config: the recipe.
        topology: name of the hardware.
        device_kind: name of a device.
        num_devices: number of devices of the mesh.
        num_parameters: trained values.
        shape: shape of the training batch.
        available: bytes of a device that a program may use; None if they are not known.
        train: what the train step needs.
        search: what the search needs; None if it was not asked for.
    """

    config: Config
    topology: str
    device_kind: str
    num_devices: int
    num_parameters: int
    shape: BatchShape
    available: int | None
    train: ProgramPlan
    search: ProgramPlan | None

    @property
    def too_large(self) -> list[ProgramPlan]:
        """The programs that need more memory than a device has."""
        programs = [program for program in (self.train, self.search) if program is not None]
        return [program for program in programs if self.available is not None and program.needed > self.available]

    def check_fits(self) -> None:
        """Raises a `ConfigError` if a program does not fit. It says by how much, and what to do first."""
        for program in self.too_large:
            assert self.available is not None
            raise ConfigError(
                f"the {program.name} does not fit {self.topology}: a device needs {program.needed / GIB:.1f} GiB, "
                f"{(program.needed - self.available) / GIB:.1f} GiB more than its {self.available / GIB:.1f} GiB. "
                f"{remedy(self.config, program, self.available, self.num_devices)}"
            )


def remedy(config: Config, program: ProgramPlan, available: int, num_devices: int) -> str:
    """Returns what to change first when a program needs more memory than there is."""
    if program.name == "search":
        return "Lower decoding.batch_size or decoding.beam_size."
    mesh = config.mesh
    state = program.memory["parameters"] + program.memory["optimiser"] + program.memory["average"]
    shards = mesh.fsdp * mesh.tensor
    if 2 * state > available:  # their gradients need room, too
        wanted = shards * 2 ** math.ceil(math.log2(2 * state / available))
        if wanted <= num_devices:
            return (
                f"Parameters and optimiser take {state / GIB:.1f} GiB of that. Split them over more devices: "
                f"mesh.fsdp: {wanted // mesh.tensor}."
            )
        return "Parameters and optimiser leave too little room even if all devices share them. Take more devices."
    if not getattr(config.model, "rematerialize", True):
        return "Activations take most of it. Set model.rematerialize: true."
    parts = 2 * config.batching.gradient_accumulation_steps
    return f"Activations take most of it. Set batching.gradient_accumulation_steps: {parts}."


# --- How they are found out


def plan_hardware(config: Config, topology: str, length: int | None = None, search: bool = True) -> HardwarePlan:
    """Compiles the programs of a recipe for described hardware, and reads what they need.

    Args:
        config: the recipe.
        topology: name of the hardware, such as "v5e:4x4"; see `described_devices`.
        length: tokens of each side of a training pair and of a sentence; None is the most that the recipe allows.
        search: whether the search is compiled, too.

    Raises:
        ConfigError: an unknown topology, or sizes that do not fit its mesh.
    """
    mesh = make_mesh(config.mesh, described_devices(topology))
    config = dataclasses.replace(
        config, mesh=dataclasses.replace(config.mesh, data=mesh.shape["data"]), decoding=_rounded(config, mesh.size)
    )
    check_batch(config, mesh.shape["data"] * mesh.shape["fsdp"])
    shape = longest_batch(config, length)
    planner = _Planner(RecipePrograms(config, vocabulary_of_recipe(config), mesh), mesh, topology)
    return HardwarePlan(
        config=config,
        topology=topology,
        device_kind=mesh.devices.flat[0].device_kind,
        num_devices=mesh.size,
        num_parameters=planner.layout.num_parameters,
        shape=shape,
        available=available_bytes(mesh),
        train=planner.train_step(shape),
        search=planner.search(shape.source_length) if search else None,
    )


def check_batch(config: Config, row_shards: int) -> None:
    """Raises a `ConfigError` unless a mesh that splits rows over `row_shards` devices divides the batches."""
    multiple = config.batching.row_multiple
    if multiple % row_shards:
        raise ConfigError(
            f"batching.row_multiple ({multiple}) must be a multiple of mesh.data x mesh.fsdp ({row_shards}), so that "
            f"each device has whole rows. Set batching.row_multiple: {round_up(multiple, row_shards)}. If the batch is "
            "too small for that, raise batching.tokens_per_batch or use fewer devices."
        )


def _rounded(config: Config, num_devices: int) -> DecodingConfig:
    """Returns the decoding section with a batch that the devices divide, as a translator rounds it."""
    return dataclasses.replace(config.decoding, batch_size=round_up(config.decoding.batch_size, num_devices))


@dataclasses.dataclass(frozen=True)
class _Planner:
    """Compiles the programs of a recipe, and reads what they need.

    Attributes:
        programs: the programs.
        mesh: the described devices.
        topology: name of the hardware.
    """

    programs: RecipePrograms
    mesh: Mesh
    topology: str

    @functools.cached_property
    def layout(self) -> StateLayout:
        """Shapes and shardings of the training state."""
        config, vocabulary = self.programs.config, self.programs.vocabulary
        schedule = make_schedule(config.optimizer, config.model.model_dim)
        optimizer = make_optimizer(config.optimizer, schedule, describe_parameters(config.model, vocabulary))
        return make_layout(config.model, vocabulary, optimizer, self.mesh, config.training.ema_decay)

    def train_step(self, shape: BatchShape) -> ProgramPlan:
        """Returns what the train step needs."""
        state = self.layout.abstract
        stored = {
            "parameters": stored_bytes(state.params),
            "optimiser": stored_bytes(state.optimizer),
            "average": stored_bytes(state.average),
        }
        traced, tokens = self.programs.traced_train_step(shape), shape.rows * shape.target_length
        return self._read("train step", traced, stored, "activations and gradients", tokens)

    def search(self, source_length: int) -> ProgramPlan:
        """Returns what the search needs; its costs are those of one step."""
        sharded = must_be_sharded(self.layout.shapes.params, self.mesh)
        stored = {"parameters": stored_bytes(self.programs.prepared(sharded).params)}
        config = self.programs.config
        traced = self.programs.traced_search(source_length, most_output_tokens(config, source_length), sharded)
        return self._read("search", traced, stored, "caches and temporaries", config.decoding.batch_size)

    def _read(self, name: str, traced: Traced, stored: dict[str, int], rest: str, tokens: int) -> ProgramPlan:
        """Compiles a program, and returns what it needs. What is not in `stored` has the name `rest`."""
        known = sum(stored.values())
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:  # libtpu compiles no program that is too large
            needed = too_large_bytes(str(error))
            if needed is None:
                raise
            return ProgramPlan(name, stored | {rest: max(needed - known, 0)}, None, [], tokens, None)
        memory, text = stored | {rest: max(needed_bytes(compiled) - known, 0)}, compiled.as_text()
        assert text is not None, "XLA writes the text of its programs"
        kernels, loop = read_kernels(text), None
        if name == "search":
            loop, kernels = largest_loop(kernels)
        exchanges = read_exchanges(text, self.mesh, self.topology, loop=loop)
        speed = SPEEDS.get(self.topology.partition(":")[0])
        if speed is None:
            return ProgramPlan(name, memory, None, exchanges, tokens, None)
        cost = Cost.of(kernels, speed)
        return ProgramPlan(name, memory, cost, exchanges, tokens, cost.flops_utilization(speed))


def too_large_bytes(message: str) -> int | None:
    """Returns the bytes that a program needs, from libtpu's message that it is too large; None for other messages."""
    if "RESOURCE_EXHAUSTED" not in message or (found := TOO_LARGE.search(message)) is None:
        return None
    return int(float(found[1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[found[2]])
