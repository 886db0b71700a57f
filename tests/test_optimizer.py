"""The schedule by hand, and one update of clipped Adam in NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer.errors import ConfigError
from flax_transformer.training.optimizer import OptimizerConfig, make_optimizer, noam_schedule


def test_defaults_are_the_papers():
    config = OptimizerConfig()
    assert (config.beta1, config.beta2, config.epsilon, config.warmup_steps) == (0.9, 0.98, 1e-9, 4000)


def test_the_schedule_rises_linearly_and_falls_with_the_root():
    rate = noam_schedule(OptimizerConfig(learning_rate_scale=2.0, warmup_steps=100), model_dim=64)
    peak = 2.0 * 64**-0.5 * 100**-0.5
    found = [np.asarray(rate(count)) for count in (0, 49, 99, 399)]  # 0 updates made: this is step 1
    np.testing.assert_allclose(found, [peak / 100, peak / 2, peak, peak / 2], rtol=1e-6)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_two_updates_equal_adam_by_hand(clip):
    config = OptimizerConfig(clip_norm=clip, warmup_steps=10)
    schedule = noam_schedule(config, model_dim=16)
    optimizer = make_optimizer(config, schedule)
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
    "field, value",
    [("learning_rate_scale", float("nan")), ("learning_rate_scale", float("inf")), ("epsilon", 0.0),
     ("clip_norm", float("nan")), ("clip_norm", -1.0), ("beta2", 1.0), ("warmup_steps", 0)],
)  # fmt: skip
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(ConfigError, match=f"optimizer.{field} must"):
        OptimizerConfig(**{field: value})
