"""The training state: parameters, optimiser state and step, sharded from the start."""

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
    """Everything that a step changes, as plain dicts of arrays.

    Attributes:
        step: number of updates so far, an int32 scalar.
        params: nested dict of parameters.
        optimizer: state of the optax optimiser.
        average: exponential moving average of the parameters, or None if there is none.

    Example:
        >>> state = TrainState(step=0, params={"kernel": np.ones(2)}, optimizer=None, average={"kernel": np.zeros(2)})
        >>> state.eval_params["kernel"].tolist()
        [0.0, 0.0]
    """

    step: Any
    params: Any
    optimizer: Any
    average: Any = None

    @property
    def eval_params(self) -> Any:
        """Parameters for evaluation and translation: the average if there is one."""
        return self.params if self.average is None else self.average

    def starting_from(self, params: Any) -> "TrainState":
        """Returns this state with other parameters. The average, if there is one, becomes a copy of them."""
        average = None if self.average is None else jax.tree.map(jnp.copy, params)
        return dataclasses.replace(self, params=params, average=average)


@dataclasses.dataclass(frozen=True)
class StateLayout:
    """Shapes and shardings of a training state, before any array exists.

    Attributes:
        graphdef: model without its parameters; `nnx.merge(graphdef, params)` returns the model.
        shapes: `TrainState` of shapes and dtypes.
        shardings: `TrainState` of shardings.
        optimizer: optax transformation of the optimiser state.
        ema_decay: decay of the moving average of the parameters; 0 keeps no average.

    Example:
        >>> from flax_transformer import TransformerConfig, VocabularyInfo
        >>> from flax_transformer.parallel.mesh import MeshConfig, make_mesh
        >>> config = TransformerConfig(model_dim=8, num_heads=2, feed_forward_dim=8)
        >>> vocabulary = VocabularyInfo(source_size=20, target_size=20, start_token=1)
        >>> mesh = make_mesh(MeshConfig(data=1))
        >>> layout = make_layout(config, vocabulary, optax.adam(1e-3), mesh)
        >>> layout.shapes.step.dtype, layout.shapes.params["target_embedding"]["table"].shape
        (dtype('int32'), (24, 8))
    """

    graphdef: Any
    shapes: TrainState
    shardings: TrainState
    optimizer: optax.GradientTransformation
    ema_decay: float

    @property
    def abstract(self) -> TrainState:
        """`TrainState` of shapes with shardings, as Orbax takes it to restore a state."""
        return jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), self.shapes, self.shardings
        )

    @property
    def num_parameters(self) -> int:
        """Number of trained values, with the padding rows of the vocabulary."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.shapes.params))


@functools.cache
def _model_of_shapes(model: ModelConfig, vocabulary: VocabularyInfo) -> Seq2Seq:
    return nnx.eval_shape(lambda: build_model(model, vocabulary, rngs=nnx.Rngs(params=0)))


def abstract_model(model: ModelConfig, vocabulary: VocabularyInfo) -> tuple[Any, Any]:
    """Returns the graph definition of a model, and the `nnx.State` of its parameters' shapes. Allocates nothing.

    Example:
        >>> from flax_transformer import TransformerConfig, VocabularyInfo
        >>> graphdef, params = abstract_model(TransformerConfig(model_dim=8, num_heads=2), VocabularyInfo(20, 20, 1))
        >>> params["target_embedding"]["table"].shape
        (24, 8)
    """
    graphdef, params = nnx.split(_model_of_shapes(model, vocabulary))
    return graphdef, jax.tree.map(lambda shape: shape, params)  # variables of the caller's own


def describe_parameters(model: ModelConfig, vocabulary: VocabularyInfo) -> dict[str, Any]:
    """Returns a nested dict with the `ParameterInfo` of each parameter of a model. Allocates nothing."""
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
    """Returns the layout of a training state on `mesh`, with an average of the parameters if `ema_decay` is above 0.

    Raises:
        ConfigError: a mesh axis does not divide a dimension that it shards. Or the optimiser's expressions do not say
            whether a parameter has weight decay.

    Example:
        >>> from flax_transformer import TransformerConfig, VocabularyInfo
        >>> from flax_transformer.parallel.mesh import MeshConfig, make_mesh
        >>> config = TransformerConfig(model_dim=8, num_heads=2, feed_forward_dim=8)
        >>> vocabulary = VocabularyInfo(source_size=20, target_size=20, start_token=1)
        >>> mesh = make_mesh(MeshConfig(data=1))
        >>> layout = make_layout(config, vocabulary, optax.adam(1e-3), mesh)
        >>> layout.num_parameters
        2656
    """
    graphdef, abstract_params = abstract_model(model, vocabulary)
    shapes = jax.eval_shape(lambda key: _init(model, vocabulary, optimizer, ema_decay, key), jax.random.key(0))
    replicated = replicated_sharding(mesh)
    params = parameter_shardings(abstract_params, mesh)

    def like_parameter(leaf: Any, param: Any, sharding: NamedSharding) -> Any:
        if isinstance(leaf, optax.MaskedNode):  # another part of the optimiser has this parameter
            return leaf
        # The leaf's place in the tree says which parameter it belongs to, and not whether it has a value for each value
        # of the parameter. Adafactor also keeps means of rows and of columns there. So the shape decides.
        return sharding if leaf.shape == param.shape else replicated

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
    """Returns a new state. Every array is created in its sharding, and never whole on one device.

    Example:
        >>> from flax_transformer import TransformerConfig, VocabularyInfo
        >>> from flax_transformer.parallel.mesh import MeshConfig, make_mesh
        >>> config = TransformerConfig(model_dim=8, num_heads=2, feed_forward_dim=8)
        >>> vocabulary = VocabularyInfo(source_size=20, target_size=20, start_token=1)
        >>> mesh = make_mesh(MeshConfig(data=1))
        >>> layout = make_layout(config, vocabulary, optax.adam(1e-3), mesh)
        >>> state = init_state(config, vocabulary, layout, seed=0)
        >>> int(state.step), state.average
        (0, None)
    """

    def create(key: jax.Array) -> TrainState:
        return _init(model, vocabulary, layout.optimizer, layout.ema_decay, key)

    mesh = layout.shardings.step.mesh
    with jax.set_mesh(mesh):
        return jax.jit(create, out_shardings=layout.shardings)(jax.random.key(seed))
