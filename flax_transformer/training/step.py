"""The training step and the evaluation step: pure functions, jitted on a mesh."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Bool, Float

from flax_transformer.models.seq2seq import Seq2Seq
from flax_transformer.ops.cross_entropy import LossSums, cross_entropy
from flax_transformer.parallel.mesh import batch_sharding, replicated_sharding
from flax_transformer.parallel.sharding_rules import constrain
from flax_transformer.shapes import Batch, array_tree
from flax_transformer.training.state import StateLayout, TrainState


@array_tree
@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """The metrics of one update.

    Attributes:
        sums: sums over the target tokens of the batch.
        gradient_norm: global norm of the mean gradient, before clipping.
        learning_rate: learning rate of this update.
        skipped: whether the update was skipped, since the loss, the gradient or the update was not finite.

    Example:
        >>> sums = LossSums(*jnp.array([6.0, 5.0, 1.0, 2.0]))
        >>> metrics = StepMetrics(sums, jnp.array(1.0), jnp.array(1e-3), skipped=jnp.array(False))
        >>> float(metrics.sums.loss / metrics.sums.count)
        3.0
    """

    sums: LossSums
    gradient_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    skipped: Bool[Array, ""]


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss of a training.

    Attributes:
        label_smoothing: share of the target distribution that is uniform over the vocabulary.
        r_drop: weight of the divergence between two passes over each row with different dropout; 0 makes one pass.

    Example:
        >>> Objective(label_smoothing=0.1, r_drop=5.0).num_passes
        2

    References:
        Liang et al. 2021, "R-Drop: Regularized Dropout for Neural Networks", section 2, equation 4.
    """

    label_smoothing: float
    r_drop: float = 0.0

    @property
    def num_passes(self) -> int:
        """Number of passes over each row."""
        return 2 if self.r_drop else 1


def batch_loss(model: Seq2Seq, batch: Batch, objective: Objective, key: jax.Array | None) -> LossSums:
    """Returns the sums over a batch, with each row once for each pass.

    Args:
        model: the model.
        batch: the batch.
        objective: the loss. Without a key two passes would not differ, so there is only one.
        key: key of dropout; None means evaluation.

    Example:
        >>> from flax_transformer import TransformerConfig, VocabularyInfo, build_model
        >>> config = TransformerConfig(model_dim=8, num_heads=2)
        >>> model = build_model(config, VocabularyInfo(20, 20, start_token=1), rngs=nnx.Rngs(0))
        >>> tokens, positions = jnp.full((8, 4), 5), jnp.tile(jnp.arange(4), (8, 1))
        >>> batch = Batch(tokens, positions, jnp.ones_like(tokens), tokens, positions, jnp.ones_like(tokens))
        >>> float(batch_loss(model, batch, Objective(0.1), None).count)
        32.0
    """
    divergence_weight = 0.0
    if objective.r_drop and key is not None:  # both passes of a row stay on the same device
        divergence_weight = objective.r_drop
        batch = jax.tree.map(lambda x: constrain(jnp.repeat(x, 2, axis=0), "batch", "length"), batch)
    return cross_entropy(
        model(batch, key),
        model.output_projection(),
        batch.target_tokens,
        batch.target_segments > 0,
        objective.label_smoothing,
        divergence_weight,
    )


def _gradient(graphdef: Any, params: Any, batch: Batch, objective: Objective, key: jax.Array) -> tuple[Any, LossSums]:
    """Returns the gradient of the loss summed over the batch, and the sums."""

    def loss(params):
        sums = batch_loss(nnx.merge(graphdef, params), batch, objective, key)
        return sums.loss, sums

    return jax.grad(loss, has_aux=True)(params)


