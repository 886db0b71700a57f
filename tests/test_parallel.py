"""The numbers of a train step, and random bits that are drawn once over all devices."""

import dataclasses
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from flax_transformer.config.reading import from_dict
from flax_transformer.config.recipe import Config
from flax_transformer.errors import ConfigError
from flax_transformer.experiment.run import run_experiment
from flax_transformer.models.build import ModelConfig, VocabularyInfo
from flax_transformer.models.recurrent_config import RecurrentConfig
from flax_transformer.models.transformer_config import TransformerConfig
from flax_transformer.optim.optimizer import OptimizerConfig, make_optimizer
from flax_transformer.optim.schedule import make_schedule
from flax_transformer.parallel.mesh import MeshConfig, batch_sharding, check_rows, make_mesh
from flax_transformer.shapes import Batch
from flax_transformer.training.state import describe_parameters, init_state, make_layout
from flax_transformer.training.step import Objective, jit_train_step

MODEL = TransformerConfig(
    model_dim=32, num_heads=4, feed_forward_dim=64, num_encoder_layers=1, num_decoder_layers=1,
    dropout=0.3, attention_dropout=0.2, activation_dropout=0.2,
)  # fmt: skip
VOCABULARY = VocabularyInfo(30, 30, 1)
ROWS, LENGTH = 16, 12
SMOOTHED = Objective(label_smoothing=0.1)
WARM = OptimizerConfig(warmup_steps=10)


def random_batch(seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, LENGTH + 1, (2, ROWS))
    columns = np.arange(LENGTH)[None, :]
    arrays = []
    for side in range(2):
        real = columns < lengths[side][:, None]
        arrays += [np.where(real, rng.integers(4, 30, real.shape), 0), np.where(real, columns, 0), real]
    return Batch(*(a.astype(np.int32) for a in arrays))


def prepared(
    mesh: Mesh,
    model: ModelConfig = MODEL,
    seed: int = 0,
    gradient_accumulation_steps: int = 1,
    ema_decay: float = 0.0,
    objective: Objective = SMOOTHED,
    optimizer_config: OptimizerConfig = WARM,
):
    schedule = make_schedule(optimizer_config, model.model_dim)
    optimizer = make_optimizer(optimizer_config, schedule, describe_parameters(model, VOCABULARY))
    layout = make_layout(model, VOCABULARY, optimizer, mesh, ema_decay)
    return layout, jit_train_step(layout, schedule, objective, seed, mesh, gradient_accumulation_steps)


def losses(mesh: Mesh, layout, step, steps: int = 4) -> tuple[list[float], list[float]]:
    state = init_state(MODEL, VOCABULARY, layout, seed=0)
    found, norms = [], []
    with jax.set_mesh(mesh):
        for i in range(steps):
            state, metrics = step(state, jax.device_put(random_batch(i), batch_sharding(mesh)))
            found.append(float(metrics.sums.loss / metrics.sums.count))
            norms.append(float(metrics.gradient_norm))
    return found, norms


@pytest.fixture(scope="module")
def on_one(one_device):
    """Layout and step, compiled once for all tests on one device."""
    return prepared(one_device)


@pytest.fixture(scope="module")
def single(one_device, on_one):
    return losses(one_device, *on_one)


def test_gradients_summed_over_pieces_equal_those_of_the_whole_batch(one_device):
    """Without dropout, whose keys belong to pieces; sentences differ in length, and so pieces in tokens.

    The second loss comes after an update. Parameters are not compared: key biases have no gradient but rounding, which
    Adam blows up.
    """
    model = dataclasses.replace(MODEL, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)
    made = []
    for mesh, gradient_accumulation_steps in ((one_device, 1), (make_mesh(MeshConfig(2, 2, 2)), 4)):
        layout, step = prepared(mesh, model, gradient_accumulation_steps=gradient_accumulation_steps)
        state = init_state(model, VOCABULARY, layout, seed=0)
        with jax.set_mesh(mesh):
            for i in range(2):
                state, metrics = step(state, jax.device_put(random_batch(i), batch_sharding(mesh)))
                made.append([float(x) for x in (*metrics.sums, metrics.gradient_norm)])
    np.testing.assert_allclose(made[2:], made[:2], rtol=1e-4)


