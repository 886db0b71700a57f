"""The training state: parameters, optimiser state and step, born sharded."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from flax_transformer.models.build import ModelConfig, VocabularyInfo, build_model
from flax_transformer.models.parameters import parameter_info
from flax_transformer.models.seq2seq import Seq2Seq
from flax_transformer.parallel.mesh import replicated_sharding
from flax_transformer.parallel.sharding_rules import parameter_shardings
from flax_transformer.shapes import array_tree


@array_tree
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes; plain dicts of arrays, no module.

    Attributes:
        step: int32 scalar, updates made.
        params: nested dict of parameters.
        optimizer: optax state.
        average: exponential moving average of the parameters, or None when none is kept.
    """

    step: Any
    params: Any
    optimizer: Any
    average: Any = None

    @property
    def usable(self) -> Any:
        """The parameters to evaluate, and to translate with: the average where there is one."""
        return self.params if self.average is None else self.average

    def starting_from(self, params: Any) -> "TrainState":
        """Returns this state with other parameters, of which the average, if any, is a copy."""
        average = None if self.average is None else jax.tree.map(jnp.copy, params)
        return dataclasses.replace(self, params=params, average=average)


@dataclasses.dataclass(frozen=True)
class StateLayout:
    """Shapes and shardings of a training state, before any array exists.

    Attributes:
        graphdef: the model without its parameters; `nnx.merge(graphdef, params)` gives the model.
        shapes: `TrainState` of shapes and dtypes.
        shardings: `TrainState` of shardings.
        optimizer: the transformation that the optimiser state belongs to.
        ema_decay: decay of the parameters' moving average; 0 keeps none.
    """

    graphdef: Any
    shapes: TrainState
    shardings: TrainState
    optimizer: optax.GradientTransformation
    ema_decay: float

    @property
    def abstract(self) -> TrainState:
        """Shapes with shardings: the target of a restore."""
        return jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), self.shapes, self.shardings
        )

    @property
    def num_parameters(self) -> int:
        """Number of trained values, padding rows of the vocabulary included."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.shapes.params))


@functools.cache
def _model_of_shapes(model: ModelConfig, vocabulary: VocabularyInfo) -> Seq2Seq:
    return nnx.eval_shape(lambda: build_model(model, vocabulary, rngs=nnx.Rngs(params=0)))


def abstract_model(model: ModelConfig, vocabulary: VocabularyInfo) -> tuple[Any, Any]:
    """Returns a model's graph definition and the `nnx.State` of its parameters' shapes; allocates nothing."""
    graphdef, params = nnx.split(_model_of_shapes(model, vocabulary))
    return graphdef, jax.tree.map(lambda shape: shape, params)  # variables of the caller's own


def describe_parameters(model: ModelConfig, vocabulary: VocabularyInfo) -> dict[str, Any]:
    """Returns a nested dict with the `ParameterInfo` of each parameter of a model; allocates nothing."""
    return parameter_info(_model_of_shapes(model, vocabulary))


def _init(
    model: ModelConfig, vocabulary: VocabularyInfo, optimizer: optax.GradientTransformation, ema_decay: float, key
) -> TrainState:
    params = nnx.to_pure_dict(nnx.state(build_model(model, vocabulary, rngs=nnx.Rngs(params=key))))
    average = jax.tree.map(jnp.copy, params) if ema_decay else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), average)


def make_layout(
    model: ModelConfig,
    vocabulary: VocabularyInfo,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | AbstractMesh,
    ema_decay: float = 0.0,
) -> StateLayout:
    """Returns the layout of a training state on `mesh`; `ema_decay` above 0 keeps an average of the parameters.

    Raises:
        ConfigError: a mesh axis does not divide a dimension that it shards. Or the optimiser's expressions do not say
            whether a parameter decays.
    """
    graphdef, abstract_params = abstract_model(model, vocabulary)
    shapes = jax.eval_shape(lambda key: _init(model, vocabulary, optimizer, ema_decay, key), jax.random.key(0))
    replicated = replicated_sharding(mesh)
    params = parameter_shardings(abstract_params, mesh)

    def like_parameter(leaf: Any, param: Any, sharding: NamedSharding) -> Any:
        if isinstance(leaf, optax.MaskedNode):  # a parameter that another part of the optimiser changes
            return leaf
        return sharding if leaf.shape == param.shape else replicated  # Adafactor keeps sums of rows and of columns

    optimizer_shardings = optax.tree.map_params(
        optimizer.init,
        like_parameter,
        shapes.optimizer,
        shapes.params,
        params,
        transform_non_params=lambda _: replicated,
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )
    shardings = TrainState(replicated, params, optimizer_shardings, params if ema_decay else None)
    return StateLayout(graphdef, shapes, shardings, optimizer, ema_decay)


def init_state(model: ModelConfig, vocabulary: VocabularyInfo, layout: StateLayout, seed: int) -> TrainState:
    """Returns a new state; every array is created in its sharding, none is ever whole on one device first."""

    def create(key: jax.Array) -> TrainState:
        return _init(model, vocabulary, layout.optimizer, layout.ema_decay, key)

    mesh = layout.shardings.step.mesh
    with jax.set_mesh(mesh):
        return jax.jit(create, out_shardings=layout.shardings)(jax.random.key(seed))
