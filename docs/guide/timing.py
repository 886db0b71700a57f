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


def differences(times: dict[str, float]) -> dict[str, float]:
    """Returns the share of each part, from the times of longer and longer beginnings of a step."""
    shares, before = {}, 0.0
    for name, until in times.items():
        shares[name] = max(until - before, 0.0)
        before = max(until, before)
    return {name: value / before for name, value in shares.items()}


def train_step_shares(
    model: Any, batch: Batch, config: TransformerConfig, vocabulary: VocabularyInfo
) -> dict[str, float]:
    """Returns the shares of a train step, each measured as the difference of two programs."""
    graphdef, params = nnx.split(model)
    params = nnx.to_pure_dict(params)

    def loss(params: Any, batch: Batch) -> jax.Array:
        return batch_loss(nnx.merge(graphdef, params), batch, Objective(0.1), None).loss

    def encode(params: Any, batch: Batch) -> jax.Array:
        model = nnx.merge(graphdef, params)
        return model.encode(batch.source_tokens, batch.source_positions, batch.source_segments).states

    layout, _ = make_training(config, vocabulary, 100, 0)
    optimizer = layout.optimizer
    with jax.set_mesh(one_device()):
        state = init_state(config, vocabulary, layout, 0)

        def step(params: Any, batch: Batch) -> Any:
            with jax.numpy_dtype_promotion("standard"):
                return optimizer.update(jax.grad(loss)(params, batch), state.optimizer, params)

        return differences(
            {
                "encoder": seconds(encode, params, batch),
                "decoder": seconds(lambda p, b: nnx.merge(graphdef, p)(b), params, batch),
                "loss": seconds(loss, params, batch),
                "backward pass": seconds(jax.grad(loss), params, batch),
                "optimiser": seconds(step, params, batch),
            }
        )


def search_step_shares(model: Any, batch: Batch, beams: int) -> dict[str, float]:
    """Returns the shares of a step of a beam search."""
    rows, length = batch.source_tokens.shape
    encoded = model.encode(batch.source_tokens, batch.source_positions, batch.source_segments)
    state = model.init_decode_state(encoded, beams, length)
    tokens = jnp.ones((rows, beams), jnp.int32)
    scores = jnp.zeros((rows, beams))
    progress = Progress(jnp.ones((rows, beams, length), jnp.int32), jnp.zeros((rows,), jnp.int32), jnp.arange(rows))

    def layers(tokens: Any, state: Any) -> Any:
        cross_caches, segments = state.per_sentence
        return model.decoder.step(
            model.target_embedding, tokens, state.positions, state.append_only, cross_caches, segments, state.per_beam
        )[0]

    def with_logits(tokens: Any, state: Any) -> Any:
        output, state = model.decode_step(tokens, state)
        return output.logits, state.append_only

    def with_candidates(tokens: Any, state: Any, reorder: bool = False) -> Any:
        output, state = model.decode_step(tokens, state)
        chosen = best_candidates(scores, output.logits, 2 * beams, progress, ())
        moved = reorder_beams(state, chosen.parents[:, :beams]) if reorder else state
        return chosen, moved.append_only, moved.per_beam

    with jax.set_mesh(one_device()):
        return differences(
            {
                "decoder layers": seconds(layers, tokens, state),
                "logits": seconds(with_logits, tokens, state),
                "candidates": seconds(with_candidates, tokens, state),
                "reordering": seconds(lambda t, s: with_candidates(t, s, True), tokens, state),
            }
        )
