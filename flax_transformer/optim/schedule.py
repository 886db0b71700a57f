"""The learning rate over the course of a training."""

import jax.numpy as jnp
import optax

from flax_transformer.optim.optimizer import OptimizerConfig


def make_schedule(config: OptimizerConfig, model_dim: int) -> optax.Schedule:
    """Returns the learning rate as a function of the number of updates already made (0 for the first).

    With step = n + 1, the schedule "noam" is

        rate(n) = scale * D^-0.5 * min(step^-0.5, step * warmup^-1.5)

    All others rise linearly to `learning_rate` at step = warmup. Then each follows its own curve.

    Example:
        >>> config = OptimizerConfig(schedule="constant", learning_rate=1.0, warmup_steps=4)
        >>> [float(make_schedule(config, model_dim=64)(n)) for n in (0, 1, 9)]
        [0.25, 0.5, 1.0]

    References:
        Vaswani et al. 2017, section 5.3, equation 3.
    """
    warmup = config.warmup_steps
    if config.schedule == "noam":
        peak = config.learning_rate_scale * model_dim**-0.5 * warmup**-0.5
    else:
        assert config.learning_rate is not None, "checked by the configuration"
        peak = config.learning_rate
    span = (config.decay_steps or 0) - warmup
    after = {  # functions of the number of steps since the warm-up
        "noam": lambda step: peak * (warmup / (warmup + step)) ** 0.5,
        "inverse_sqrt": lambda step: peak * (warmup / (warmup + step)) ** 0.5,
        "constant": optax.constant_schedule(peak),
        "linear": lambda step: optax.linear_schedule(peak, config.final_fraction * peak, span)(step),
        "cosine": lambda step: optax.cosine_decay_schedule(peak, span, config.final_fraction)(step),
    }[config.schedule]

    def rate(count):
        step = jnp.asarray(count, jnp.float32) + 1.0
        return jnp.where(step < warmup, peak * step / warmup, after(jnp.maximum(step - warmup, 0.0)))

    return rate