@pytest.mark.slow
def test_r_drop_computes_each_row_twice_and_has_the_same_losses_on_eight_devices(one_device):
    """Without dropout the two passes agree, and the loss is that of one; in pieces, too."""
    made = []
    for mesh in (one_device, make_mesh(MeshConfig(2, 2, 2))):
        layout, step = prepared(mesh, objective=Objective(0.1, 5.0))
        state = init_state(MODEL, VOCABULARY, layout, seed=0)
        with jax.set_mesh(mesh):
            for i in range(2):
                state, metrics = step(state, jax.device_put(random_batch(i), batch_sharding(mesh)))
                made.append([float(x) for x in metrics.sums])
    np.testing.assert_allclose(made[2:], made[:2], rtol=2e-5)
    tokens = int((random_batch(0).target_segments > 0).sum())
    assert made[0][3] == 2 * tokens
    layout, step = prepared(one_device, objective=Objective(0.1, 1e-9))
    with jax.set_mesh(one_device):
        batch = jax.device_put(random_batch(0), batch_sharding(one_device))
        _, metrics = step(init_state(MODEL, VOCABULARY, layout, seed=0), batch)
    np.testing.assert_allclose(made[0][1:], [float(x) for x in metrics.sums[1:]], rtol=1e-5)  # the same masks
    assert made[0][0] > float(metrics.sums.loss) + 0.1 * tokens  # what both passes disagree on

    model = dataclasses.replace(MODEL, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)
    alike = []
    for mesh, objective, pieces in ((one_device, Objective(0.1), 1), (one_device, Objective(0.1, 5.0), 2)):
        layout, step = prepared(mesh, model, gradient_accumulation_steps=pieces, objective=objective)
        state = init_state(model, VOCABULARY, layout, seed=0)
        with jax.set_mesh(mesh):
            _, metrics = step(state, jax.device_put(random_batch(0), batch_sharding(mesh)))
        alike.append([float(metrics.sums.loss / metrics.sums.count), float(metrics.gradient_norm)])
    np.testing.assert_allclose(alike[1], alike[0], rtol=1e-5)


@pytest.mark.parametrize("wrong", ["loss", "update"])
def test_a_step_that_is_not_finite_changes_nothing_but_its_number(one_device, wrong):
    # Adam divides zeros by it, which is one in float32: the gradient of a row that pads the vocabulary.
    rate = OptimizerConfig(epsilon=1e-50) if wrong == "update" else OptimizerConfig()
    layout, step = prepared(one_device, ema_decay=0.9, optimizer_config=rate)
    state = init_state(MODEL, VOCABULARY, layout, seed=0)
    if wrong == "loss":
        table = state.params["target_embedding"]["table"]
        params = state.params | {"target_embedding": {"table": table.at[7].set(jnp.inf)}}
        state = dataclasses.replace(state, params=params)
    before = jax.device_get(state)
    with jax.set_mesh(one_device):
        state, metrics = step(state, jax.device_put(random_batch(0), batch_sharding(one_device)))
    assert metrics.skipped and int(state.step) == 1
    assert bool(jnp.isfinite(metrics.gradient_norm)) == (wrong == "update")
    for new, old in zip(
        jax.tree.leaves((state.params, state.optimizer, state.average)),
        jax.tree.leaves((before.params, before.optimizer, before.average)),
        strict=True,
    ):
        counts = jnp.issubdtype(old.dtype, jnp.integer)
        np.testing.assert_array_equal(new, old + 1 if counts else old)


