"""Wall-clock times of jitted functions, and the shares of a train step and of a search step."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from short_training import make_training, one_device

from flax_transformer import Batch, TransformerConfig, VocabularyInfo
from flax_transformer.decoding.candidates import best_candidates
from flax_transformer.decoding.logits_processors import Progress
from flax_transformer.models.seq2seq import reorder_beams
from flax_transformer.ops.cross_entropy import cross_entropy
from flax_transformer.training.state import init_state
from flax_transformer.training.step import Objective, batch_loss

ROUNDS = 7


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """Returns the least time of some calls of the jitted function, after it was compiled.

    Other work of the machine can only add time, so the least one says most about the function.
    """
    jitted = jax.jit(function)
    jax.block_until_ready(jitted(*arguments))
    times = []
    for _ in range(ROUNDS):
        clock = time.perf_counter()
        jax.block_until_ready(jitted(*arguments))
        times.append(time.perf_counter() - clock)
    return min(times)


def random_batch(rows: int, length: int, vocab: int) -> Batch:
    """Returns sentences of random tokens without padding."""
    rng = np.random.default_rng(0)

    def side() -> tuple[Any, ...]:
        tokens = jnp.asarray(rng.integers(3, vocab, (rows, length)), jnp.int32)
        return tokens, jnp.broadcast_to(jnp.arange(length), tokens.shape), jnp.ones_like(tokens)

    return Batch(*side(), *side())


def shares_of(times: dict[str, float]) -> dict[str, float]:
    """Returns times as shares of their sum."""
    return {name: time / sum(times.values()) for name, time in times.items()}


def train_step_shares(
    model: Any, batch: Batch, config: TransformerConfig, vocabulary: VocabularyInfo
) -> dict[str, float]:
    """Returns the shares of a train step. The backward pass is the time that the gradient adds to the loss."""
    graphdef, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    source, target = batch[:3], batch[3:]

    def decode(params: Any, encoded: Any, target: Any) -> jax.Array:
        model = nnx.merge(graphdef, params)
        return model.decoder(model.target_embedding, *target, encoded, None)

    def loss(params: Any, batch: Batch) -> jax.Array:
        return batch_loss(nnx.merge(graphdef, params), batch, Objective(0.1), None).loss

    def loss_of_hidden(params: Any, hidden: jax.Array, target: Any) -> jax.Array:
        tokens, _, segments = target
        return cross_entropy(hidden, nnx.merge(graphdef, params).output_projection(), tokens, segments > 0, 0.1).loss

    def update(gradient: Any, optimizer_state: Any, params: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(gradient, optimizer_state, params)

    layout, _ = make_training(config, vocabulary, 100, 0)
    optimizer = layout.optimizer
    with jax.set_mesh(one_device()):
        state = init_state(config, vocabulary, layout, 0)
        encoded = jax.jit(model.encode)(*source)
        hidden = jax.jit(decode)(params, encoded, target)
        both = seconds(jax.value_and_grad(loss), params, batch)
        return shares_of(
            {
                "encoder": seconds(lambda p, s: nnx.merge(graphdef, p).encode(*s).states, params, source),
                "decoder": seconds(decode, params, encoded, target),
                "loss": seconds(loss_of_hidden, params, hidden, target),
                "backward pass": both - seconds(loss, params, batch),
                "optimiser": seconds(update, params, state.optimizer, params),
            }
        )


def search_step_shares(model: Any, batch: Batch, beams: int) -> dict[str, float]:
    """Returns the shares of a step of a beam search."""
    rows, length = batch.source_tokens.shape
    tokens, scores = jnp.ones((rows, beams), jnp.int32), jnp.zeros((rows, beams))
    progress = Progress(jnp.ones((rows, beams, length), jnp.int32), jnp.zeros((rows,), jnp.int32), jnp.arange(rows))

    def layers(tokens: Any, state: Any) -> Any:
        caches, segments = state.per_sentence
        return model.decoder.step(
            model.target_embedding, tokens, state.positions, state.append_only, caches, segments, state.per_beam
        )[:2]

    def candidates(logits: Any) -> Any:
        return best_candidates(scores, logits, 2 * beams, progress, ())

    with jax.set_mesh(one_device()):
        state = model.init_decode_state(jax.jit(model.encode)(*batch[:3]), beams, length)
        hidden, _ = jax.jit(layers)(tokens, state)
        logits = jax.jit(lambda hidden: model.output_projection().logits(hidden))(hidden)
        parents = jnp.zeros((rows, beams), jnp.int32)
        return shares_of(
            {
                "decoder layers": seconds(layers, tokens, state),
                "logits": seconds(lambda hidden: model.output_projection().logits(hidden), hidden),
                "candidates": seconds(candidates, logits),
                "moving beams": seconds(lambda s, p: reorder_beams(s, p).per_beam, state, parents),
            }
        )
