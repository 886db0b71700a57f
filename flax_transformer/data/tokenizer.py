"""The interface of a tokenizer, and tokenized text.

`sentencepiece_tokenizer.py` implements the interface. `tokenizer_pair.py` lists all kinds of tokenizer.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

import numpy as np

from flax_transformer.errors import ConfigError, check_fields, shown


@dataclass(frozen=True)
class SpecialIds:
    """The ids of a tokenizer that stand for no text.

    Attributes:
        start: first input of a decoder. It may equal another id here, as in models that start with padding.
        end: id that closes a sentence.
        pad: id of padding, or None. Batches do not need it, since padding is segment 0. No output may contain it.
        unknown: id of text outside the vocabulary; None for a tokenizer that encodes any text.
    """

    start: int
    end: int
    pad: int | None = None
    unknown: int | None = None

    def __post_init__(self):
        if any(i is not None and i < 0 for i in dataclasses.astuple(self)):
            raise ValueError(f"special ids must not be negative (None stands for one that is not there), got {self}.")
        if self.end == self.unknown:
            raise ValueError(
                f"the unknown token may be suppressed in outputs, so it cannot be the end token; got {self}. Give None "
                "if the tokenizer has no unknown token."
            )

    @property
    def ids(self) -> frozenset[int]:
        """All special ids."""
        return frozenset(i for i in dataclasses.astuple(self) if i is not None)

    @property
    def never_in_outputs(self) -> frozenset[int]:
        """Padding and start, without those that are also the end token or the unknown token.

        No sentence of a training text contains them.
        """
        return self.ids - {self.end, self.unknown}


@dataclass(frozen=True)
class TokenizerConfig:
    """Settings of a tokenizer that is learnt from the training text.

    Attributes:
        algorithm: kind of pieces: "unigram" or "bpe" for subwords, "word" for what stands between spaces, or "char".
            With "word" rare words become unknown tokens.
        vocab_size: number of pieces, with the four special ones. "word" and "char" learn fewer pieces if the text has
            fewer words or characters.
        joint: whether both languages share one vocabulary. `model.share_embeddings: all` needs a shared one.
        character_coverage: share of the characters of the training text that get a piece, from 0.98 to 1. Other
            characters become unknown tokens.
        normalization: normalisation of the text before it is cut. "nmt_nfkc" is SentencePiece's default, a variant of
            Unicode NFKC. For instance, it makes the zero-width non-joiner of Persian a space. A training says how many
            lines it changes. "identity" changes nothing, for such text and for text that is tokenised already.
        max_training_pairs: maximum number of sentence pairs to learn from, spread evenly over the training text. They
            must fit in memory. SentencePiece leaves out very long lines.

    Raises:
        ConfigError: a value is out of range, or fields contradict each other.

    Example:
        >>> TokenizerConfig(algorithm="bpe", vocab_size=4_000).joint
        True
    """

    algorithm: Literal["unigram", "bpe", "word", "char"] = "unigram"
    vocab_size: int = 8_000
    joint: bool = True
    character_coverage: float = 1.0
    normalization: Literal["nmt_nfkc", "identity"] = "nmt_nfkc"
    max_training_pairs: int = 500_000

    def __post_init__(self):
        check_fields("tokenizer", self)
        if self.max_training_pairs < 1:
            raise ConfigError(f"tokenizer.max_training_pairs must be at least 1, got {self.max_training_pairs}.")
        num_special = len(dataclasses.fields(SpecialIds))
        if self.vocab_size <= num_special:
            raise ConfigError(f"tokenizer.vocab_size must be above {num_special}, got {self.vocab_size}.")
        if not 0.98 <= self.character_coverage <= 1.0:
            raise ConfigError(f"tokenizer.character_coverage must lie in [0.98, 1], got {self.character_coverage}.")


@dataclass(frozen=True)
class SubwordSamplingConfig:
    """Settings of subword regularisation, which cuts the training text into subwords at random.

    Attributes:
        alpha: amount of randomness; 0 turns it off. For "bpe" it is the share of merges that are left out, below 1; the
            paper uses 0.1. For "unigram" it is the exponent of the probabilities of segmentations; the paper uses 0.1
            to 0.5, and a larger exponent stays closer to the best segmentation.
        variants: number of segmentations of the training text. The cache on disk keeps them, and the epochs take turns.
            If they are lost, a resumed run draws new ones and says so.

    References:
        Kudo 2018, "Subword Regularization"; Provilkov, Emelianenko and Voita 2020, "BPE-Dropout".
    """

    alpha: float = 0.0
    variants: int = 10

    def __post_init__(self):
        check_fields("subword_sampling", self)
        if self.alpha < 0:
            raise ConfigError(f"subword_sampling.alpha must not be negative (0 turns it off), got {self.alpha}.")
        if self.variants < 1:
            raise ConfigError(f"subword_sampling.variants must be at least 1, got {self.variants}.")

    def check_algorithm(self, algorithm: str) -> None:
        """Raises a `ConfigError` unless a tokenizer's algorithm can cut text at random in this way."""
        if self.alpha and algorithm not in ("unigram", "bpe"):
            raise ConfigError(
                f"subword_sampling.alpha ({self.alpha}) needs tokenizer.algorithm unigram or bpe: {shown(algorithm)} "
                "cuts a text in one way alone."
            )
        if algorithm == "bpe" and self.alpha >= 1:
            raise ConfigError(
                f"subword_sampling.alpha must be below 1 for bpe, whose merges it leaves out, got {self.alpha}."
            )