@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.05, 0.9])
def test_the_average_follows_the_parameters(decay):
    """Against the sum written out, on a mesh that splits both; the training itself is not changed by it."""
    mesh = make_mesh(MeshConfig(2, 2, 2))
    layout, step = prepared(mesh, ema_decay=decay)
    plain_layout, plain_step = prepared(mesh)
    state, plain = init_state(MODEL, VOCABULARY, layout, seed=0), init_state(MODEL, VOCABULARY, plain_layout, seed=0)
    assert plain.eval_params is plain.params and state.eval_params is state.average
    expected = jax.device_get(state.params)
    with jax.set_mesh(mesh):
        for i in range(4):
            batch = jax.device_put(random_batch(i), batch_sharding(mesh))
            state, _ = step(state, batch)
            plain, _ = plain_step(plain, batch)
            share = 1 - min(decay, (1 + i) / (10 + i))
            params = jax.device_get(state.params)
            expected = jax.tree.map(lambda a, p, share=share: (1 - share) * a + share * p, expected, params)
    chex.assert_trees_all_close(jax.device_get(state.average), expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(jax.device_get(state.params), jax.device_get(plain.params))
    assert jax.tree.map(lambda a: a.sharding, state.average) == jax.tree.map(lambda a: a.sharding, state.params)


def test_losses_fall(single):
    assert single[0][-1] < single[0][0]


def test_the_state_is_donated_and_dropout_differs_between_steps_and_seeds_alone(one_device, on_one):
    """The same parameters and batch at another step, and under another seed, give another loss; else the same."""
    layout, step = on_one
    _, other_seed = prepared(one_device, seed=1)
    batch = jax.device_put(random_batch(0), batch_sharding(one_device))

    def loss(of, at: int) -> float:
        state = init_state(MODEL, VOCABULARY, layout, seed=0)
        count = jax.device_put(np.int32(at), state.step.sharding)
        with jax.set_mesh(one_device):
            return float(of(dataclasses.replace(state, step=count), batch)[1].sums.loss)

    state = init_state(MODEL, VOCABULARY, layout, seed=0)
    leaves = jax.tree.leaves(state.params)
    with jax.set_mesh(one_device):
        step(state, batch)
    assert all(leaf.is_deleted() for leaf in leaves)  # donated: a step needs no second copy of the state

    first = loss(step, 0)
    assert loss(step, 0) == first
    assert loss(step, 1) != first
    assert loss(other_seed, 0) != first


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_each_device_draws_only_its_own_share_of_random_bits(sizes):
    """The largest array of random words that a device makes is its own share of the largest dropout site."""
    mesh = make_mesh(MeshConfig(*sizes))
    layout, step = prepared(mesh)
    batch = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=batch_sharding(mesh)), random_batch(0)
    )
    with jax.set_mesh(mesh):
        program = step.lower(layout.abstract, batch).compile().as_text()
    shapes = [tuple(map(int, dims.split(","))) for dims in re.findall(r"u32\[(\d+(?:,\d+)*)\]", program)]
    # Four keep-decisions a word. Sites: residuals and embeddings (D), heads x S, and hidden units (F).
    rows, tensor = ROWS // (mesh.shape["data"] * mesh.shape["fsdp"]), mesh.shape["tensor"]
    dim, heads, hidden = MODEL.model_dim, MODEL.num_heads, MODEL.feed_forward_dim
    words = max(rows * LENGTH * max(dim, hidden // tensor) // 4, rows * heads // tensor * LENGTH * -(-LENGTH // 4))
    # The compiler may give each of a word's four bytes a word of its own; the whole batch's draw is 8 times the share.
    assert words <= max(math.prod(shape) for shape in shapes) <= 4 * words


BFLOAT16 = dataclasses.replace(MODEL, compute_dtype="bfloat16")


@pytest.mark.parametrize(
    "sizes, model",
    [
        ((2, 2, 2), BFLOAT16),
        pytest.param(
            (8, 1, 1), dataclasses.replace(BFLOAT16, output_bias=True, scan_layers=True), marks=pytest.mark.slow
        ),
        pytest.param(
            (4, 2, 1),
            dataclasses.replace(BFLOAT16, param_dtype="bfloat16", positions="learned"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            (8, 1, 1),
            RecurrentConfig(model_dim=16, hidden_dim=16, cell="gru", compute_dtype="bfloat16"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_gradients_are_summed_over_devices_in_float32(sizes, model, tmp_path):
    """In bfloat16 compute too, as the partitioner leaves the program: later XLA for CPU makes float32 of all sums.

    Nothing else is summed over devices unless tensor is above 1: then products over heads, hidden units and the
    vocabulary are, which have a dimension for rows and one for tokens.
    """
    mesh = make_mesh(MeshConfig(*sizes))
    layout, step = prepared(mesh, model)
    batch = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=batch_sharding(mesh)), random_batch(0)
    )
    options = {"xla_dump_to": str(tmp_path), "xla_dump_hlo_pass_re": "spmd-partitioning"}
    with jax.set_mesh(mesh):
        step.lower(layout.abstract, batch).compile(compiler_options=options)
    (program,) = tmp_path.glob("*after_spmd-partitioning*")
    sums = re.findall(r"= (\w+)\[([\d,]*)\]\S* all-reduce\(", program.read_text())
    assert len(sums) > 20
    low = [shape for dtype, shape in sums if dtype == "bf16"]
    assert all(shape.count(",") == 2 for shape in low) if mesh.shape["tensor"] > 1 else not low


def test_sizes_that_do_not_divide_are_explained():
    mesh = make_mesh(MeshConfig(1, 1, 8))
    heads = r"mesh.tensor \(8\) must divide .* parameter .*attention.* in the dimension of size 4\. Choose mesh.tensor"
    with pytest.raises(ConfigError, match=heads):
        prepared(mesh)
    with pytest.raises(ConfigError, match=r"3 x 1 x 4 = 12 devices, but JAX has 8"):
        make_mesh(MeshConfig(3, 1, 4))
    with pytest.raises(ConfigError, match="mesh axes must be at least 1"):
        make_mesh(MeshConfig(1, 0, 1))
    with pytest.raises(ConfigError, match=r"a batch \(12 rows\) must divide evenly over .* = 8; nearest: 8, 16"):
        check_rows(12, make_mesh(MeshConfig(4, 2, 1)), ("data", "fsdp"), "a batch")


def test_a_mesh_that_rows_do_not_divide_over_says_what_to_set(tmp_path):
    folder = tmp_path / "run"
    values = {
        "data": {"kind": "number_words", "num_train": 300},
        "tokenizer": {"vocab_size": 60},
        "batching": {"tokens_per_batch": 640, "row_multiple": 4},
        "mesh": {"data": 8},
    }
    config = from_dict(Config, values | {"run": str(folder)})
    with pytest.raises(ConfigError, match=r"a batch, or a micro-batch .* = 8; .*Set batching.row_multiple: 8\."):
        run_experiment(config)
    assert not folder.exists()
