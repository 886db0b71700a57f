"""The optimiser, built from optax, and which parameters decay."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import optax
from optax import contrib

from flax_transformer.errors import ConfigError, check_fields, shown
from flax_transformer.models.parameters import ParameterInfo

DECAYS_TO_AN_END = ("linear", "cosine")
# Root mean square of Adam's updates, from Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2. Muon's
# updates are scaled to it, so that Muon takes AdamW's learning rates and weight decay.
MUON_UPDATE_RMS = 0.2


# --- section optimizer


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of the optimiser and of its learning rate.

    The defaults are those of the Transformer paper. The paper does not mention clipping, so `clip_norm` is our own.

    Attributes:
        name: "adam", "adamw" (Adam with weight decay), "adafactor", "lion" or "muon". Adafactor has no momentum, and
            does not scale updates by the size of parameters. With "muon" the kernels are trained by Muon, and all other
            parameters by Adam with Nesterov momentum. Only kernels can then have weight decay.
        schedule: course of the learning rate after a linear warm-up. "noam" is the inverse square root of the
            Transformer paper, with a highest rate that depends on model_dim. With "inverse_sqrt", "cosine", "linear"
            and "constant" the highest rate is learning_rate.
        learning_rate: highest learning rate. Every schedule but "noam" needs it.
        learning_rate_scale: factor on the schedule "noam".
        warmup_steps: number of steps of the linear warm-up.
        decay_steps: step at which the schedules "cosine" and "linear" end. It does not change with training.steps, so a
            longer training keeps its schedule.
        final_fraction: learning rate from decay_steps on, as a fraction of the highest.
        beta1: decay of the first moment in Adam; Lion and Muon's Adam use it, too.
        beta2: decay of the second moment in Adam; Lion and Muon's Adam use it, too.
        epsilon: number that Adam adds to its denominator.
        clip_norm: maximum global norm of the gradient; larger gradients are scaled down to it. 0 turns clipping off.
        weight_decay: decoupled weight decay. Each update subtracts weight_decay * learning rate * parameter.
        weight_decay_include: regular expression for the parameters with weight decay. It is searched in a path such as
            encoder/layers/feed_forward/up/kernel.
        weight_decay_exclude: regular expression for all other parameters. With weight decay every parameter must match
            exactly one of the two expressions.

    Raises:
        ConfigError: a value is out of range, or fields contradict each other.

    Example:
        >>> OptimizerConfig(name="adamw", schedule="constant", learning_rate=3e-4, weight_decay=0.01).beta2
        0.98
    """

    name: Literal["adam", "adamw", "adafactor", "lion", "muon"] = "adam"
    schedule: Literal["noam", "inverse_sqrt", "cosine", "linear", "constant"] = "noam"
    learning_rate: float | None = None
    learning_rate_scale: float = 1.0
    warmup_steps: int = 4_000
    decay_steps: int | None = None
    final_fraction: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-9
    clip_norm: float = 1.0
    weight_decay: float = 0.0
    weight_decay_include: str = "kernel$"
    weight_decay_exclude: str = "(bias|scale|table|vector)$"

    def __post_init__(self):
        check_fields("optimizer", self)
        for name in ("epsilon", "learning_rate_scale", "learning_rate"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ConfigError(f"optimizer.{name} must be positive, got {getattr(self, name)}.")
        if self.warmup_steps < 1:
            raise ConfigError(f"optimizer.warmup_steps must be at least 1, got {self.warmup_steps}.")
        for name in ("clip_norm", "weight_decay"):
            if getattr(self, name) < 0:
                raise ConfigError(f"optimizer.{name} must not be negative (0 turns it off), got {getattr(self, name)}.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name} must lie in [0, 1), got {getattr(self, name)}.")
        if not 0 <= self.final_fraction <= 1:
            raise ConfigError(f"optimizer.final_fraction must lie in [0, 1], got {self.final_fraction}.")
        if self.schedule == "noam" and self.learning_rate is not None:
            raise ConfigError(
                "optimizer.learning_rate is not used by the schedule noam, whose height follows from model_dim and "
                "warmup_steps. Set optimizer.learning_rate_scale, or another optimizer.schedule."
            )
        if self.schedule != "noam" and (self.learning_rate is None or self.learning_rate_scale != 1.0):
            raise ConfigError(
                f"optimizer.schedule: {self.schedule} needs optimizer.learning_rate, the highest rate; "
                "learning_rate_scale belongs to noam alone."
            )
        ends = self.schedule in DECAYS_TO_AN_END
        if ends and (self.decay_steps is None or self.decay_steps <= self.warmup_steps):
            raise ConfigError(
                f"optimizer.schedule: {self.schedule} needs optimizer.decay_steps, the step at which it ends, beyond "
                f"warmup_steps ({self.warmup_steps}); got {self.decay_steps}. Often it is training.steps."
            )
        if not ends and self.decay_steps is not None:
            raise ConfigError(f"optimizer.schedule: {self.schedule} has no end; leave out optimizer.decay_steps.")
        if self.name == "adam" and self.weight_decay:
            raise ConfigError(
                "optimizer.name: adam has no weight decay. Set optimizer.name: adamw, or weight_decay: 0."
            )
        for name in ("weight_decay_include", "weight_decay_exclude"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                raise ConfigError(f"optimizer.{name} is not a regular expression: {error}.") from error


# --- which parameters decay


def _path(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def decays(config: OptimizerConfig, params: Any) -> Any:
    """Returns a tree of bools, True for the parameters with weight decay.

    Raises:
        ConfigError: parameters match neither or both of the two expressions; the message names all of them.
    """

    def match(rule: str, path: Any) -> bool:
        return re.search(rule, _path(path)) is not None

    include, exclude = config.weight_decay_include, config.weight_decay_exclude
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    found = {path: (match(include, path), match(exclude, path)) for path in paths}
    wrong = [f"{_path(path)} ({'both' if yes else 'neither'})" for path, (yes, no) in found.items() if yes == no]
    if wrong:
        raise ConfigError(
            f"optimizer.weight_decay_include ({shown(include)}) and optimizer.weight_decay_exclude ({shown(exclude)}) "
            f"must say of every parameter whether it decays, but of {len(wrong)} they do not: {', '.join(wrong)}."
        )
    return jax.tree_util.tree_map_with_path(lambda path, _: found[path][0], params)


# --- kernels as matrices


def matrix_axes(params: Any, parameter_info: Any) -> Any:
    """Returns a tree with the row and column axes of each kernel as a matrix, and None for other parameters.

    Args:
        params: tree of some of a model's parameters, or of their gradients.
        parameter_info: tree of the `ParameterInfo` of all parameters of the model.
    """

    def axes(info: ParameterInfo, _: Any) -> contrib.MuonDimensionNumbers | None:
        return None if info.matrix_axes is None else contrib.MuonDimensionNumbers(*info.matrix_axes)

    return _map_with_info(axes, parameter_info, params)


def _map_with_info(function: Callable[..., Any], parameter_info: Any, *trees: Any) -> Any:
    """Returns the tree of `function(info, *leaves)` over `trees`, which may lack some of the model's parameters."""
    info_of = dict(jax.tree_util.tree_leaves_with_path(parameter_info))
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(info_of[path], *leaves), *trees)


def _as_matrices(tree: Any, parameter_info: Any) -> Any:
    """Returns a tree of parameters or gradients with every kernel as [inputs, outputs] or [layers, inputs, outputs]."""

    def flatten(info: ParameterInfo, leaf: Any) -> Any:
        if info.matrix_axes is None:
            return leaf
        inputs, _ = info.matrix_axes
        layers = leaf.shape[: inputs[0]]
        return leaf.reshape(*layers, math.prod(leaf.shape[axis] for axis in inputs), -1)

    return _map_with_info(flatten, parameter_info, tree)


# --- Adafactor


def scale_by_adafactor(parameter_info: Any) -> optax.GradientTransformation:
    """Returns Adafactor's transformation of gradients, before the learning rate.

    It divides by the factored root mean square. Then it clips the update of each layer's matrix or vector to a root
    mean square of 1.

    Args:
        parameter_info: tree of the parameters' `ParameterInfo`.

    References:
        Shazeer and Stern 2018, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", sections 3 and 6.
    """
    factored, clip = optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)

    def init(params: Any) -> Any:
        return factored.init(_as_matrices(params, parameter_info))

    def clip_one(update: Any) -> Any:
        return clip.update(update, optax.EmptyState())[0]

    def clipped(info: ParameterInfo, update: Any, gradient: Any) -> Any:
        return (jax.vmap(clip_one) if info.stacked else clip_one)(update).reshape(gradient.shape)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        scaled, state = factored.update(
            _as_matrices(updates, parameter_info), state, _as_matrices(params, parameter_info)
        )
        return _map_with_info(clipped, parameter_info, scaled, updates), state

    return optax.GradientTransformation(init, update)


# --- the choice


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, parameter_info: Any
) -> optax.GradientTransformation:
    """Returns the chain of clipping, the optimiser, weight decay and the schedule.

    Args:
        config: name and settings of the optimiser.
        schedule: learning rate.
        parameter_info: tree of the parameters' `ParameterInfo`. It tells kernels from other parameters.

    Raises:
        ConfigError: with Muon, a parameter that is no kernel has weight decay.

    Example:
        >>> params = {"kernel": np.ones((2, 2), np.float32)}
        >>> info = {"kernel": ParameterInfo((2, 2), ("embed", "mlp"), num_in_dims=1)}
        >>> config = OptimizerConfig(name="lion", schedule="constant", learning_rate=0.5, clip_norm=0.0)
        >>> optimizer = make_optimizer(config, optax.constant_schedule(0.5), info)
        >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
        >>> updates["kernel"].tolist()
        [[-0.5, -0.5], [-0.5, -0.5]]
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()

    def mask(params: Any) -> Any:
        return decays(config, params)

    if config.name == "muon":
        if config.weight_decay:
            _check_only_kernels_decay(config, parameter_info)
        muon = contrib.muon(
            schedule,
            weight_decay=config.weight_decay,
            weight_decay_mask=mask if config.weight_decay else None,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            eps=config.epsilon,
            muon_weight_dimension_numbers=lambda params: matrix_axes(params, parameter_info),
            consistent_rms=MUON_UPDATE_RMS,
        )
        return optax.chain(clip, muon)
    scale = {
        "adam": lambda: optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon),
        "adamw": lambda: optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon),
        "adafactor": lambda: scale_by_adafactor(parameter_info),
        "lion": lambda: optax.scale_by_lion(b1=config.beta1, b2=config.beta2),
    }[config.name]()
    decay = optax.add_decayed_weights(config.weight_decay, mask) if config.weight_decay else optax.identity()
    return optax.chain(clip, scale, decay, optax.scale_by_learning_rate(schedule))


def _check_only_kernels_decay(config: OptimizerConfig, parameter_info: Any) -> None:
    """Raises a `ConfigError` if a parameter other than a kernel has weight decay."""
    decaying = dict(jax.tree_util.tree_leaves_with_path(decays(config, parameter_info)))
    infos = jax.tree_util.tree_leaves_with_path(parameter_info)
    wrong = [_path(path) for path, info in infos if decaying[path] and info.matrix_axes is None]
    if wrong:
        raise ConfigError(
            "optimizer.name: muon lets weight decay act on kernels alone, but optimizer.weight_decay_include "
            f"({shown(config.weight_decay_include)}) matches {', '.join(wrong[:4])}."
        )
