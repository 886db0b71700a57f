"""Constraints on outputs as ids, checked for contradictions: lengths, prefixes, required and suppressed phrases."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flax_transformer.config.recipe import DecodingConfig
from flax_transformer.data.tokenizer import Tokenizer
from flax_transformer.errors import ConfigError, InputError, shown

# The beginning of a sentence's outputs: text, or piece names as in `Hypothesis.tokens`.
Prefix = str | Sequence[str]


@dataclass(frozen=True)
class Constraints:
    """Turns the constraints on the outputs of one sentence into ids.

    Attributes:
        target: tokenizer of the outputs.
        decoding: settings that a constraint may contradict.
        longest: most tokens of the model's outputs, without the end token.
    """

    target: Tokenizer
    decoding: DecodingConfig
    longest: int

    @property
    def _longest(self) -> tuple[int, str]:
        """The most tokens of an output of any source, without the end token, and the field that sets this limit.

        A limit that grows with the source is raised for constraints that need more tokens. A fixed limit is not.
        """
        fixed = self.decoding.max_length_offset
        if self.decoding.max_length_factor == 0 and fixed < self.longest:
            return fixed, "decoding.max_length_offset with max_length_factor 0"
        return self.longest, "model.max_target_length, less the end token"

    def max_length(self, source_length: int, constrained_length: int) -> int:
        """Returns the most target tokens, end token included.

        Args:
            source_length: number of source tokens, end token included.
            constrained_length: number of tokens of the prefix and the required phrases.
        """
        decoding = self.decoding
        limit = int(decoding.max_length_factor * max(source_length - 1, 0)) + decoding.max_length_offset
        return min(max(limit, decoding.min_length, constrained_length), self.longest) + 1

    def check_settings(self) -> None:
        """Checks that outputs can obey the settings.

        Raises:
            ConfigError: a minimum length above the maximum length, or a suppressed phrase or token that the vocabulary
                lacks.
        """
        longest, limit = self._longest
        if self.decoding.min_length > longest:
            raise ConfigError(
                f"decoding.min_length ({self.decoding.min_length}) is more than the {longest} tokens that outputs have "
                f"at most ({limit})."
            )
        _ = self._suppressed

    @functools.cached_property
    def suppress_sequences(self) -> dict[str, list[int]]:
        """The ids of each suppressed phrase.

        Raises:
            ConfigError: a phrase without a token, or with characters outside the vocabulary.
        """
        texts = self.decoding.suppress_sequences
        phrases = dict(zip(texts, self.target.encode(texts), strict=True))
        for text, ids in phrases.items():
            if not ids:
                raise ConfigError(f"decoding.suppress_sequences: {shown(text)} has no token that could be suppressed.")
            if self.target.special.unknown in ids:
                raise ConfigError(
                    f"decoding.suppress_sequences: {shown(text)} has characters that the target vocabulary does not "
                    "hold, so no output contains it. Leave it out (decoding.suppress_unknown excludes unknown tokens)."
                )
        return phrases

    @functools.cached_property
    def suppress_tokens(self) -> dict[str, int]:
        """The id of each suppressed token.

        Raises:
            ConfigError: a name that is no piece of the target vocabulary.
        """
        found = {}
        for name in self.decoding.suppress_tokens:
            if (number := self.target.id_of(name)) is None:
                raise ConfigError(
                    f"decoding.suppress_tokens: {self._no_piece(name)} (decoding.suppress_unknown excludes what is "
                    "unknown)."
                )
            found[name] = number
        return found

    @functools.cached_property
    def _suppressed(self) -> list[tuple[str, list[int]]]:
        """Each suppressed phrase and token: its name in errors, and its ids."""
        phrases = [(f"decoding.suppress_sequences ({shown(text)})", i) for text, i in self.suppress_sequences.items()]
        tokens = [(f"decoding.suppress_tokens ({shown(name)})", [i]) for name, i in self.suppress_tokens.items()]
        return phrases + tokens

    def _no_piece(self, name: str) -> str:
        """Returns the error text for a name that no piece has, without a full stop."""
        try:  # the piece that the name is as a word of its own
            meant = self.target.encode([name.lstrip("_ ")])[0]
        except InputError:
            meant = []
        known = len(meant) == 1 and meant[0] != self.target.special.unknown
        hint = f" Did you mean {shown(self.target.pieces(meant)[0])}?" if known else ""
        return (
            f"{shown(name)} is no piece that outputs are made of.{hint} Name pieces as translate --json does, which "
            "shows where a word begins"
        )

    def prefix(self, prefix: Prefix) -> list[int]:
        """Returns the ids of a prefix; an empty list for an empty prefix.

        Piece names also reach tokens that no text contains, such as a token for the language of the output.

        Raises:
            InputError: a prefix without a token, a prefix with pieces or characters outside the vocabulary, or a prefix
                that is too long.
            ConfigError: another setting contradicts the prefix.
        """
        named = f"prefix {shown(prefix if isinstance(prefix, str) else ' '.join(prefix))}"
        if isinstance(prefix, str):
            (ids,) = self.target.encode([prefix])
        else:
            ids = [self._id_of(named, piece) for piece in prefix]
        if prefix and not ids:
            raise InputError(f"{named} has no token that an output could begin with: leave it out.")
        if self.target.special.unknown in ids:
            raise InputError(
                f"{named} has characters that the target vocabulary does not hold, so no output can begin with it."
            )
        self._check_allowed(named, ids)
        longest, limit = self._longest
        if len(ids) > longest:
            raise InputError(f"{named} has {len(ids)} tokens, and outputs have at most {longest} ({limit}).")
        return ids

    def _id_of(self, named: str, piece: str) -> int:
        number = self.target.id_of(piece)
        if number is None:
            raise InputError(f"{named}: {self._no_piece(piece)}.")
        return number

    def required_phrases(self, texts: Sequence[str], prefix: Sequence[int] = ()) -> list[list[int]]:
        """Returns the ids of the phrases that a sentence's outputs must contain.

        Args:
            texts: the phrases.
            prefix: ids that the outputs begin with.

        Raises:
            InputError: a phrase that is empty, a phrase with characters outside the vocabulary, or more tokens than an
                output has.
            ConfigError: another setting contradicts a phrase.
        """
        phrases = self.target.encode(list(texts))
        for text, ids in zip(texts, phrases, strict=True):
            named = f"required phrase {shown(text)}"
            if not ids or self.target.special.unknown in ids:
                what = "is empty." if not ids else "has characters that the target vocabulary does not hold."
                raise InputError(f"{named} {what}")
            self._check_allowed(named, ids)
        total, (longest, limit) = len(prefix) + sum(map(len, phrases)), self._longest
        if total > longest:
            raise InputError(
                f"the prefix and the required phrases have {total} tokens, one after the other, and outputs have at "
                f"most {longest} ({limit})."
            )
        return phrases

    def _check_allowed(self, named: str, ids: list[int]) -> None:
        """Raises a `ConfigError` if a setting forbids these ids. `named` is their name in the error."""
        for by, phrase in self._suppressed:
            if contains(ids, phrase):
                raise ConfigError(f"{named} and {by} contradict each other: leave out one of them.")
        size = self.decoding.no_repeat_ngram
        if size and (twice := _repeated(ids, size)):
            raise ConfigError(
                f"{named} and decoding.no_repeat_ngram ({size}) contradict each other, since it holds "
                f"{shown(' '.join(self.target.pieces(twice)))} twice: leave out one of them."
            )


def contains(tokens: list[Any], phrase: list[Any]) -> bool:
    """Returns whether the tokens of a phrase occur one after the other."""
    return any(tokens[n : n + len(phrase)] == phrase for n in range(len(tokens) - len(phrase) + 1))


def _repeated(tokens: list[int], size: int) -> list[int]:
    """Returns the first sequence of `size` tokens that occurs a second time; an empty list without any."""
    seen: set[tuple[int, ...]] = set()
    for place in range(len(tokens) - size + 1):
        ngram = tokens[place : place + size]
        if tuple(ngram) in seen:
            return ngram
        seen.add(tuple(ngram))
    return []