@dataclass(frozen=True)
class SubwordSample:
    """One random segmentation. In one process the same text and the same sample give the same ids.

    Another process may give other ids, so a random segmentation is kept on disk (docs/lab_book.md, "SentencePiece draws
    differently in each process").

    Attributes:
        alpha: see `SubwordSamplingConfig`.
        seed: at least 0.
        num_lines: number of lines that one generator cuts. The generators of a text draw the same numbers, for
            different words.
    """

    alpha: float
    seed: int
    num_lines: int = 2_048

    def at(self, *place: int) -> "SubwordSample":
        """Returns a sample for a part of the text, with a seed of its own."""
        seed = int(np.random.SeedSequence([self.seed, *place]).generate_state(1)[0])
        return dataclasses.replace(self, seed=seed)


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back. Ids are 0 to `vocab_size` - 1; `special` holds those that stand for no text.

    Attributes:
        suffix: end of the name of a tokenizer's file. It identifies the kind of tokenizer (see `tokenizer_pair.KINDS`).
    """

    suffix: ClassVar[str]

    @property
    def special(self) -> SpecialIds:
        """The ids that stand for no text."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ids included."""
        ...

    @property
    def model(self) -> bytes:
        """The contents of the tokenizer's file."""
        ...

    @property
    def fingerprint(self) -> str:
        """A hash of `model`; equal fingerprints mean equal ids for equal text."""
        ...

    def encode(self, lines: Sequence[str], sample: SubwordSample | None = None) -> list[list[int]]:
        """Returns the ids of each line, without start and end token: the best segmentation, or a random one.

        Raises:
            InputError: text that is not valid Unicode.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, in one line without a line end. Special ids other than unknown add no text."""
        ...

    def normalized(self, lines: Sequence[str]) -> list[str]:
        """Returns the text of each line that is cut into pieces. Spaces may differ from those of the line."""
        ...

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Returns the surface form of each id."""
        ...

    def id_of(self, piece: str) -> int | None:
        """Returns the id of a piece by its surface form, or None if it does not exist or is special."""
        ...

    def encoded_spans(self, line: str) -> list[tuple[int, int]]:
        """Returns begin and end, in bytes of UTF-8, of the part of `line` that each id of `encode` stands for."""
        ...

    def decoded_spans(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Returns begin and end, in bytes of UTF-8, of the part of the decoded text that each id becomes."""
        ...


@runtime_checkable
class LearntKind(Protocol):
    """The class of a `Tokenizer` that is learnt from text. It also answers questions before there is any text."""

    @property
    def suffix(self) -> str:
        """See `Tokenizer`."""
        ...

    @property
    def version(self) -> str:
        """The version of what learns. Another version may learn another tokenizer from the same text."""
        ...

    def __call__(self, model: bytes) -> Tokenizer:
        """Returns the tokenizer of a file with these contents.

        Raises:
            RunFolderError: they are no tokenizer of this kind.
        """
        ...

    def train(self, lines: Iterable[str], config: TokenizerConfig, name: str = "this text") -> Tokenizer:
        """Returns a tokenizer learnt from `lines`.

        Args:
            lines: the text.
            config: settings of the tokenizer.
            name: name of the text in messages.

        Raises:
            InputError: the text is too short for `config`.
        """
        ...

    def special_ids(self, config: TokenizerConfig) -> SpecialIds:
        """Returns the special ids of any tokenizer that `train` returns for `config`."""
        ...


@dataclass(frozen=True)
class TokenizedText:
    """Sentences as one flat array of ids. The end token closes each sentence.

    Attributes:
        ids: [sum of lengths] int32.
        offsets: [number of sentences + 1] int64; sentence i is ids[offsets[i]:offsets[i + 1]].
    """

    ids: np.ndarray
    offsets: np.ndarray

    @classmethod
    def from_lines(
        cls, lines: Sequence[str], tokenizer: Tokenizer, sample: SubwordSample | None = None
    ) -> "TokenizedText":
        """Returns the ids of `lines`; see `Tokenizer.encode` for `sample`."""
        sentences = tokenizer.encode(lines, sample)
        lengths = np.fromiter((len(s) + 1 for s in sentences), np.int64, len(sentences))
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        ids = np.full(int(offsets[-1]), tokenizer.special.end, np.int32)
        for start, sentence in zip(offsets[:-1], sentences, strict=True):
            ids[start : start + len(sentence)] = sentence
        return cls(ids, offsets)

    @property
    def lengths(self) -> np.ndarray:
        """[number of sentences], end tokens included."""
        return np.diff(self.offsets)
