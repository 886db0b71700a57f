"""The optimiser, built from optax, and which parameters decay."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import optax
from optax import contrib

from flax_transformer.errors import ConfigError, check_finite
from flax_transformer.models.parameters import ParameterInfo

DECAYS_TO_AN_END = ("linear", "cosine")
# The root mean square of Adam's updates as Liu et al. 2025 ("Muon is Scalable for LLM Training", section 2.2) found it:
# scaled to it, Muon takes the learning rates and the weight decay that AdamW takes.
MUON_UPDATE_RMS = 0.2


@dataclass(frozen=True)
class OptimizerConfig:
    """How parameters change; the defaults are the Transformer paper's, but for `clip_norm`, of which it says nothing.

    Attributes:
        name: "adam", "adamw" (Adam with weight decay), "adafactor" (without momentum, and at the schedule's rate,
            whatever the size of a parameter), "lion", or "muon" (kernels by Muon, the rest by Adam with Nesterov
            momentum; only kernels can decay).
        schedule: "noam" (the paper's: linear warm-up, then the inverse square root, its height given by model_dim), or
            linear warm-up to `learning_rate` and then "inverse_sqrt", "cosine", "linear" or "constant".
        learning_rate: highest rate, of every schedule but noam, which needs none.
        learning_rate_scale: factor on the noam schedule.
        warmup_steps: steps of linear warm-up.
        decay_steps: step at which "cosine" and "linear" reach their end; they need it, so that a run that is trained
            longer than planned keeps its schedule.
        final_fraction: rate at that end, as a fraction of the highest.
        beta1, beta2, epsilon: of Adam, Lion (the betas) and Adam's part in Muon; Adafactor has its own.
        clip_norm: gradients are scaled down to this global norm when they exceed it; 0 turns clipping off.
        weight_decay: decoupled: times the learning rate, it is taken off the decaying parameters in each update.
        weight_decay_include, weight_decay_exclude: regular expressions, searched in a parameter's path, such as
            encoder/layers/feed_forward/up/kernel. With weight decay every parameter must match exactly one of the two.
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
        check_finite("optimizer", self)
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


def _path(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def decays(config: OptimizerConfig, params: Any) -> Any:
    """Returns a tree of bools, True for the parameters that weight decay pulls to zero.

    Raises:
        ConfigError: parameters that match neither or both of the two expressions; all are named.
    """

    def match(rule: str, path: Any) -> bool:
        return re.search(rule, _path(path)) is not None

    include, exclude = config.weight_decay_include, config.weight_decay_exclude
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    found = {path: (match(include, path), match(exclude, path)) for path in paths}
    wrong = [f"{_path(path)} ({'both' if yes else 'neither'})" for path, (yes, no) in found.items() if yes == no]
    if wrong:
        raise ConfigError(
            f"optimizer.weight_decay_include ({include!r}) and optimizer.weight_decay_exclude ({exclude!r}) must say "
            f"of every parameter whether it decays, but of {len(wrong)} they do not: {', '.join(wrong)}."
        )
    return jax.tree_util.tree_map_with_path(lambda path, _: found[path][0], params)


def matrix_axes(params: Any, parameter_info: Any) -> Any:
    """Returns, for each kernel, which axes are rows and which are columns of a matrix, and None for other parameters.

    Args:
        params: a tree of some of a model's parameters, or of their gradients.
        parameter_info: the tree of `ParameterInfo` of all its parameters.
    """

    def axes(info: ParameterInfo, _: Any) -> contrib.MuonDimensionNumbers | None:
        return None if info.matrix_axes is None else contrib.MuonDimensionNumbers(*info.matrix_axes)

    return _map_with_info(axes, parameter_info, params)


def _map_with_info(function: Callable[..., Any], parameter_info: Any, *trees: Any) -> Any:
    """Returns the tree of `function(info, *leaves)` for each leaf of `trees`, which may lack some of the parameters."""
    info_of = dict(jax.tree_util.tree_leaves_with_path(parameter_info))
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(info_of[path], *leaves), *trees)


def _as_matrices(tree: Any, parameter_info: Any) -> Any:
    """Returns a tree of parameters or of their gradients with every kernel as [inputs, outputs], or a stack of such."""

    def flatten(info: ParameterInfo, leaf: Any) -> Any:
        if info.matrix_axes is None:
            return leaf
        inputs, _ = info.matrix_axes
        layers = leaf.shape[: inputs[0]]
        return leaf.reshape(*layers, math.prod(leaf.shape[axis] for axis in inputs), -1)

    return _map_with_info(flatten, parameter_info, tree)


def scale_by_adafactor(parameter_info: Any) -> optax.GradientTransformation:
    """Returns Adafactor's transformation of gradients, before the learning rate.

    It divides by the factored root mean square. Then it clips the update of each layer's matrix or vector to a root
    mean square of 1.

    Args:
        parameter_info: the tree of the parameters' `ParameterInfo`.

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


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, parameter_info: Any
) -> optax.GradientTransformation:
    """Returns clipping, then the optimiser, then weight decay, then the schedule.

    Args:
        config: which, and its settings.
        schedule: the learning rate.
        parameter_info: the tree of the parameters' `ParameterInfo`; it tells matrices from other parameters.

    Raises:
        ConfigError: weight decay of a parameter that Muon cannot let decay.
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
    """Raises a `ConfigError` if a parameter that is no kernel decays: Muon leaves it to Adam without weight decay."""
    decaying = dict(jax.tree_util.tree_leaves_with_path(decays(config, parameter_info)))
    infos = jax.tree_util.tree_leaves_with_path(parameter_info)
    wrong = [_path(path) for path, info in infos if decaying[path] and info.matrix_axes is None]
    if wrong:
        raise ConfigError(
            "optimizer.name: muon lets weight decay act on kernels alone, but optimizer.weight_decay_include "
            f"({config.weight_decay_include!r}) matches {', '.join(wrong[:4])}."
        )
