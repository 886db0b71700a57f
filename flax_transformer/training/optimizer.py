"""The optimiser and its learning-rate schedule."""

from dataclasses import dataclass

import jax.numpy as jnp
import optax

from flax_transformer.errors import ConfigError, check_finite


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam with the warm-up schedule of the Transformer paper.

    Attributes:
        learning_rate_scale: factor on the schedule.
        warmup_steps: steps of linear warm-up.
        beta1, beta2, epsilon: of Adam; the defaults are the paper's.
        clip_norm: gradients are scaled down to this global norm when they exceed it; 0 turns clipping off.
    """

    learning_rate_scale: float = 1.0
    warmup_steps: int = 4_000
    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-9
    clip_norm: float = 1.0

    def __post_init__(self):
        check_finite("optimizer", self)
        if self.epsilon <= 0:
            raise ConfigError(f"optimizer.epsilon must be positive, got {self.epsilon}.")
        if self.warmup_steps < 1:
            raise ConfigError(f"optimizer.warmup_steps must be at least 1, got {self.warmup_steps}.")
        if self.learning_rate_scale <= 0:
            raise ConfigError(f"optimizer.learning_rate_scale must be positive, got {self.learning_rate_scale}.")
        if self.clip_norm < 0:
            raise ConfigError(f"optimizer.clip_norm must not be negative (0 turns it off), got {self.clip_norm}.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name} must lie in [0, 1), got {getattr(self, name)}.")


def noam_schedule(config: OptimizerConfig, model_dim: int) -> optax.Schedule:
    """Returns the learning rate as a function of the number of updates already made (0 for the first).

        rate(n) = scale * D^-0.5 * min(step^-0.5, step * warmup^-1.5),    step = n + 1

    References:
        Vaswani et al. 2017, section 5.3, equation 3.
    """

    def rate(count):
        step = jnp.asarray(count, jnp.float32) + 1.0
        return config.learning_rate_scale * model_dim**-0.5 * jnp.minimum(step**-0.5, step * config.warmup_steps**-1.5)

    return rate


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns clipping, then Adam, then the schedule."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    adam = optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon)
    return optax.chain(clip, adam, optax.scale_by_learning_rate(schedule))