def _accumulate_gradients(
    graphdef: Any, params: Any, batch: Batch, objective: Objective, key: jax.Array, num_micro_batches: int
) -> tuple[Any, LossSums]:
    """Returns the result of `_gradient`, computed one micro-batch after the other, in less memory.

    Micro-batch m has every row whose number is m modulo the number of micro-batches. So each device has an equal share
    of each micro-batch.
    """

    def cut(x: jax.Array) -> jax.Array:  # [B, T] -> [micro-batches, B / micro-batches, T]
        rows = x.reshape(x.shape[0] // num_micro_batches, num_micro_batches, x.shape[1])
        return constrain(jnp.swapaxes(rows, 0, 1), None, "batch", "length")

    def body(total: Any, numbered: Any) -> tuple[Any, None]:
        micro_batch, number = numbered
        made = _gradient(graphdef, params, micro_batch, objective, jax.random.fold_in(key, number))
        return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, made), None

    zeros = (
        jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params),
        LossSums(*(jnp.zeros((), jnp.float32) for _ in LossSums._fields)),
    )
    return jax.lax.scan(body, zeros, (jax.tree.map(cut, batch), jnp.arange(num_micro_batches)))[0]


def _moved_average(average: Any, params: Any, step: jax.Array, decay: float) -> Any:
    """Returns the exponential moving average after one more update.

    The decay grows at first: it is min(decay, (1 + step) / (10 + step)).

    References:
        Polyak and Juditsky 1992 (averaging); TensorFlow's `ExponentialMovingAverage` (the growing decay).
    """
    past = step.astype(jnp.float32)
    share = 1.0 - jnp.minimum(decay, (1.0 + past) / (10.0 + past))
    return jax.tree.map(
        lambda a, p: (a.astype(jnp.float32) + share * (p.astype(jnp.float32) - a.astype(jnp.float32))).astype(a.dtype),
        average,
        params,
    )


def train_step(
    layout: StateLayout,
    schedule: optax.Schedule,
    objective: Objective,
    seed: int,
    gradient_accumulation_steps: int,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, StepMetrics]:
    """Returns the state after one update, and its metrics.

    The loss is summed over the global batch. Its gradient is divided once, by the global number of target tokens.
    Dropout keys depend on the seed and the step alone, so a resumed run needs no generator state. If the loss, the
    gradient or the update is not finite, the update is skipped. Then only the step changes, and the optimiser's own
    counter, which its schedule reads.

    Example:
        >>> import functools
        >>> import optax
        >>> from flax_transformer import TransformerConfig, VocabularyInfo
        >>> from flax_transformer.parallel.mesh import MeshConfig, make_mesh
        >>> from flax_transformer.training.state import init_state, make_layout
        >>> config = TransformerConfig(model_dim=8, num_heads=2, feed_forward_dim=8)
        >>> vocabulary = VocabularyInfo(source_size=20, target_size=20, start_token=1)
        >>> schedule, mesh = optax.constant_schedule(1e-2), make_mesh(MeshConfig(data=1))
        >>> layout = make_layout(config, vocabulary, optax.adam(schedule), mesh)
        >>> tokens, positions = jnp.full((8, 4), 5), jnp.tile(jnp.arange(4), (8, 1))
        >>> batch = Batch(tokens, positions, jnp.ones_like(tokens), tokens, positions, jnp.ones_like(tokens))
        >>> step = functools.partial(train_step, layout, schedule, Objective(0.1), 0, 1)
        >>> state, metrics = jax.eval_shape(step, layout.shapes, batch)
        >>> metrics.sums.loss.shape  # only traced: `jit_train_step` runs it
        ()
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    graphdef, optimizer = layout.graphdef, layout.optimizer
    if gradient_accumulation_steps == 1:
        gradients, sums = _gradient(graphdef, state.params, batch, objective, key)
    else:
        gradients, sums = _accumulate_gradients(
            graphdef, state.params, batch, objective, key, gradient_accumulation_steps
        )
    count = jnp.maximum(sums.count, 1.0)
    gradients = jax.tree.map(lambda g, p: (g.astype(jnp.float32) / count).astype(p.dtype), gradients, state.params)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 counters with float32
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
    norm = optax.tree.norm(gradients)
    # An update can exceed the range of its type though the gradient is finite. Then its norm is not finite.
    finite = jnp.isfinite(norm) & jnp.isfinite(sums.loss) & jnp.isfinite(optax.tree.norm(updates))
    params, optimizer_state = jax.tree.map(
        lambda new, old: new if jnp.issubdtype(new.dtype, jnp.integer) else jnp.where(finite, new, old),
        (params, optimizer_state),
        (state.params, state.optimizer),
    )
    metrics = StepMetrics(sums, norm, jnp.asarray(schedule(state.step)), ~finite)
    average = state.average
    if average is not None:
        moved = _moved_average(average, params, state.step, layout.ema_decay)
        average = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, average)
    return TrainState(state.step + 1, params, optimizer_state, average), metrics


def jit_train_step(
    layout: StateLayout,
    schedule: optax.Schedule,
    objective: Objective,
    seed: int,
    mesh: Mesh | AbstractMesh,
    gradient_accumulation_steps: int = 1,
) -> Any:
    """Returns the jitted `train_step`, a function (state, batch) -> (state, metrics).

    The state is donated, and the rows of a batch are split over data and fsdp. Call the function inside
    `with jax.set_mesh(mesh):`. It compiles once for each batch shape.

    Example:
        >>> import optax
        >>> from flax_transformer import TransformerConfig, VocabularyInfo
        >>> from flax_transformer.parallel.mesh import MeshConfig, make_mesh
        >>> from flax_transformer.training.state import init_state, make_layout
        >>> config = TransformerConfig(model_dim=8, num_heads=2, feed_forward_dim=8)
        >>> vocabulary = VocabularyInfo(source_size=20, target_size=20, start_token=1)
        >>> schedule, mesh = optax.constant_schedule(1e-2), make_mesh(MeshConfig(data=1))
        >>> layout = make_layout(config, vocabulary, optax.adam(schedule), mesh)
        >>> tokens, positions = jnp.full((8, 4), 5), jnp.tile(jnp.arange(4), (8, 1))
        >>> batch = Batch(tokens, positions, jnp.ones_like(tokens), tokens, positions, jnp.ones_like(tokens))
        >>> step = jit_train_step(layout, schedule, Objective(0.1), seed=0, mesh=mesh)
        >>> state, losses = init_state(config, vocabulary, layout, seed=0), []
        >>> with jax.set_mesh(mesh):
        ...     for _ in range(3):
        ...         state, metrics = step(state, batch)
        ...         losses.append(float(metrics.sums.loss / metrics.sums.count))
        >>> losses[0] > losses[-1], int(state.step)
        (True, 3)
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        return train_step(layout, schedule, objective, seed, gradient_accumulation_steps, state, batch)

    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(layout.shardings, batch_sharding(mesh)),
        out_shardings=(layout.shardings, replicated_sharding(mesh)),
    )


