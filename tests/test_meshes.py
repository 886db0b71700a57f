"""One training on every mesh of eight devices: the same numbers, the expected exchanges, and a share of the bytes."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from flax_transformer.models.build import VocabularyInfo
from flax_transformer.models.recurrent_config import RecurrentConfig
from flax_transformer.models.transformer_config import TransformerConfig
from flax_transformer.optim.optimizer import OptimizerConfig, make_optimizer
from flax_transformer.optim.schedule import make_schedule
from flax_transformer.parallel.memory import stored_bytes
from flax_transformer.parallel.mesh import MeshConfig, batch_sharding, make_mesh
from flax_transformer.parallel.topology import Program, collectives
from flax_transformer.shapes import Batch
from flax_transformer.training.state import StateLayout, TrainState, describe_parameters, init_state, make_layout
from flax_transformer.training.step import Objective, jit_train_step

DROPOUT = {"dropout": 0.3}
MODELS = {
    "transformer": TransformerConfig(
        model_dim=16, num_heads=8, feed_forward_dim=32, num_encoder_layers=1, num_decoder_layers=1,
        attention_dropout=0.2, activation_dropout=0.2, **DROPOUT,
    ),
    "recurrent": RecurrentConfig(model_dim=16, hidden_dim=16, cell="gru", **DROPOUT),
}  # fmt: skip
VOCABULARY = VocabularyInfo(30, 30, 1)
# With a large epsilon Adam's update is nearly the gradient. Otherwise it would make whole steps of rounding errors.
OPTIMIZER = OptimizerConfig(schedule="constant", learning_rate=0.3, warmup_steps=1, epsilon=1.0)
ROWS, LENGTH, MICRO_BATCHES, BATCH_SEEDS = 16, 12, 2, range(2)

MESHES = [(d, f, 8 // d // f) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) if d * f <= 8]
# The fast suite has the mesh with all three axes, which has all kinds of exchanges.
CASES = [
    pytest.param(sizes, kind, marks=() if (sizes, kind) == ((2, 2, 2), "transformer") else pytest.mark.slow)
    for sizes in MESHES
    for kind in MODELS
]


def batch_of(seed: int, pairs_of_a_row: int) -> Batch:
    """A batch whose rows have up to so many pairs, of different lengths, and padding at their ends."""
    rng = np.random.default_rng(seed)
    arrays = []
    for _ in range(2):
        ends = np.sort(rng.integers(1, LENGTH + 1, (ROWS, pairs_of_a_row)), axis=1)
        segments = np.zeros((ROWS, LENGTH), np.int32)
        positions = np.zeros((ROWS, LENGTH), np.int32)
        for row in range(ROWS):
            for number, (start, end) in enumerate(zip([0, *ends[row]], ends[row], strict=False)):
                segments[row, start:end] = number + 1
                positions[row, start:end] = np.arange(end - start)
        tokens = np.where(segments > 0, rng.integers(4, 30, segments.shape), 0).astype(np.int32)
        arrays += [tokens, positions, segments]
    return Batch(*arrays)


@dataclass(frozen=True)
class Step:
    """The train step of a model on a mesh, compiled."""

    kind: str
    mesh: Mesh
    layout: StateLayout
    program: Program

    @classmethod
    def on(cls, mesh: Mesh, kind: str) -> "Step":
        model = MODELS[kind]
        schedule = make_schedule(OPTIMIZER, model.model_dim)
        optimizer = make_optimizer(OPTIMIZER, schedule, describe_parameters(model, VOCABULARY))
        layout = make_layout(model, VOCABULARY, optimizer, mesh)
        step = jit_train_step(layout, schedule, Objective(label_smoothing=0.1), 0, mesh, MICRO_BATCHES)
        rows = batch_sharding(mesh)
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=rows), batch_of(0, 1))
        with jax.set_mesh(mesh):
            program = Program.of("train step", lambda: step.lower(layout.abstract, shapes).compile())
        return cls(kind, mesh, layout, program)

    def init(self) -> TrainState:
        return init_state(MODELS[self.kind], VOCABULARY, self.layout, seed=0)

    def trained(self, pairs_of_a_row: int) -> tuple[list[Any], Any]:
        """The metrics of each update, and the parameters after the last one."""
        state, found = self.init(), []
        for seed in BATCH_SEEDS:
            batch = jax.device_put(batch_of(seed, pairs_of_a_row), batch_sharding(self.mesh))
            state, metrics = self.program.compiled(state, batch)
            found.append([float(x) for x in (*metrics.sums, metrics.gradient_norm)])
        return found, jax.device_get(state.params)


@functools.cache
def step_on(sizes: tuple[int, int, int], kind: str) -> Step:
    return Step.on(make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)]), kind)


@functools.cache
def on_one_device(kind: str, pairs_of_a_row: int) -> tuple[list[Any], Any]:
    return step_on((1, 1, 1), kind).trained(pairs_of_a_row)


@pytest.mark.parametrize("sizes, kind", CASES)
def test_every_mesh_gives_the_losses_and_parameters_of_one_device(sizes, kind):
    """Up to the order of float32 sums: with dropout, with accumulated gradients, and with several pairs in a row."""
    for pairs_of_a_row in (1, 3) if MODELS[kind].supports_packing else (1,):
        metrics, params = step_on(sizes, kind).trained(pairs_of_a_row)
        expected_metrics, expected = on_one_device(kind, pairs_of_a_row)
        np.testing.assert_allclose(metrics, expected_metrics, rtol=2e-5)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            there = functools.reduce(lambda tree, key: tree[key.key], path, expected)
            np.testing.assert_allclose(leaf, there, rtol=1e-5, atol=1e-6, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("sizes, kind", CASES)
def test_a_step_has_the_expected_exchanges_and_no_other(sizes, kind):
    """Gradients are summed over rows, parameters are gathered over fsdp alone, and products are summed over tensor."""
    _, fsdp, tensor = sizes
    program = step_on(sizes, kind).program
    kinds = {name for name, _ in collectives(program.instructions)}
    expected = {"all-reduce"}
    if fsdp > 1:  # an embedded token has its parts on all devices of fsdp; they go to the device of its row
        expected |= {"all-gather", "all-to-all"}
    if 1 < tensor < 8:  # the partitioner moves shards, where two axes change places
        kinds -= {"collective-permute"}
    assert kinds == expected
    assert program.rematerializations == 0


# The mesh axes that split a parameter, by the end of its name; the first line that fits holds.
SPLIT_BY = {
    "transformer": [("kernel", ("fsdp", "tensor")), ("table", ("fsdp", "tensor")), ("norm/bias", ()), ("scale", ()),
                    ("output/bias", ()), ("down/bias", ()), ("bias", ("tensor",))],
    "recurrent": [("table", ("fsdp", "tensor")), ("input_kernel", ("fsdp",)), ("readout/kernel", ("fsdp",)),
                  ("key/kernel", ("tensor",)), ("query/kernel", ("tensor",)), ("key/bias", ("tensor",)),
                  ("vector", ("tensor",)), ("", ())],
}  # fmt: skip


@pytest.mark.parametrize("sizes, kind", CASES)
def test_a_device_has_only_its_share_of_the_state(sizes, kind):
    """Parameters and both moments of Adam, as the arrays are stored and as the compiled program counts them."""
    step = step_on(sizes, kind)
    state, own_bytes = step.init(), 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axes = next(axes for end, axes in SPLIT_BY[kind] if name.endswith(end))
        expected = leaf.nbytes // math.prod(step.mesh.shape[axis] for axis in axes)
        assert [shard.data.nbytes for shard in leaf.addressable_shards] == [expected] * 8, name
        own_bytes += expected
    counters = sum(leaf.nbytes for leaf in jax.tree.leaves(state) if not leaf.shape)
    assert stored_bytes(state) == 3 * own_bytes + counters
    memory = step.program.compiled.memory_analysis()
    unread = {"transformer": (), "recurrent": ("source_positions",)}[kind]  # no arguments of the compiled program
    arrays = [array for name, array in batch_of(0, 1)._asdict().items() if name not in unread]
    batch = sum(array.nbytes for array in arrays) // (sizes[0] * sizes[1])
    assert memory.argument_size_in_bytes == 3 * own_bytes + counters + batch
    assert memory.alias_size_in_bytes == 3 * own_bytes + counters  # the new state takes the place of the old one
