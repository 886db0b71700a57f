"""Memory, work and exchanges of a train step by formula, without a compiler: for a first choice among many meshes.

The formulas count the arrays that a Transformer's step keeps and moves. docs/scale/limits.md derives them, and compares
them with compiled programs. A model of another kind, such as a recurrent one, gets the same formulas for its parameters
and logits, and none for its layers. So its estimate is too low.

Legend: D model dim, F feed-forward dim, N heads, V vocabulary, S source length, T target length, R rows of a device,
P parameters, L layers, d, f, t sizes of the mesh axes data, fsdp and tensor.
"""

import dataclasses
import math

from jax.sharding import AbstractMesh, AxisType

from flax_transformer.config.recipe import Config
from flax_transformer.data.batching import BatchShape
from flax_transformer.models.build import VocabularyInfo
from flax_transformer.models.transformer_config import TransformerConfig
from flax_transformer.optim.optimizer import make_optimizer
from flax_transformer.optim.schedule import make_schedule
from flax_transformer.parallel.exchanges import LINKS
from flax_transformer.parallel.memory import stored_bytes
from flax_transformer.parallel.program_cost import SPEEDS
from flax_transformer.training.metrics import TokenCounts
from flax_transformer.training.state import describe_parameters, make_layout
from flax_transformer.training.throughput import ModelFlops

# Reads and writes of each kept activation and logit in a step, as compiled programs show them (docs/scale/limits.md).
ACCESSES = 12
# Bytes moved for each parameter by Adam: the parameter, two moments and the gradient, float32, read and written.
UPDATE_BYTES = 32


@dataclasses.dataclass(frozen=True)
class StepEstimate:
    """What a train step needs on one device, by formula.

    Attributes:
        state_bytes: parameters, optimiser and average.
        activation_bytes: activations that are kept for the backward pass, logits and gradients.
        flops: operations of products.
        moved_bytes: bytes read and written in the device's memory.
        exchanged: bytes that a device receives, by mesh axis.
        kernel_seconds: products / peak + bytes / bandwidth.
        exchange_seconds: exchanged bytes / bandwidth of the links, by mesh axis.
    """

    state_bytes: int
    activation_bytes: float
    flops: float
    moved_bytes: float
    exchanged: dict[str, float]
    kernel_seconds: float
    exchange_seconds: dict[str, float]

    @property
    def needed_bytes(self) -> float:
        """Bytes of memory."""
        return self.state_bytes + self.activation_bytes

    @property
    def seconds(self) -> float:
        """Least time of a step if no exchange is hidden."""
        return self.kernel_seconds + sum(self.exchange_seconds.values())


@dataclasses.dataclass(frozen=True)
class LayerEstimate:
    """What the layers of a model add to a step, beside their parameters.

    Attributes:
        kept: elements of a device's activations that are kept for the backward pass.
        made: elements of a device's activations that a forward pass makes.
        attention_flops: operations of attention on all devices.
        tensor_bytes: bytes that a device receives along "tensor".
    """

    kept: float
    made: float
    attention_flops: float
    tensor_bytes: float


