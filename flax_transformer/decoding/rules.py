"""What may follow what in an output: rules that a search asks at every step, each over the log-probabilities of a step.

A rule takes the log-probabilities of the next token and what has been decoded so far, and returns log-probabilities
that are lower or the same; MASKED forbids a token. None makes the others more probable in return, so that a score stays
what the model says of an output; but an end that is forced costs nothing.

Legend: N sentences, B slots, K hypotheses a slot, V vocabulary, T maximum length, P prefix length, Q phrases.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from flax_transformer.shapes import MASKED, array_tree

# In arrays of token ids: any token will do.
ANY = -1


@array_tree
@dataclasses.dataclass(frozen=True)
class Progress:
    """How far the hypotheses are.

    Attributes:
        tokens: [B, K, T]; what stands beyond `steps` tokens means nothing.
        steps: [B], tokens decoded so far.
        sentences: [B], which of the N sentences each slot holds.
    """

    tokens: Int[Array, "B K T"]
    steps: Int[Array, "B"]
    sentences: Int[Array, "B"]


Rule = Callable[[Float[Array, "B K V"], Progress], Float[Array, "B K V"]]


def _mark(tokens: Int[Array, "B K M"], marks: Bool[Array, "B K M"], vocab_size: int) -> Bool[Array, "B K V"]:
    """Returns which tokens of the vocabulary are marked at least once."""
    slots, beams = jnp.indices(tokens.shape[:2], sparse=True)
    nothing = jnp.zeros((*tokens.shape[:2], vocab_size), bool)
    return nothing.at[slots[..., None], beams[..., None], jnp.where(marks, tokens, vocab_size)].set(True, mode="drop")


def banned_tokens(banned: Bool[Array, "V"]) -> Rule:
    """Returns the rule that some tokens never occur; those that the vocabulary was padded with are not its business."""

    def rule(log_probs: Float[Array, "B K W"], _: Progress) -> Float[Array, "B K W"]:
        padded = jnp.pad(banned, (0, log_probs.shape[-1] - banned.shape[0]))
        return jnp.where(padded[None, None, :], MASKED, log_probs)

    return rule


def minimum_lengths(lengths: Int[Array, "N"], end_token: int) -> Rule:
    """Returns the rule that each sentence's outputs have at least so many tokens, end token included."""

    def rule(log_probs: Float[Array, "B K V"], progress: Progress) -> Float[Array, "B K V"]:
        wanted = jnp.take(lengths, progress.sentences, mode="fill", fill_value=0)
        too_short = (progress.steps + 1 < wanted)[:, None, None]
        is_end = (jnp.arange(log_probs.shape[-1]) == end_token)[None, None, :]
        return jnp.where(too_short & is_end, MASKED, log_probs)

    return rule


def no_repeated_ngrams(size: int) -> Rule:
    """Returns the rule that no sequence of `size` tokens occurs twice in an output.

    References:
        Paulus, Xiong and Socher 2018, section 2.5.
    """

    def rule(log_probs: Float[Array, "B K V"], progress: Progress) -> Float[Array, "B K V"]:
        tokens, steps = progress.tokens, progress.steps[:, None, None]
        num_starts = tokens.shape[2] - size + 1
        if num_starts < 1:
            return log_probs
        starts = jnp.arange(num_starts)[None, None, :]
        seen = starts + size - 1 < steps  # [B, 1, starts]: the whole n-gram has been decoded
        for back in range(1, size):  # its first tokens are the last ones of the output
            place = jnp.broadcast_to(jnp.maximum(steps - back, 0), (*tokens.shape[:2], 1))
            last = jnp.take_along_axis(tokens, place, axis=2)
            seen = seen & (jax.lax.dynamic_slice_in_dim(tokens, size - 1 - back, num_starts, axis=2) == last)
        final = tokens[:, :, size - 1 :]
        return jnp.where(_mark(final, jnp.broadcast_to(seen, final.shape), log_probs.shape[-1]), MASKED, log_probs)

    return rule


