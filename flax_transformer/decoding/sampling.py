"""Sampling: outputs drawn from a model's distribution, over the same decode step as beam search.

Each sentence has its own seed, and its samples are drawn independently. So they depend neither on the batch nor on the
sentence's place in it.

Legend: B sentences, K samples, V vocabulary, T maximum length.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from flax_transformer.decoding.beam_state import gather_beams
from flax_transformer.decoding.decoder_functions import DecoderFunctions
from flax_transformer.decoding.hypotheses import Hypotheses
from flax_transformer.decoding.length_penalty import LengthPenalty
from flax_transformer.decoding.logits_processors import LogitsProcessor, Progress
from flax_transformer.errors import ConfigError
from flax_transformer.ops.vocabulary import log_probabilities
from flax_transformer.shapes import MASKED, array_tree

# Logits divided by a smaller temperature may leave the range of float32.
LEAST_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class TokenSampling:
    """How the next token is drawn.

    Attributes:
        temperature: divisor of the logits; below 1 it favours probable tokens.
        top_k: draw from this number of most probable tokens; 0 allows all.
        top_p: draw from the smallest set of most probable tokens whose probabilities sum to at least this; 1 allows
            all.
        min_p: draw from tokens with at least this share of the highest probability; 0 allows all.

    Raises:
        ConfigError: a value is out of range, or fields contradict each other.

    Example:
        >>> TokenSampling(temperature=0.7, top_p=0.9).top_k  # no limit
        0

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
                f"temperature must be at least {LEAST_TEMPERATURE:g}, got {self.temperature}. For the most probable "
                "outputs, set decoding.method: beam."
            )
        if self.top_k < 0:
            raise ConfigError(f"top_k must not be negative (0 is all tokens), got {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, got {self.top_p}.")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p must lie between 0 and 1, got {self.min_p}.")


@dataclass(frozen=True)
class SamplingConfig:
    """The static settings of sampling.

    Attributes:
        num_samples: number of outputs that are drawn for each sentence, K.
        max_length: most tokens of an output, end token included, T. Sentences may have lower limits.
        start_token: token that the first step reads.
        end_token: token that ends an output.
        length_penalty: makes scores of different lengths comparable.
        token: how the next token is drawn.
        excluded: tokens that no output contains, such as padding.

    Raises:
        ConfigError: a value is out of range.

    Example:
        >>> penalty = LengthPenalty.parse("none")
        >>> SamplingConfig(4, 100, start_token=1, end_token=2, length_penalty=penalty).token.temperature
        1.0
    """

    num_samples: int
    max_length: int
    start_token: int
    end_token: int
    length_penalty: LengthPenalty
    token: TokenSampling = TokenSampling()
    excluded: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("num_samples", "max_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")


