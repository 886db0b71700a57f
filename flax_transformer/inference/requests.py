"""Requests: the ids and limits of each sentence for a search."""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from flax_transformer.config.recipe import DecodingConfig
from flax_transformer.data.text_files import MAX_CHARACTERS
from flax_transformer.data.tokenizer import Tokenizer
from flax_transformer.errors import ConfigError, InputError, as_texts, check_type, shown
from flax_transformer.inference.chunks import Shape, length_bucket
from flax_transformer.inference.constraints import Constraints, Prefix
from flax_transformer.inference.translation import NoTranslation
from flax_transformer.models.build import ModelConfig

# XLA numbers the candidates of all beams of a sentence with 32 bits. A beam has two candidates for each place.
MOST_BEAMS = 30_000


@dataclass(frozen=True)
class Request:
    """The input of a search for one sentence. It does not depend on other sentences.

    Attributes:
        sentence: the raw text, or its first `MAX_CHARACTERS`.
        source: ids that the encoder reads, end token included; empty for a sentence without a token.
        num_tokens: number of tokens of this text, without the end token.
        truncated: whether the sentence was cut because it is too long.
        prefix: ids that the outputs begin with.
        required: phrases that the outputs must contain.
        phrases: ids of each required phrase.
        seed: seed of sampling.
        max_length: most tokens of an output, end token included.
        shape: padded lengths that decide which program searches the sentence.
    """

    sentence: str
    source: list[int]
    num_tokens: int
    truncated: bool
    prefix: list[int]
    required: list[str]
    phrases: list[list[int]]
    seed: int
    max_length: int
    shape: Shape


@dataclass(frozen=True)
class RequestReader:
    """Makes requests from text.

    Attributes:
        source: tokenizer of the sentences.
        constraints: constraints on the outputs.
        max_source_length: most source tokens of the model, end token included.
    """

    source: Tokenizer
    constraints: Constraints
    max_source_length: int

    def read(self, sentence: str, prefix: Prefix = "", required: Sequence[str] = ()) -> Request:
        """Returns the request for a sentence.

        Args:
            sentence: raw text.
            prefix: text or piece names that its outputs begin with.
            required: phrases that its outputs must contain.

        Raises:
            InputError: the text is not valid Unicode, or a prefix or phrase is impossible or contradicts a setting.
        """
        return self._read(sentence, self.source.encode([sentence[:MAX_CHARACTERS]])[0], prefix, required)

    def _read(self, sentence: str, ids: list[int], prefix: Prefix, required: Sequence[str]) -> Request:
        constraints, longest = self.constraints, self.constraints.longest + 1
        forced = constraints.prefix(prefix) if prefix else []
        phrases = constraints.required_phrases(required, forced) if required else []
        source = [*ids[: self.max_source_length - 1], self.source.special.end] if ids else []
        shape = Shape(
            length_bucket(len(source), self.max_source_length),
            _power_of_two(len(forced), longest) if forced else 0,
            1 << (len(phrases) - 1).bit_length() if phrases else 0,
            _power_of_two(max(map(len, phrases)), longest) if phrases else 0,
        )
        max_length = constraints.max_length(len(source), len(forced) + sum(map(len, phrases)))
        truncated = len(ids) >= self.max_source_length or is_cut(sentence)
        sentence = sentence[:MAX_CHARACTERS]
        seed = _seed(constraints.decoding.seed, sentence)
        return Request(sentence, source, len(ids), truncated, forced, list(required), phrases, seed, max_length, shape)

    def read_all(
        self,
        sentences: Iterable[Any],
        prefixes: Iterable[Any] | None = None,
        required: Iterable[Any] | None = None,
    ) -> list[Request | NoTranslation]:
        """Returns the request for each sentence, or the reason why it has none. Sentences do not affect each other.

        Raises:
            ConfigError: settings that contradict each other, lists of the wrong length, or an item that is no text.
        """
        self.constraints.check_settings()
        sentences = as_texts("sentences", sentences)
        prefixes = _prefixes(len(sentences), prefixes)
        required = _required(len(sentences), required)
        found: list[Request | NoTranslation] = []
        for number, (sentence, ids) in enumerate(zip(sentences, encode_each(self.source, sentences), strict=True)):
            try:
                if isinstance(ids, InputError):
                    raise ids
                found.append(self._read(sentence, ids, prefixes[number], required[number]))
            except InputError as reason:
                # A traceback would keep the requests of all sentences in memory.
                found.append(NoTranslation(sentence, reason.with_traceback(None)))
        return found


def is_cut(text: str) -> bool:
    """Returns whether a text has so many characters that only its beginning is tokenised."""
    return len(text) > MAX_CHARACTERS


