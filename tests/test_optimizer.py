"""Schedules by hand, clipped Adam in NumPy, and what the other optimisers promise."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_transformer.errors import ConfigError
from flax_transformer.models.parameters import ParameterInfo
from flax_transformer.models.recurrent_config import RecurrentConfig
from flax_transformer.optim.optimizer import OptimizerConfig, decays, make_optimizer, matrix_axes, scale_by_adafactor
from flax_transformer.optim.schedule import make_schedule
from flax_transformer.parallel.mesh import MeshConfig, make_mesh
from flax_transformer.training.state import describe_parameters, make_layout
from tests import tiny

LINEAR = {"kernel": ParameterInfo((6, 4), ("embed", "mlp"), num_in_dims=1), "bias": ParameterInfo((4,), ("mlp",))}


def by_path(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is None or isinstance(x, tuple))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def test_defaults_are_the_papers():
    config = OptimizerConfig()
    assert (config.beta1, config.beta2, config.epsilon, config.warmup_steps) == (0.9, 0.98, 1e-9, 4000)


def test_the_schedule_rises_linearly_and_falls_with_the_root():
    rate = make_schedule(OptimizerConfig(learning_rate_scale=2.0, warmup_steps=100), model_dim=64)
    peak = 2.0 * 64**-0.5 * 100**-0.5
    found = [np.asarray(rate(count)) for count in (0, 49, 99, 399)]  # 0 updates made: this is step 1
    np.testing.assert_allclose(found, [peak / 100, peak / 2, peak, peak / 2], rtol=1e-6)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_two_updates_equal_adam_by_hand(clip):
    config = OptimizerConfig(clip_norm=clip, warmup_steps=10)
    schedule = make_schedule(config, model_dim=16)
    optimizer = make_optimizer(config, schedule, {})
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(3, 2)), "b": rng.normal(size=4)}
    state = optimizer.init(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params))
    first = {k: np.zeros_like(v) for k, v in params.items()}
    second = {k: np.zeros_like(v) for k, v in params.items()}
    for step in (1, 2):
        gradients = {k: rng.normal(size=v.shape) for k, v in params.items()}
        with jax.numpy_dtype_promotion("standard"):
            changes, state = optimizer.update(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), gradients), state)
        updates: dict[str, Any] = jax.device_get(changes)
        norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        scale = min(1.0, clip / norm) if clip else 1.0
        rate = 16**-0.5 * min(step**-0.5, step * 10**-1.5)
        for name, g in gradients.items():
            first[name] = 0.9 * first[name] + 0.1 * scale * g
            second[name] = 0.98 * second[name] + 0.02 * (scale * g) ** 2
            expected = -rate * (first[name] / (1 - 0.9**step)) / (np.sqrt(second[name] / (1 - 0.98**step)) + 1e-9)
            np.testing.assert_allclose(updates[name], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "schedule, more, expected",
    [
        ("inverse_sqrt", {}, [0.02, 1.0, 2.0, 1.0]),
        ("constant", {}, [0.02, 1.0, 2.0, 2.0]),
        ("linear", {"decay_steps": 700, "final_fraction": 0.1}, [0.02, 1.0, 2.0, 1.1]),
        ("cosine", {"decay_steps": 700, "final_fraction": 0.1}, [0.02, 1.0, 2.0, 1.1]),
    ],
)
def test_schedules_rise_to_the_rate_and_go_their_way(schedule, more, expected):
    """At steps 1, 50, 100 (the end of the warm-up) and 400, half-way from there to the end."""
    config = OptimizerConfig(schedule=schedule, learning_rate=2.0, warmup_steps=100, **more)
    rate = make_schedule(config, model_dim=64)
    np.testing.assert_allclose([np.asarray(rate(step - 1)) for step in (1, 50, 100, 400)], expected, rtol=1e-5)
    if more:
        np.testing.assert_allclose([np.asarray(rate(step - 1)) for step in (700, 900)], [0.2, 0.2], rtol=1e-5)


NAMES = ["adam", "adamw", "adafactor", "lion", "muon"]


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_goes_downhill_and_fits_a_mesh(name):
    config = OptimizerConfig(
        name, "constant", learning_rate=0.02, warmup_steps=1, weight_decay=0.0 if name == "adam" else 0.01
    )
    schedule = make_schedule(config, 16)

    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    of_model = make_optimizer(config, schedule, describe_parameters(tiny.config(), tiny.VOCABULARY))
    layout = make_layout(tiny.config(), tiny.VOCABULARY, of_model, mesh)  # raises where a sharding does not fit
    sizes = [leaf.size for leaf in jax.tree.leaves(layout.shapes.optimizer)]
    states = {"adam": 2, "adamw": 2, "lion": 1}.get(name)
    if states:
        assert sum(sizes) >= states * layout.num_parameters
    for leaf, sharding in zip(
        jax.tree.leaves(layout.shapes.optimizer), jax.tree.leaves(layout.shardings.optimizer), strict=True
    ):
        sharding.shard_shape(leaf.shape)

    rng = np.random.default_rng(0)
    goal = {"up": {"kernel": rng.normal(size=(6, 4)), "bias": rng.normal(size=4)}}
    goal = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), goal)
    params = jax.tree.map(jnp.zeros_like, goal)
    optimizer = make_optimizer(config, schedule, {"up": LINEAR})

    def loss(params):
        return sum(jnp.sum((a - b) ** 2) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(goal), strict=True))

    @jax.jit
    def step(params, state):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

    state, first = optimizer.init(params), float(loss(params))
    for _ in range(60):
        params, state = step(params, state)
    assert float(loss(params)) < 0.5 * first


def test_weight_decay_takes_from_kernels_alone():
    config = OptimizerConfig("adamw", "constant", learning_rate=0.5, warmup_steps=1, weight_decay=0.1)
    optimizer = make_optimizer(config, make_schedule(config, 16), {"up": LINEAR})
    params = {"up": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}}
    with jax.numpy_dtype_promotion("standard"):
        changes, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    updates: dict[str, Any] = jax.device_get(changes)
    np.testing.assert_allclose(updates["up"]["kernel"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates["up"]["bias"], 0.0)


@pytest.mark.parametrize("model", [tiny.config(positions="learned"), RecurrentConfig(attention="additive")])
def test_every_parameter_of_every_model_decays_or_does_not(model):
    found = by_path(decays(OptimizerConfig(), describe_parameters(model, tiny.VOCABULARY)))
    assert {path for path, decay in found.items() if decay} == {path for path in found if "kernel" in path}


def test_a_parameter_that_no_rule_or_both_match_is_named():
    params = {"up": {"kernel": 0, "bias": 0}, "gate": 0}
    with pytest.raises(ConfigError, match=r"of 1 they do not: gate \(neither\)"):
        decays(OptimizerConfig(), params)
    with pytest.raises(ConfigError, match=r"of 2 they do not: gate \(neither\), up/bias \(both\)"):
        decays(OptimizerConfig(weight_decay_include="up"), params)


def test_muon_refuses_to_let_anything_but_kernels_decay():
    config = OptimizerConfig(
        "muon", weight_decay=0.1, weight_decay_include="(kernel|table)$", weight_decay_exclude="(bias|scale)$"
    )
    parameter_info = {"target": {"table": ParameterInfo((8, 4), ("vocab", "embed"))}, "up": LINEAR}
    with pytest.raises(ConfigError, match=r"muon lets weight decay act on kernels alone, .* matches target/table"):
        make_optimizer(config, make_schedule(config, 16), parameter_info)


def test_muon_takes_kernels_as_matrices_and_leaves_the_rest_to_adam():
    """Axis 0 is the layer of a stack; heads and their channels are one axis of a matrix, as are gates and units."""
    attention = {"query": ((1,), (2, 3)), "key": ((1,), (2, 3)), "value": ((1,), (2, 3)), "output": ((1, 2), (3,))}
    feed_forward = {"up": ((1,), (2,)), "down": ((1,), (2,))}
    transformer = {
        f"{stack}/layers/{layer}/{name}/kernel": axes
        for stack, layer, kernels in [
            ("encoder", "self_attention", attention),
            ("encoder", "feed_forward", feed_forward),
            ("decoder", "self_attention", attention),
            ("decoder", "cross_attention", attention),
            ("decoder", "feed_forward", feed_forward),
        ]
        for name, axes in kernels.items()
    }
    cells = ("encoder/cells/forward_00", "encoder/cells/backward_00", "decoder/cells/00")
    recurrent = {
        **{f"{cell}/{of}_kernel": ((0,), (1, 2)) for cell in cells for of in ("input", "recurrent")},
        "decoder/cells/00/context_kernel": ((0,), (1, 2)),
        **{f"decoder/{name}/kernel": ((0,), (1,)) for name in ("alignment/key", "alignment/query", "readout")},
        **{f"bridge/maps/00_{state}/kernel": ((0,), (1,)) for state in (0, 1)},
    }
    for model, expected in ((tiny.config(output_bias=True), transformer), (RecurrentConfig(), recurrent)):
        parameter_info = describe_parameters(model, tiny.VOCABULARY)
        found = by_path(matrix_axes(parameter_info, parameter_info))
        assert {path: axes for path, axes in found.items() if axes is not None} == expected
        assert "target_embedding/table" in found


def test_adafactor_of_a_stack_of_layers_is_that_of_each_layers_matrices():
    layers, model_dim, heads, head_dim = 2, 128, 4, 32
    shapes = {
        "query": {"kernel": (model_dim, heads, head_dim), "bias": (heads, head_dim)},
        "output": {"kernel": (heads, head_dim, model_dim)},
        "up": {"kernel": (model_dim, 160)},
        "norm": {"scale": (model_dim,)},
    }
    apart_shapes = {
        "query": {"kernel": (model_dim, model_dim), "bias": (heads, head_dim)},
        "output": {"kernel": (model_dim, model_dim)},
        "up": {"kernel": (model_dim, 160)},
        "norm": {"scale": (model_dim,)},
    }
    rng = np.random.default_rng(0)
    size_of_layer = np.array([1.0, 100.0])  # so that to clip both together would be another thing

    def draw(shape):
        scale = size_of_layer.reshape(-1, *(1 for _ in shape))
        return jnp.asarray(scale * rng.normal(size=(layers, *shape)), jnp.float32)

    def layer_of(tree, layer):
        return jax.tree.map(lambda leaf, shape: leaf[layer].reshape(shape), tree, apart_shapes)

    parameter_info = {
        "query": {
            "kernel": ParameterInfo((2, *shapes["query"]["kernel"]), ("layers", "embed", "heads", "head_dim"), 1),
            "bias": ParameterInfo((2, *shapes["query"]["bias"]), ("layers", "heads", "head_dim")),
        },
        "output": {
            "kernel": ParameterInfo((2, *shapes["output"]["kernel"]), ("layers", "heads", "head_dim", "embed"), 2)
        },
        "up": {"kernel": ParameterInfo((2, *shapes["up"]["kernel"]), ("layers", "embed", "mlp"), 1)},
        "norm": {"scale": ParameterInfo((2, model_dim), ("layers", "norm"))},
    }
    stacked = scale_by_adafactor(parameter_info)
    alone = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    is_shape = {"is_leaf": lambda x: isinstance(x, tuple)}
    params = jax.tree.map(draw, shapes, **is_shape)
    state = stacked.init(params)
    states = [alone.init(layer_of(params, layer)) for layer in range(layers)]
    kept = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert kept < 0.02 * sum(leaf.size for leaf in jax.tree.leaves(params))
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(3):
            gradients = jax.tree.map(draw, shapes, **is_shape)
            changes, state = stacked.update(gradients, state, params)
            updates: Any = changes
            for layer in range(layers):
                expected, states[layer] = alone.update(
                    layer_of(gradients, layer), states[layer], layer_of(params, layer)
                )
                chex.assert_trees_all_close(layer_of(updates, layer), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"schedule": "cosine", "learning_rate": 1.0}, "needs optimizer.decay_steps"),
        ({"schedule": "linear", "learning_rate": 1.0, "decay_steps": 4000}, r"beyond warmup_steps \(4000\); got 4000"),
        ({"schedule": "constant"}, "constant needs optimizer.learning_rate"),
        ({"schedule": "constant", "learning_rate": 1.0, "decay_steps": 9000}, "has no end; leave out"),
        ({"learning_rate": 1.0}, "learning_rate is not used by the schedule noam"),
        ({"weight_decay": 0.1}, "adam has no weight decay. Set optimizer.name: adamw"),
        ({"weight_decay_include": "("}, "optimizer.weight_decay_include is not a regular expression"),
    ],
)
def test_options_that_contradict_are_explained(values, message):
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**values)


@pytest.mark.parametrize(
    "field, value",
    [("learning_rate_scale", float("nan")), ("learning_rate_scale", float("inf")), ("epsilon", 0.0),
     ("clip_norm", float("nan")), ("clip_norm", -1.0), ("beta2", 1.0), ("warmup_steps", 0),
     ("weight_decay", -0.1), ("final_fraction", 1.5)],
)  # fmt: skip
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(ConfigError, match=f"optimizer.{field} must"):
        OptimizerConfig(**{field: value})