def keep_probable(log_probs: Float[Array, "B K V"], config: TokenSampling) -> Float[Array, "B K V"]:
    """Returns log-probabilities with excluded tokens MASKED. The most probable token is always kept.

    The temperature is applied first. Then each limit is applied to the same distribution.
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
            before = jnp.cumsum(probabilities, axis=-1) - probabilities  # sum over all more probable tokens
            needed = jnp.sum(before < config.top_p, axis=-1, keepdims=True)  # at least 1
            kept &= log_probs >= jnp.take_along_axis(ordered, needed - 1, axis=-1)
    if config.min_p:
        kept &= log_probs >= jnp.max(log_probs, axis=-1, keepdims=True) + jnp.log(jnp.float32(config.min_p))
    return jnp.where(kept, log_probs, MASKED)


@array_tree
@dataclasses.dataclass(frozen=True)
class SamplingState:
    """The state of sampling between two steps. No step changes the first three attributes.

    Attributes:
        max_lengths: [B], most tokens of each sentence's outputs, end token included.
        keys: [B, K], random keys.
        processors: logits processors, applied in this order.
        step: number of tokens drawn so far.
        tokens, log_probs: [B, K, T].
        lengths: [B, K], 0 until a sample ends. A sample without any allowed token ends, but is no output.
        auxiliary: tree of [B, K, T, ...].
        decoder: state of the decoder.
    """

    max_lengths: Int[Array, "B"]
    keys: Key[Array, "B K"]
    processors: tuple[LogitsProcessor, ...]
    step: Int[Array, ""]
    tokens: Int[Array, "B K T"]
    log_probs: Float[Array, "B K T"]
    lengths: Int[Array, "B K"]
    auxiliary: Any
    decoder: Any


def sample(
    functions: DecoderFunctions,
    config: SamplingConfig,
    decoder: Any,
    max_lengths: Int[Array, "B"],
    seeds: Int[Array, "B"],
    processors: Sequence[LogitsProcessor] = (),
) -> Hypotheses:
    """Returns K outputs of each sentence, drawn independently: finished ones by score, then unfinished ones by score.

    Samples may be equal. A sample for which the processors allow no token is no output. It has length 0 and comes last.

    Args:
        functions: the decoder; only its step is called.
        config: static settings.
        decoder: state of the decoder before the first token, with a slot for each sentence, and a beam for each sample.
        max_lengths: most tokens of each sentence's outputs, end token included; 0 marks padding.
        seeds: seed of each sentence.
        processors: change log-probabilities before tokens are drawn; applied in this order.

    Example:
        >>> # Token 2 follows token 0, and the end token 1 follows token 2.
        >>> chain = jnp.array([[-99.0, -99.0, 9.0], [0.0, 0.0, 0.0], [-99.0, 9.0, -99.0]])
        >>> functions = DecoderFunctions(lambda tokens, _: (chain[tokens], None, None), lambda s, _: s, lambda s, *_: s)
        >>> config = SamplingConfig(2, 4, start_token=0, end_token=1, length_penalty=LengthPenalty.parse("none"))
        >>> found = sample(functions, config, None, jnp.array([4]), jnp.array([7]))
        >>> found.tokens[0, :, :2].tolist()
        [[2, 1], [2, 1]]
    """
    shape = (*max_lengths.shape, config.num_samples, config.max_length)
    auxiliary = jax.eval_shape(functions.step, jnp.zeros(shape[:2], jnp.int32), decoder)[1]
    state = SamplingState(
        max_lengths,
        keys=jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), config.num_samples))(
            seeds.astype(jnp.uint32)
        ),
        processors=tuple(processors),
        step=jnp.zeros((), jnp.int32),
        tokens=jnp.full(shape, config.end_token, jnp.int32),
        log_probs=jnp.zeros(shape, jnp.float32),
        lengths=jnp.zeros(shape[:2], jnp.int32),
        auxiliary=jax.tree.map(lambda x: jnp.zeros((*shape, *x.shape[2:]), x.dtype), auxiliary),
        decoder=decoder,
    )
    state = jax.lax.while_loop(lambda state: jnp.any(_runs(state)), functools.partial(_draw, functions, config), state)
    return _ranked(config, state)


def _runs(state: SamplingState) -> Bool[Array, "B K"]:
    """Returns which samples have not ended."""
    return (state.lengths == 0) & (state.step < state.max_lengths)[:, None]


def _draw(functions: DecoderFunctions, config: SamplingConfig, state: SamplingState) -> SamplingState:
    """Returns the state with one more token for each sample that has not ended."""
    last = jax.lax.dynamic_index_in_dim(state.tokens, jnp.maximum(state.step - 1, 0), axis=2, keepdims=False)
    logits, auxiliary, decoder = functions.step(jnp.where(state.step == 0, config.start_token, last), state.decoder)
    allowed = log_probabilities(logits)
    sentences = jnp.arange(state.tokens.shape[0])
    progress = Progress(state.tokens, jnp.broadcast_to(state.step, sentences.shape), sentences)
    for processor in state.processors:
        allowed = processor(allowed, progress)
    if config.excluded:
        excluded = np.isin(np.arange(logits.shape[-1]), config.excluded)[None, None]
        allowed = jnp.where(excluded, MASKED, allowed)
    keys = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, state.step)))(state.keys)
    drawn = jax.vmap(jax.vmap(jax.random.categorical))(keys, keep_probable(allowed, config.token))
    runs = _runs(state)
    drawn = jnp.where(runs, drawn, config.end_token).astype(jnp.int32)
    chosen = jnp.take_along_axis(allowed, drawn[..., None], axis=2)[..., 0]  # MASKED if no token was allowed
    ends = (drawn == config.end_token) | (chosen <= MASKED / 2)  # a NaN does not end

    def put(history: Shaped[Array, "B K T *rest"], new: Shaped[Array, "B K *rest"]) -> Shaped[Array, "B K T *rest"]:
        return jax.lax.dynamic_update_index_in_dim(history, new, state.step, axis=2)

    return dataclasses.replace(
        state,
        step=state.step + 1,
        tokens=put(state.tokens, drawn),
        log_probs=put(state.log_probs, jnp.where(runs, chosen, 0.0)),
        lengths=jnp.where(runs & ends, state.step + 1, state.lengths),
        auxiliary=jax.tree.map(put, state.auxiliary, auxiliary),
        decoder=decoder,
    )


def _ranked(config: SamplingConfig, state: SamplingState) -> Hypotheses:
    """Returns the samples of each sentence, finished ones first, by score within each."""
    stuck = jnp.any(state.log_probs <= MASKED / 2, axis=2)  # no token was left, so there is no output
    finished = (state.lengths > 0) & ~stuck
    lengths = jnp.where(finished, state.lengths, jnp.broadcast_to(state.max_lengths[:, None], stuck.shape))
    lengths = jnp.where(stuck, 0, lengths)
    scores = jnp.sum(state.log_probs, axis=2) / config.length_penalty.divisor(jnp.maximum(lengths, 1))
    scores = jnp.where(lengths > 0, scores, MASKED)
    order = jnp.lexsort((-scores, ~finished), axis=-1)
    found = Hypotheses(state.tokens, lengths, scores, finished, state.log_probs, state.auxiliary)
    return jax.tree.map(lambda x: gather_beams(x, order), found)