def repetition_penalty(factor: float) -> Rule:
    """Returns the rule that multiplies the log-probability of every token that has occurred by a factor of at least 1.

    It is part of the score.

    References:
        Keskar et al. 2019 (CTRL), section 4.1, on log-probabilities.
    """

    def rule(log_probs: Float[Array, "B K V"], progress: Progress) -> Float[Array, "B K V"]:
        decoded = jnp.arange(progress.tokens.shape[2])[None, None, :] < progress.steps[:, None, None]
        decoded = jnp.broadcast_to(decoded, progress.tokens.shape)
        repeated = _mark(progress.tokens, decoded, log_probs.shape[-1]) & (log_probs > MASKED / 2)
        return jnp.where(repeated, log_probs * jnp.float32(factor), log_probs)

    return rule


def banned_phrases(phrases: Sequence[Sequence[int]]) -> Rule:
    """Returns the rule that some sequences of tokens never occur; each has at least one token."""
    longest = max(map(len, phrases))
    heads = np.full((len(phrases), longest - 1), ANY, np.int32)  # [Q, W], what stands before the last token
    for row, phrase in zip(heads, phrases, strict=True):
        row[len(row) - len(phrase) + 1 :] = phrase[:-1]
    finals = np.array([phrase[-1] for phrase in phrases], np.int32)

    def rule(log_probs: Float[Array, "B K V"], progress: Progress) -> Float[Array, "B K V"]:
        slots, beams, _ = progress.tokens.shape
        place = progress.steps[:, None] - np.arange(longest - 1, 0, -1, dtype=np.int32)[None, :]  # [B, W]
        place = jnp.broadcast_to(place[:, None, :], (slots, beams, longest - 1))
        window = jnp.take_along_axis(progress.tokens, jnp.maximum(place, 0), axis=2)
        window = jnp.where(place < 0, ANY - 1, window)  # before the beginning: matches no token
        matches = (heads[None, None] == window[:, :, None, :]) | (heads[None, None] == ANY)
        found = jnp.all(matches, axis=-1)  # [B, K, Q]
        final = jnp.broadcast_to(finals[None, None, :], found.shape)
        return jnp.where(_mark(final, found, log_probs.shape[-1]), MASKED, log_probs)

    return rule


def forced_end(lengths: Int[Array, "N"], end_token: int) -> Rule:
    """Returns the rule that the end token closes an output at its sentence's maximum length, and costs nothing there.

    Whatever the model and the rules before it say, its log-probability is 0 and no other token is left; so it comes
    after all others.
    """

    def rule(log_probs: Float[Array, "B K V"], progress: Progress) -> Float[Array, "B K V"]:
        limits = jnp.take(lengths, progress.sentences, mode="fill", fill_value=0)
        is_last = (progress.steps + 1 == limits)[:, None, None]
        is_end = (jnp.arange(log_probs.shape[-1]) == end_token)[None, None, :]
        return jnp.where(is_last, jnp.where(is_end, 0.0, MASKED), log_probs)

    return rule


def forced_prefixes(prefixes: Int[Array, "N P"], others: Sequence[Rule]) -> Rule:
    """Returns the rule that each sentence's outputs begin with its prefix, and keep the other rules after it.

    Args:
        prefixes: `ANY` after each prefix's end.
        others: not asked inside a prefix, which is what it is.
    """

    def rule(log_probs: Float[Array, "B K V"], progress: Progress) -> Float[Array, "B K V"]:
        place = jnp.minimum(progress.steps, prefixes.shape[1] - 1)
        sentences = jnp.minimum(progress.sentences, prefixes.shape[0] - 1)
        wanted = jnp.where(progress.steps < prefixes.shape[1], prefixes[sentences, place], ANY)[:, None, None]
        ruled = log_probs
        for other in others:
            ruled = other(ruled, progress)
        is_wanted = jnp.arange(log_probs.shape[-1])[None, None, :] == wanted
        return jnp.where(wanted == ANY, ruled, jnp.where(is_wanted, log_probs, MASKED))

    return rule