def encode_each(tokenizer: Tokenizer, lines: Sequence[str]) -> list[list[int] | InputError]:
    """Returns the ids of each line's first `MAX_CHARACTERS`, or the error of a line that cannot be tokenised."""
    try:
        return list(tokenizer.encode([line[:MAX_CHARACTERS] for line in lines]))
    except InputError as reason:
        if len(lines) == 1:
            return [reason]
        return [found for line in lines for found in encode_each(tokenizer, [line])]


def check_call(
    model: ModelConfig, decoding: DecodingConfig, num_hypotheses: int, attention: bool, required: bool
) -> None:
    """Checks that the settings of a call of `translate` contradict neither each other nor the model.

    Raises:
        ConfigError: a setting contradicts another one or the model, or has another type.
    """
    check_type("num_hypotheses", num_hypotheses, int)
    if required and decoding.method != "beam":
        raise ConfigError("required phrases and decoding.method: sampling contradict each other: use beam.")
    beams = num_beams(decoding, num_hypotheses)
    if beams > MOST_BEAMS:
        raise ConfigError(
            f"decoding.beam_size (of sampling: the number of samples) must be at most {MOST_BEAMS:,}, got {beams:,}."
        )
    if 0 < decoding.mbr_samples < num_hypotheses:
        raise ConfigError(
            f"num_hypotheses ({num_hypotheses}) and decoding.mbr_samples ({decoding.mbr_samples}) contradict each "
            "other: hypotheses are chosen among the samples, so draw at least as many."
        )
    if not 1 <= num_hypotheses <= beams:
        raise ConfigError(
            f"num_hypotheses ({num_hypotheses}) must lie between 1 and beam_size ({beams}): a search finds no "
            "more hypotheses than it has beams."
        )
    if (attention or decoding.coverage_penalty) and not model.has_attention:
        what = "attention" if attention else f"decoding.coverage_penalty ({decoding.coverage_penalty})"
        raise ConfigError(f"{what} needs a model with attention, and this one has none (model.attention: none).")


def num_beams(decoding: DecodingConfig, num_hypotheses: int) -> int:
    """Returns the number of hypotheses that a search keeps or draws for each sentence."""
    return decoding.beam_size if decoding.method == "beam" else decoding.mbr_samples or num_hypotheses


def num_awaited(decoding: DecodingConfig, num_hypotheses: int) -> int:
    """Returns the number of finished hypotheses that a search waits for.

    The rule "exact" proves that these are the best, so it waits for `num_hypotheses`. The other rules prove nothing.
    They wait for a whole beam, as other software does.
    """
    return num_hypotheses if decoding.stop == "exact" else num_beams(decoding, num_hypotheses)


def _prefixes(num_sentences: int, prefixes: Iterable[Any] | None) -> list[Prefix]:
    """Returns the prefix of each sentence: text, or a list of piece names. None is no prefix.

    Raises:
        ConfigError: not a list with one for each sentence, or an item that is neither text nor a list of texts.
    """
    return [
        prefix if isinstance(prefix, str) else as_texts(f"prefixes[{number}]", prefix)
        for number, prefix in enumerate(_one_each("prefixes", num_sentences, prefixes, ""))
    ]


def _required(num_sentences: int, required: Iterable[Any] | None) -> list[list[str]]:
    """Returns the required phrases of each sentence. None is no phrase.

    Raises:
        ConfigError: not a list with one for each sentence, or an item that is no list of texts.
    """
    each = _one_each("required", num_sentences, required, [])
    for number, texts in enumerate(each, start=1):
        if isinstance(texts, str):
            raise ConfigError(f"required phrases of sentence {number}: give a list, not one text ({shown(texts)}).")
    return [as_texts(f"required[{number}]", texts) for number, texts in enumerate(each)]


def _one_each(name: str, num_sentences: int, values: Any, nothing: Any) -> list[Any]:
    """Returns a value for each sentence, `nothing` in place of None. Raises a `ConfigError` for another number."""
    if values is None:
        return [nothing] * num_sentences
    found = None if isinstance(values, str | bytes) or not isinstance(values, Iterable) else list(values)
    if found is None or len(found) != num_sentences:
        raise ConfigError(f"{name} must be a list with one for each of the {num_sentences} sentences.")
    return [nothing if value is None else value for value in found]


def _seed(seed: int, sentence: str) -> int:
    """Returns the seed of a sentence, computed from its text. It depends on no other sentence."""
    return zlib.crc32(sentence.encode("utf-8", "surrogateescape"), seed) & 0x7FFFFFFF


def _power_of_two(number: int, most: int) -> int:
    """Returns `number` rounded up to one of 8, 16, 32, 64, ..., but at most `most`."""
    return min(max(1 << (number - 1).bit_length(), 8), most)
