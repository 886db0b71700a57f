"""The training step and the evaluation step: pure functions, jitted, placed on a mesh."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from flax_transformer.models.seq2seq import Seq2Seq
from flax_transformer.parallel.mesh import batch_sharding, replicated_sharding
from flax_transformer.shapes import Batch, array_tree
from flax_transformer.training.loss import LossSums, cross_entropy
from flax_transformer.training.state import StateLayout, TrainState


@array_tree
@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """What one update reports.

    Attributes:
        sums: over the target tokens of the batch.
        gradient_norm: global norm of the mean gradient, before clipping.
        learning_rate: used by this update.
    """

    sums: LossSums
    gradient_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]


def batch_loss(model: Seq2Seq, batch: Batch, label_smoothing: float, key: jax.Array | None) -> LossSums:
    """Returns the sums over a batch; `key` is for dropout, None means evaluation."""
    hidden = model(batch, key)
    return cross_entropy(
        hidden, model.output_projection(), batch.target_tokens, batch.target_segments > 0, label_smoothing
    )


def train_step(
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    label_smoothing: float,
    seed: int,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, StepMetrics]:
    """Returns the state after one update, and its metrics.

    The gradient is that of the sum over the global batch, divided once by the global number of target tokens. Dropout
    keys are folded from (seed, step), so a resumed run needs no generator state.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)

    def loss(params):
        sums = batch_loss(nnx.merge(graphdef, params), batch, label_smoothing, key)
        return sums.loss, sums

    gradients, sums = jax.grad(loss, has_aux=True)(state.params)
    gradients = jax.tree.map(lambda g: g / jnp.maximum(sums.count, 1.0).astype(g.dtype), gradients)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 counters with float32
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
    metrics = StepMetrics(sums, optax.tree.norm(gradients), jnp.asarray(schedule(state.step)))
    return TrainState(state.step + 1, params, optimizer_state), metrics


def jit_train_step(layout: StateLayout, schedule: optax.Schedule, label_smoothing: float, seed: int, mesh: Mesh) -> Any:
    """Returns `train_step` jitted, (state, batch) -> (state, metrics): state donated, rows split over data and fsdp.

    Call it inside `with jax.set_mesh(mesh):`. It compiles once for each batch shape.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        return train_step(layout.graphdef, layout.optimizer, schedule, label_smoothing, seed, state, batch)

    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(layout.shardings, batch_sharding(mesh)),
        out_shardings=(layout.shardings, replicated_sharding(mesh)),
    )


def jit_evaluation_step(layout: StateLayout, label_smoothing: float, mesh: Mesh) -> Any:
    """Returns a jitted function (params, batch) -> `LossSums`, without dropout."""

    def step(params: Any, batch: Batch) -> LossSums:
        return batch_loss(nnx.merge(layout.graphdef, params), batch, label_smoothing, None)

    return jax.jit(
        step,
        in_shardings=(layout.shardings.params, batch_sharding(mesh)),
        out_shardings=replicated_sharding(mesh),
    )
