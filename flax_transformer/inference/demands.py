"""What is demanded of outputs, as ids: what they begin with, what they hold and what not; and what contradicts what."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flax_transformer.config import DecodingConfig
from flax_transformer.data.sentencepiece_tokenizer import WORD_START
from flax_transformer.data.tokenizer import Tokenizer
from flax_transformer.errors import ConfigError, InputError


@dataclass(frozen=True)
class Demands:
    """Turns what is demanded as text into ids.

    Attributes:
        target: tokenizer of the outputs.
        decoding: settings that a demand may contradict.
        longest: tokens that the model's outputs have at most, end token not counted.
    """

    target: Tokenizer
    decoding: DecodingConfig
    longest: int

    @property
    def _longest(self) -> tuple[int, str]:
        """How many tokens outputs have at most whatever the source, end token not counted, and which field says so.

        A limit that grows with the source gives way to what is demanded; one that does not is meant as it stands.
        """
        fixed = self.decoding.max_length_offset - 1
        if self.decoding.max_length_factor == 0 and fixed < self.longest:
            return fixed, "decoding.max_length_offset with max_length_factor 0"
        return self.longest, "model.max_target_length"

    def banned_phrases(self) -> dict[str, list[int]]:
        """Returns the ids of each banned phrase.

        Raises:
            ConfigError: one that has no token, or characters that the vocabulary does not hold.
        """
        texts = self.decoding.banned_phrases
        phrases = dict(zip(texts, self.target.encode(texts), strict=True))
        for text, ids in phrases.items():
            if not ids:
                raise ConfigError(f"decoding.banned_phrases: {text!r} has no token that could be banned.")
            if self.target.special.unknown in ids:
                raise ConfigError(
                    f"decoding.banned_phrases: {text!r} has characters that the target vocabulary does not hold, so no "
                    "output can hold it: leave it out (decoding.ban_unknown bans all that is unknown)."
                )
        return phrases

    def banned_tokens(self) -> dict[str, int]:
        """Returns the id of each banned token.

        Raises:
            ConfigError: one that is no piece of the target vocabulary.
        """
        tokens = {name: self.target.id_of(name) for name in self.decoding.banned_tokens}
        for name, number in tokens.items():
            if number is None:
                begins = WORD_START + name.lstrip("_ ")
                hint = "" if self.target.id_of(begins) is None else f" Did you mean {begins!r}?"
                raise ConfigError(
                    f"decoding.banned_tokens: {name!r} is no piece that outputs are made of.{hint} Name pieces as "
                    f"translate --json does, with {WORD_START} where a word begins (decoding.ban_unknown bans what is "
                    "unknown)."
                )
        return {name: number for name, number in tokens.items() if number is not None}

    def _bans(self) -> dict[str, list[int]]:
        """Returns the ids of all that is banned, by words for it."""
        bans = {f"decoding.banned_phrases ({text!r})": ids for text, ids in self.banned_phrases().items()}
        return bans | {f"decoding.banned_tokens ({name!r})": [number] for name, number in self.banned_tokens().items()}

    def prefixes(self, prefixes: Sequence[str] | None, num_sentences: int) -> list[list[int]]:
        """Returns the ids of each sentence's prefix, which is empty without one.

        Raises:
            ConfigError: not as many prefixes as sentences, an output that must be longer than the model makes any, or
                another setting contradicts a prefix.
            InputError: a prefix without a token or with characters that the vocabulary does not hold, or one that is
                too long.
        """
        (longest, limit), decoding = self._longest, self.decoding
        if decoding.min_length > longest:
            raise ConfigError(
                f"decoding.min_length ({decoding.min_length}) is more than the {longest} tokens that outputs have at "
                f"most ({limit}, less the end token)."
            )
        if prefixes is None:
            return [[] for _ in range(num_sentences)]
        if isinstance(prefixes, str) or len(prefixes) != num_sentences:
            raise ConfigError(f"prefixes must be a list with one for each of the {num_sentences} sentences.")
        encoded, banned = self.target.encode(prefixes), self._bans()
        for number, (text, ids) in enumerate(zip(prefixes, encoded, strict=True), start=1):
            if text and not ids:
                raise InputError(
                    f"prefix {number} ({text!r}) has no token that an output could begin with: leave it out."
                )
            if self.target.special.unknown in ids:
                raise InputError(
                    f"prefix {number} ({text!r}) has characters that the target vocabulary does not hold, so no output "
                    "can begin with it."
                )
            self._check_allowed(f"prefix {number} ({text!r})", ids, banned)
            if len(ids) > longest:
                raise InputError(
                    f"prefix {number} has {len(ids)} tokens, and outputs have at most {longest} ({limit}, less the end "
                    "token)."
                )
        return encoded

    def required_phrases(
        self, required: Sequence[Sequence[str]], prefixes: Sequence[Sequence[int]] | None = None
    ) -> list[list[list[int]]]:
        """Returns the ids of each sentence's required phrases.

        Args:
            required: phrases of each sentence.
            prefixes: ids that each sentence's outputs begin with.

        Raises:
            ConfigError: not lists, or another setting contradicts them.
            InputError: a phrase that is empty, that the vocabulary does not hold, or more than fits an output.
        """
        target, (longest, limit) = self.target, self._longest
        if self.decoding.method != "beam":
            raise ConfigError("required phrases and decoding.method: sampling contradict each other: use beam.")
        encoded, banned = [], self._bans()
        for number, texts in enumerate(required, start=1):
            if isinstance(texts, str):
                raise ConfigError(f"required phrases of sentence {number}: give a list, not one text ({texts!r}).")
            phrases = target.encode(list(texts))
            for text, ids in zip(texts, phrases, strict=True):
                named = f"required phrase {text!r} of sentence {number}"
                if not ids or self.target.special.unknown in ids:
                    what = "is empty." if not ids else "has characters that the target vocabulary does not hold."
                    raise InputError(f"{named} {what}")
                self._check_allowed(named, ids, banned)
            total = len(prefixes[number - 1] if prefixes else ()) + sum(map(len, phrases))
            if total > longest:
                raise InputError(
                    f"the prefix and the required phrases of sentence {number} have {total} tokens, one after the "
                    f"other, and outputs have at most {longest} ({limit}, less the end token)."
                )
            encoded.append(phrases)
        return encoded

    def _check_allowed(self, named: str, ids: list[int], banned: dict[str, list[int]]) -> None:
        """Raises a `ConfigError` if every output that holds these ids, those of what is named, is against the rules."""
        for by, ban in banned.items():
            if holds(ids, ban):
                raise ConfigError(f"{named} and {by} contradict each other: leave out one of them.")
        size = self.decoding.no_repeat_ngram
        if size and (twice := _repeated(ids, size)):
            raise ConfigError(
                f"{named} and decoding.no_repeat_ngram ({size}) contradict each other, since it holds "
                f"{' '.join(self.target.pieces(twice))!r} twice: leave out one of them."
            )


def holds(tokens: list[Any], phrase: list[Any]) -> bool:
    """Returns whether the tokens of a phrase occur one after the other."""
    return any(tokens[n : n + len(phrase)] == phrase for n in range(len(tokens) - len(phrase) + 1))


def _repeated(tokens: list[int], size: int) -> list[int]:
    """Returns the first sequence of `size` tokens that has occurred before, or nothing."""
    seen: set[tuple[int, ...]] = set()
    for place in range(len(tokens) - size + 1):
        ngram = tokens[place : place + size]
        if tuple(ngram) in seen:
            return ngram
        seen.add(tuple(ngram))
    return []