def estimate_step(config: Config, vocabulary: VocabularyInfo, shape: BatchShape, topology: str) -> StepEstimate:
    """Returns what a train step needs on each device of a mesh whose sizes `config.mesh` all gives.

    Args:
        config: the recipe.
        vocabulary: sizes of the vocabularies.
        shape: batch of all devices.
        topology: name of the hardware; its speed must be known.

    Raises:
        ConfigError: a mesh axis does not divide a dimension that it shards.
    """
    d, f, t = config.mesh.data, config.mesh.fsdp, config.mesh.tensor
    mesh = AbstractMesh((d, f, t), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    info = describe_parameters(config.model, vocabulary)
    schedule = make_schedule(config.optimizer, config.model.model_dim)
    layout = make_layout(
        config.model, vocabulary, make_optimizer(config.optimizer, schedule, info), mesh, config.training.ema_decay
    )
    state = layout.abstract
    width = 2 if config.model.compute_dtype == "bfloat16" else 4
    devices = d * f * t
    own_params = stored_bytes(state.params) / 4

    # --- Activations, elements of one device
    rows = shape.rows / (d * f)
    of_layers = _estimate_layers(config, shape, rows, t, width)
    again = 4 / 3 if getattr(config.model, "rematerialize", False) else 1.0  # a second forward pass
    logits = rows * shape.target_length * vocabulary.target_size / t
    micro = config.batching.gradient_accumulation_steps
    # Devices along "fsdp" gather all parameters, or one layer at a time if the layers are a loop.
    layers = _num_layers(config) if getattr(config.model, "scan_layers", False) else 1
    copies = width * own_params * max(1, f / layers)
    activations = width * (of_layers.kept + 2 * logits) / micro + 4 * own_params + copies

    # --- Work
    tokens = TokenCounts(shape.rows * shape.source_length, shape.rows * shape.target_length)
    flops = (ModelFlops.of(info).total(tokens) + of_layers.attention_flops) * again / devices
    moved = width * ACCESSES * (of_layers.made * again + logits) + (UPDATE_BYTES + 3 * width * f) * own_params

    # --- Exchanges. Lookups and logits share a table, and each has a gradient of it.
    shared = getattr(config.model, "share_embeddings", "none") != "none"
    table = vocabulary.target_size * config.model.model_dim if shared else 0
    exchanged = {
        "data": 2 * 4 * (own_params + table / (f * t)) * (d - 1) / d,
        "fsdp": ((2 * width + 4) * layout.num_parameters + 12 * table) / t * (f - 1) / f,
        "tensor": of_layers.tensor_bytes * again,
    }
    speed = SPEEDS[topology.partition(":")[0]]
    peak = speed.peak if width == 2 else speed.float32_peak
    times = {axis: size / axis_bandwidth(topology, config, axis) for axis, size in exchanged.items()}
    return StepEstimate(
        state_bytes=sum(stored_bytes(part) for part in (state.params, state.optimizer, state.average)),
        activation_bytes=activations,
        flops=flops,
        moved_bytes=moved,
        exchanged=exchanged,
        kernel_seconds=flops / peak + moved / speed.bandwidth,
        exchange_seconds=times,
    )


def _estimate_layers(config: Config, shape: BatchShape, rows: float, t: int, width: int) -> LayerEstimate:
    """Returns the estimate for the layers of a Transformer; zeros for other models, whose layers have no formula."""
    model = config.model
    if not isinstance(model, TransformerConfig):
        return LayerEstimate(0.0, 0.0, 0.0, 0.0)
    kept, made = _kept_elements(model, shape, rows, t)
    return LayerEstimate(kept, made, _attention_flops(model, shape), _tensor_bytes(model, shape, rows, t, width))


def _kept_elements(model: TransformerConfig, shape: BatchShape, rows: float, t: int) -> tuple[float, float]:
    """Returns the activations of a device: those kept for the backward pass, and all that a forward pass makes.

    An encoder layer makes for each token 5 D that every tensor shard has: its input, and what residuals and norms read.
    It makes 4 D + F / t of its shard: query, key, value, context, hidden units. A decoder layer has a third sub-layer.
    A rematerialised layer keeps its input alone; while its gradient is computed, one layer keeps everything.
    """
    dim, hidden, layers = model.model_dim, model.feed_forward_dim, (model.num_encoder_layers, model.num_decoder_layers)
    source, target = rows * shape.source_length, rows * shape.target_length
    encoder = source * (5 * dim + (4 * dim + hidden) / t)
    decoder = target * (8 * dim + (6 * dim + hidden) / t) + source * 2 * dim / t
    made = layers[0] * encoder + layers[1] * decoder
    inputs = dim * (layers[0] * source + layers[1] * target)
    return (inputs + max(encoder, decoder) if model.rematerialize else made), made


def _num_layers(config: Config) -> int:
    return config.model.num_encoder_layers + config.model.num_decoder_layers


def _attention_flops(model: TransformerConfig, shape: BatchShape) -> float:
    """Returns the operations of attention without parameters: two products of 2 D for each pair, forward, times 3."""
    s, t = shape.source_length, shape.target_length
    pairs = model.num_encoder_layers * s * s + model.num_decoder_layers * (t * t + t * s)
    return 12.0 * shape.rows * model.model_dim * pairs


def _tensor_bytes(model: TransformerConfig, shape: BatchShape, rows: float, t: int, width: int) -> float:
    """Returns the bytes of all-reduces along "tensor": one for each sub-layer and its input's gradient."""
    if t == 1:
        return 0.0
    tokens = 2 * model.num_encoder_layers * shape.source_length + 3 * model.num_decoder_layers * shape.target_length
    return 2 * 2 * width * rows * tokens * model.model_dim * (t - 1) / t


def axis_bandwidth(topology: str, config: Config, axis: str) -> float:
    """Returns the bytes that a device receives in a second along a mesh axis.

    Devices are numbered with "tensor" innermost. So a GPU's axis leaves its host if it and the inner axes do not fit.
    A TPU's axis is taken as one axis of the torus.
    """
    name, _, layout = topology.partition(":")
    link, mesh = LINKS[name], config.mesh
    inner = {"tensor": mesh.tensor, "fsdp": mesh.tensor * mesh.fsdp, "data": mesh.tensor * mesh.fsdp * mesh.data}
    return link.near if inner[axis] <= int(layout.split("x")[-1]) else link.far


def divisors(number: int) -> list[int]:
    """Returns the divisors of a number, ascending."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