def jit_evaluation_step(layout: StateLayout, objective: Objective, mesh: Mesh) -> Any:
    """Returns a jitted function (params, batch) -> `LossSums` without dropout.

    Example:
        >>> import optax
        >>> from flax_transformer import TransformerConfig, VocabularyInfo
        >>> from flax_transformer.parallel.mesh import MeshConfig, make_mesh
        >>> from flax_transformer.training.state import init_state, make_layout
        >>> config = TransformerConfig(model_dim=8, num_heads=2, feed_forward_dim=8)
        >>> vocabulary = VocabularyInfo(source_size=20, target_size=20, start_token=1)
        >>> schedule, mesh = optax.constant_schedule(1e-2), make_mesh(MeshConfig(data=1))
        >>> layout = make_layout(config, vocabulary, optax.adam(schedule), mesh)
        >>> tokens, positions = jnp.full((8, 4), 5), jnp.tile(jnp.arange(4), (8, 1))
        >>> batch = Batch(tokens, positions, jnp.ones_like(tokens), tokens, positions, jnp.ones_like(tokens))
        >>> evaluate = jit_evaluation_step(layout, Objective(0.0), mesh)
        >>> state = init_state(config, vocabulary, layout, seed=0)
        >>> with jax.set_mesh(mesh):
        ...     float(evaluate(state.eval_params, batch).count)
        32.0
    """

    def step(params: Any, batch: Batch) -> LossSums:
        return batch_loss(nnx.merge(layout.graphdef, params), batch, objective, None)

    return jax.jit(
        step,
        in_shardings=(layout.shardings.params, batch_sharding(mesh)),
        out_shardings=replicated_sharding(mesh),
    )
