"""Logits processors: rules on the next token, applied to the log-probabilities of each step.

A processor takes the log-probabilities of the next token and the tokens decoded so far. It returns equal or lower
log-probabilities; MASKED forbids a token. Only `ForceEos` raises one. Processors do not normalise, so a score remains
the model's own.

The arrays of a processor are part of a search's state. One program serves all values of these arrays. Static fields are
constants of the program. So are arrays that are made while it is traced, as a translator makes those of sequences.

Legend: N sentences, B slots, K hypotheses a slot, V vocabulary, T maximum length, P prefix length, Q sequences.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from flax_transformer.shapes import MASKED, array_tree, is_possible, static_field

# In arrays of token ids: matches any token.
ANY = -1


@array_tree
@dataclasses.dataclass(frozen=True)
class Progress:
    """The tokens of all hypotheses so far.

    Attributes:
        tokens: [B, K, T]; entries after `steps` tokens are unspecified.
        steps: [B], number of tokens decoded so far.
        sentences: [B], number of the sentence in each slot; N in an empty slot.

    Example:
        >>> progress = Progress(jnp.array([[[7, 8, 0]]]), steps=jnp.array([2]), sentences=jnp.array([0]))
        >>> progress.tokens[0, 0, : progress.steps[0]].tolist()
        [7, 8]
    """

    tokens: Int[Array, "B K T"]
    steps: Int[Array, "B"]
    sentences: Int[Array, "B"]


@runtime_checkable
class LogitsProcessor(Protocol):
    """Lowers the log-probabilities of tokens. A processor is an `array_tree`, since it is part of a search's state.

    Example:
        >>> @array_tree
        ... @dataclasses.dataclass(frozen=True)
        ... class HalveFirst:
        ...     def __call__(self, log_probs, progress):
        ...         return log_probs.at[..., 0].multiply(2.0)
        >>> progress = Progress(jnp.array([[[1]]]), steps=jnp.array([1]), sentences=jnp.array([0]))
        >>> HalveFirst()(jnp.array([[[-1.0, -1.0]]]), progress).tolist()
        [[[-2.0, -1.0]]]
    """

    def __call__(self, log_probs: Float[Array, "B K V"], progress: Progress) -> Float[Array, "B K V"]:
        """Returns the log-probabilities of the next token after this processor."""
        ...


def _mark(tokens: Int[Array, "B K M"], marks: Bool[Array, "B K M"], vocab_size: int) -> Bool[Array, "B K V"]:
    """Returns which tokens of the vocabulary are marked at least once."""
    slots, beams = jnp.indices(tokens.shape[:2], sparse=True)
    nothing = jnp.zeros((*tokens.shape[:2], vocab_size), bool)
    return nothing.at[slots[..., None], beams[..., None], jnp.where(marks, tokens, vocab_size)].set(True, mode="drop")


@array_tree
@dataclasses.dataclass(frozen=True)
class SuppressTokens:
    """Some tokens never occur.

    Attributes:
        suppressed: [V], True for tokens that never occur. Entries for the padding of the vocabulary may be left out.

    Example:
        >>> progress = Progress(jnp.array([[[2]]]), steps=jnp.array([1]), sentences=jnp.array([0]))
        >>> after = SuppressTokens(jnp.array([False, True, False]))(jnp.full((1, 1, 3), -1.0), progress)
        >>> is_possible(after).tolist()
        [[[True, False, True]]]
    """

    suppressed: Bool[Array, "V"]

    def __call__(self, log_probs: Float[Array, "B K W"], progress: Progress) -> Float[Array, "B K W"]:
        """Returns the log-probabilities with these tokens MASKED."""
        padded = jnp.pad(self.suppressed, (0, log_probs.shape[-1] - self.suppressed.shape[0]))
        return jnp.where(padded[None, None, :], MASKED, log_probs)


@array_tree
@dataclasses.dataclass(frozen=True)
class MinLength:
    """The outputs of each sentence have at least `lengths` tokens.

    Attributes:
        lengths: [N], fewest tokens, end token included.
        end_token: token that ends an output.

    Example:
        >>> progress = Progress(jnp.array([[[2, 0]]]), steps=jnp.array([1]), sentences=jnp.array([0]))
        >>> after = MinLength(jnp.array([3]), end_token=1)(jnp.full((1, 1, 3), -1.0), progress)
        >>> is_possible(after).tolist()
        [[[True, False, True]]]
    """

    lengths: Int[Array, "N"]
    end_token: int = static_field()

    def __call__(self, log_probs: Float[Array, "B K V"], progress: Progress) -> Float[Array, "B K V"]:
        """Returns the log-probabilities with the end token MASKED where it would come too early."""
        wanted = jnp.take(self.lengths, progress.sentences, mode="fill", fill_value=0)
        too_short = (progress.steps + 1 < wanted)[:, None, None]
        is_end = (jnp.arange(log_probs.shape[-1]) == self.end_token)[None, None, :]
        return jnp.where(too_short & is_end, MASKED, log_probs)


@array_tree
@dataclasses.dataclass(frozen=True)
class NoRepeatNgram:
    """No sequence of `size` tokens occurs twice in an output.

    Example:
        >>> progress = Progress(jnp.array([[[2, 1, 2]]]), steps=jnp.array([3]), sentences=jnp.array([0]))
        >>> after = NoRepeatNgram(2)(jnp.full((1, 1, 3), -1.0), progress)
        >>> is_possible(after).tolist()
        [[[True, False, True]]]

    References:
        Paulus, Xiong and Socher 2018, section 2.5.
    """

    size: int = static_field()

    def __call__(self, log_probs: Float[Array, "B K V"], progress: Progress) -> Float[Array, "B K V"]:
        """Returns the log-probabilities with every token MASKED that would complete such a sequence."""
        tokens, steps = progress.tokens, progress.steps[:, None, None]
        num_starts = tokens.shape[2] - self.size + 1
        if num_starts < 1:
            return log_probs
        starts = jnp.arange(num_starts)[None, None, :]
        seen = starts + self.size - 1 < steps  # [B, 1, starts]: the whole n-gram has been decoded
        for back in range(1, self.size):  # its first tokens are the last ones of the output
            place = jnp.broadcast_to(jnp.maximum(steps - back, 0), (*tokens.shape[:2], 1))
            last = jnp.take_along_axis(tokens, place, axis=2)
            seen = seen & (jax.lax.dynamic_slice_in_dim(tokens, self.size - 1 - back, num_starts, axis=2) == last)
        final = tokens[:, :, self.size - 1 :]
        return jnp.where(_mark(final, jnp.broadcast_to(seen, final.shape), log_probs.shape[-1]), MASKED, log_probs)


@array_tree
@dataclasses.dataclass(frozen=True)
class RepetitionPenalty:
    """A factor of at least 1 multiplies the log-probability of every token that has occurred.

    The penalty is part of the score.

    Example:
        >>> progress = Progress(jnp.array([[[2, 0]]]), steps=jnp.array([1]), sentences=jnp.array([0]))
        >>> RepetitionPenalty(1.5)(jnp.full((1, 1, 3), -1.0), progress).tolist()
        [[[-1.0, -1.0, -1.5]]]

    References:
        Keskar et al. 2019 (CTRL), section 4.1, here with log-probabilities in place of logits.
    """

    factor: float = static_field()

    def __call__(self, log_probs: Float[Array, "B K V"], progress: Progress) -> Float[Array, "B K V"]:
        """Returns the log-probabilities, lower for the tokens that have occurred."""
        decoded = jnp.arange(progress.tokens.shape[2])[None, None, :] < progress.steps[:, None, None]
        decoded = jnp.broadcast_to(decoded, progress.tokens.shape)
        repeated = _mark(progress.tokens, decoded, log_probs.shape[-1]) & is_possible(log_probs)
        return jnp.where(repeated, log_probs * jnp.float32(self.factor), log_probs)


@array_tree
@dataclasses.dataclass(frozen=True)
class SuppressSequences:
    """Some sequences of tokens never occur.

    Attributes:
        heads: [Q, P], the tokens of each sequence before its last one, right-aligned; `ANY` before its beginning.
        finals: [Q], the last token of each sequence.

    Example:
        >>> progress = Progress(jnp.array([[[0, 2]]]), steps=jnp.array([2]), sentences=jnp.array([0]))
        >>> after = SuppressSequences.of([[2, 1]])(jnp.full((1, 1, 3), -1.0), progress)
        >>> is_possible(after).tolist()
        [[[True, False, True]]]
    """

    heads: Int[Array, "Q P"]
    finals: Int[Array, "Q"]

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> "SuppressSequences":
        """Returns the processor for sequences that have at least one token each.

        Example: [[3], [1, 2]] gives heads [[ANY], [1]] and finals [3, 2].
        """
        longest = max(map(len, sequences))
        heads = np.full((len(sequences), longest - 1), ANY, np.int32)
        for row, sequence in zip(heads, sequences, strict=True):
            row[len(row) - len(sequence) + 1 :] = sequence[:-1]
        return cls(jnp.asarray(heads), jnp.asarray([sequence[-1] for sequence in sequences], jnp.int32))

    def __call__(self, log_probs: Float[Array, "B K V"], progress: Progress) -> Float[Array, "B K V"]:
        """Returns the log-probabilities with every token MASKED that would complete such a sequence."""
        slots, beams, _ = progress.tokens.shape
        size = self.heads.shape[1]
        place = progress.steps[:, None] - np.arange(size, 0, -1, dtype=np.int32)[None, :]  # [B, P]
        place = jnp.broadcast_to(place[:, None, :], (slots, beams, size))
        window = jnp.take_along_axis(progress.tokens, jnp.maximum(place, 0), axis=2)
        window = jnp.where(place < 0, ANY - 1, window)  # before the beginning: matches no token
        matches = (window[:, :, None, :] == self.heads[None, None]) | (self.heads[None, None] == ANY)
        found = jnp.all(matches, axis=-1)  # [B, K, Q]
        final = jnp.broadcast_to(self.finals[None, None, :], found.shape)
        return jnp.where(_mark(final, found, log_probs.shape[-1]), MASKED, log_probs)


@array_tree
@dataclasses.dataclass(frozen=True)
class ForceEos:
    """An output that reaches its maximum length ends there with the end token, at no cost.

    The log-probability of the end token is 0 there, and all other tokens are MASKED. This processor comes after all
    others, since it overrides them.

    Attributes:
        lengths: [N], the maximum lengths, end token included.
        end_token: token that ends an output.

    Example:
        >>> progress = Progress(jnp.array([[[2, 0]]]), steps=jnp.array([1]), sentences=jnp.array([0]))
        >>> after = ForceEos(jnp.array([2]), end_token=1)(jnp.full((1, 1, 3), -1.0), progress)
        >>> is_possible(after).tolist()
        [[[False, True, False]]]
    """

    lengths: Int[Array, "N"]
    end_token: int = static_field()

    def __call__(self, log_probs: Float[Array, "B K V"], progress: Progress) -> Float[Array, "B K V"]:
        """Returns the log-probabilities; the last token of the maximum length can only be the end token."""
        limits = jnp.take(self.lengths, progress.sentences, mode="fill", fill_value=0)
        is_last = (progress.steps + 1 == limits)[:, None, None]
        is_end = (jnp.arange(log_probs.shape[-1]) == self.end_token)[None, None, :]
        return jnp.where(is_last, jnp.where(is_end, 0.0, MASKED), log_probs)


@array_tree
@dataclasses.dataclass(frozen=True)
class ForcePrefix:
    """The outputs of each sentence begin with its prefix.

    Attributes:
        prefixes: [N, P], `ANY` after each prefix's end; P is at least 1.
        others: processors of the tokens after the prefix; they do not apply to the prefix.

    Example:
        >>> progress = Progress(jnp.array([[[2, 1]]]), steps=jnp.array([1]), sentences=jnp.array([0]))
        >>> after = ForcePrefix(jnp.array([[2, 0, ANY]]))(jnp.full((1, 1, 3), -1.0), progress)
        >>> is_possible(after).tolist()
        [[[True, False, False]]]
    """

    prefixes: Int[Array, "N P"]
    others: tuple[LogitsProcessor, ...] = ()

    def __call__(self, log_probs: Float[Array, "B K V"], progress: Progress) -> Float[Array, "B K V"]:
        """Returns the log-probabilities: inside the prefix, all other tokens are MASKED; after it, `others` apply."""
        prefixes = self.prefixes
        place = jnp.minimum(progress.steps, prefixes.shape[1] - 1)
        sentences = jnp.minimum(progress.sentences, prefixes.shape[0] - 1)
        wanted = jnp.where(progress.steps < prefixes.shape[1], prefixes[sentences, place], ANY)[:, None, None]
        processed = log_probs
        for other in self.others:
            processed = other(processed, progress)
        is_wanted = jnp.arange(log_probs.shape[-1])[None, None, :] == wanted
        return jnp.where(wanted == ANY, processed, jnp.where(is_wanted, log_probs, MASKED))
