"""Sampling: outputs drawn from a model's distribution, over the same decode step as beam search.

Every hypothesis of a sentence is drawn on its own, from the sentence's own seed: what is drawn depends neither on the
batch nor on the place in it.

Legend: B sentences, K samples, V vocabulary, T maximum length.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flax_transformer.decoding.beam_search import Step
from flax_transformer.decoding.hypotheses import Hypotheses
from flax_transformer.decoding.length_penalty import LengthPenalty
from flax_transformer.decoding.rules import Progress, Rule
from flax_transformer.errors import ConfigError
from flax_transformer.ops.vocabulary import log_probabilities
from flax_transformer.shapes import MASKED, array_tree

# Logits that are divided by less may leave the range of float32.
LEAST_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn.

    Attributes:
        temperature: the logits are divided by it; below 1 it favours what is probable.
        top_k: only so many of the most probable tokens are drawn from; 0 is all.
        top_p: only the fewest most probable tokens that have together at least this probability; 1 is all.
        min_p: only tokens with at least this share of the most probable one's probability; 0 is all.

    References:
        Fan, Lewis and Dauphin 2018 (top-k); Holtzman et al. 2020 (top-p); Nguyen et al. 2024 (min-p).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        if not LEAST_TEMPERATURE <= self.temperature < float("inf"):
            raise ConfigError(
                f"temperature must be at least {LEAST_TEMPERATURE:g}, got {self.temperature}; for the most probable, "
                "use a beam."
            )
        if self.top_k < 0:
            raise ConfigError(f"top_k must not be negative (0 is all tokens), got {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, got {self.top_p}.")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p must lie between 0 and 1, got {self.min_p}.")


def keep_probable(log_probs: Float[Array, "B K V"], config: SamplingConfig) -> Float[Array, "B K V"]:
    """Returns log-probabilities with all tokens MASKED that are not drawn from; the most probable is always kept.

    Temperature comes first, then each limit is applied to the same distribution.
    """
    log_probs = jax.nn.log_softmax(log_probs / jnp.float32(config.temperature), axis=-1)
    kept = jnp.ones(log_probs.shape, bool)
    if config.top_k or config.top_p < 1:
        ordered = -jnp.sort(-log_probs, axis=-1)
        if config.top_k:
            least = ordered[..., min(config.top_k, ordered.shape[-1]) - 1, None]
            kept &= log_probs >= least
        if config.top_p < 1:
            probabilities = jnp.exp(ordered)
            before = jnp.cumsum(probabilities, axis=-1) - probabilities  # of all that are more probable
            needed = jnp.sum(before < config.top_p, axis=-1, keepdims=True)  # at least 1
            kept &= log_probs >= jnp.take_along_axis(ordered, needed - 1, axis=-1)
    if config.min_p:
        kept &= log_probs >= jnp.max(log_probs, axis=-1, keepdims=True) + jnp.log(jnp.float32(config.min_p))
    return jnp.where(kept, log_probs, MASKED)


@array_tree
@dataclasses.dataclass(frozen=True)
class SamplingState:
    """Everything that changes while samples are drawn.

    Attributes:
        step: tokens drawn so far.
        tokens, log_probs: [B, K, T].
        lengths: [B, K], 0 while a sample is not finished; one that no token was left for is, and is no output.
        extras: tree of [B, K, T, ...].
        decoder: the state of the step function.
    """

    step: Int[Array, ""]
    tokens: Int[Array, "B K T"]
    log_probs: Float[Array, "B K T"]
    lengths: Int[Array, "B K"]
    extras: Any
    decoder: Any


def sample(
    step: Step,
    decoder: Any,
    max_lengths: Int[Array, "B"],
    seeds: Int[Array, "B"],
    num_samples: int,
    max_length: int,
    start_token: int,
    end_token: int,
    penalty: LengthPenalty,
    config: SamplingConfig,
    rules: Sequence[Rule] = (),
) -> Hypotheses:
    """Returns K outputs of each sentence, drawn independently of each other, best score first; some may be equal.

    A sample that the rules leave no token for is no output: it has length 0 and stands last.

    Args:
        step: see `beam_search.Step`.
        decoder: the state before the first token, with K beams.
        max_lengths: most tokens of each sentence's output; 0 makes a row of padding.
        seeds: of each sentence.
        num_samples: K.
        max_length: T.
        start_token: what the first step reads.
        end_token: what closes an output.
        penalty: how scores of different lengths are compared.
        config: how tokens are drawn.
        rules: what may follow what.
    """
    sentences = max_lengths.shape[0]
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), num_samples))(
        seeds.astype(jnp.uint32)
    )  # [B, K]

    def running(state: SamplingState) -> Any:
        return (state.lengths == 0) & (state.step < max_lengths)[:, None]

    def body(state: SamplingState) -> SamplingState:
        last = jax.lax.dynamic_index_in_dim(state.tokens, jnp.maximum(state.step - 1, 0), axis=2, keepdims=False)
        logits, extras, decoder = step(jnp.where(state.step == 0, start_token, last), state.decoder)
        log_probs = log_probabilities(logits)
        allowed = log_probs
        progress = Progress(state.tokens, jnp.broadcast_to(state.step, (sentences,)), jnp.arange(sentences))
        for rule in rules:
            allowed = rule(allowed, progress)
        at_step = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, state.step)))(keys)
        drawn = jax.vmap(jax.vmap(jax.random.categorical))(at_step, keep_probable(allowed, config))
        runs = running(state)
        drawn = jnp.where(runs, drawn, end_token).astype(jnp.int32)
        chosen = jnp.take_along_axis(allowed, drawn[..., None], axis=2)[..., 0]  # MASKED where nothing was allowed
        ends = (drawn == end_token) | (chosen <= MASKED / 2)

        def put(history: Any, new: Any) -> Any:
            return jax.lax.dynamic_update_index_in_dim(history, new, state.step, axis=2)

        return SamplingState(
            state.step + 1,
            put(state.tokens, drawn),
            put(state.log_probs, jnp.where(runs, chosen, 0.0)),
            jnp.where(runs & ends, state.step + 1, state.lengths),
            jax.tree.map(put, state.extras, extras),
            decoder,
        )

    shape = (sentences, num_samples, max_length)
    extras = jax.eval_shape(step, jnp.zeros(shape[:2], jnp.int32), decoder)[1]
    start = SamplingState(
        jnp.zeros((), jnp.int32),
        jnp.full(shape, end_token, jnp.int32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(shape[:2], jnp.int32),
        jax.tree.map(lambda x: jnp.zeros((*shape, *x.shape[2:]), x.dtype), extras),
        decoder,
    )
    final = jax.lax.while_loop(lambda state: jnp.any(running(state)), body, start)

    stuck = jnp.any(final.log_probs <= MASKED / 2, axis=2)  # no token was left, so there is no output
    finished = (final.lengths > 0) & ~stuck
    lengths = jnp.where(finished, final.lengths, jnp.broadcast_to(max_lengths[:, None], shape[:2]))
    lengths = jnp.where(stuck, 0, lengths)
    scores = jnp.sum(final.log_probs, axis=2) / penalty.divisor(jnp.maximum(lengths, 1))
    scores = jnp.where(lengths > 0, scores, MASKED)
    order = jnp.lexsort((-scores, ~finished), axis=-1)

    def sort(x: Any) -> Any:
        return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)

    found = Hypotheses(final.tokens, lengths, scores, finished, final.log_probs, final.extras)
    return jax.tree.map(sort, found)
