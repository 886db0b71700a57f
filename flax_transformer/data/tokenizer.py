"""Subword tokenizers: SentencePiece models learnt from the training text, one for both languages or one for each."""

import hashlib
import io
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentencepiece

from flax_transformer.errors import ConfigError, InputError, RunFolderError, check_finite

PAD_ID, START_ID, END_ID, UNKNOWN_ID = 0, 1, 2, 3
NUM_SPECIAL = 4
# Where this piece stands a vocabulary ends: text may be cut into the pieces after it, but they are unknown to a model.
END_OF_VOCABULARY = "<end of vocabulary>"
# What stands before a text that is meant for a model of many languages, such as ">>deu<<".
LANGUAGE = re.compile(">>.*?<<", re.DOTALL)

SURROGATE = re.compile("[\ud800-\udfff]")

# A unigram model depends on the number of threads that trained it; a fixed number makes it reproducible.
TRAINING_THREADS = 1

# Lines that are cut at random by one generator after the other; of a longer text all such parts draw the same numbers,
# for other words.
LINES_IN_A_ROW = 2_048


@dataclass(frozen=True)
class TokenizerConfig:
    """How to learn the subwords.

    Attributes:
        algorithm: "unigram", "bpe", "word" (what stands between spaces; rare words are unknown) or "char".
        vocab_size: pieces to learn, the four special ones included; "word" and "char" learn fewer where the text
            has no more.
        joint: one vocabulary for both languages; needed by `model.share_embeddings: all`.
        character_coverage: share of the training text's characters that get a piece; the rest become unknown.
        normalization: of the text, before it is cut: "nmt_nfkc" (SentencePiece's default: Unicode NFKC with changes for
            translation) or "identity" (none, for text that has been tokenised already).
        training_pairs: sentence pairs to learn from at most, spread evenly over the training text (of a larger one more
            than half as many are taken), which must fit in memory; lines above 4,192
            bytes are not learnt from (SentencePiece's default).
    """

    algorithm: Literal["unigram", "bpe", "word", "char"] = "unigram"
    vocab_size: int = 8_000
    joint: bool = True
    character_coverage: float = 1.0
    normalization: Literal["nmt_nfkc", "identity"] = "nmt_nfkc"
    training_pairs: int = 500_000

    def __post_init__(self):
        if self.training_pairs < 1:
            raise ConfigError(f"tokenizer.training_pairs must be at least 1, got {self.training_pairs}.")
        if self.vocab_size <= NUM_SPECIAL:
            raise ConfigError(f"tokenizer.vocab_size must be above {NUM_SPECIAL}, got {self.vocab_size}.")
        if not 0.98 <= self.character_coverage <= 1.0:
            raise ConfigError(f"tokenizer.character_coverage must lie in [0.98, 1], got {self.character_coverage}.")


@dataclass(frozen=True)
class SubwordSamplingConfig:
    """Training text cut into subwords at random, so that a model meets many segmentations of a word.

    Attributes:
        alpha: 0 turns it off. For "bpe" the share of merges that are left out, below 1 (0.1 in the paper); for
            "unigram" the exponent on the probabilities that segmentations are drawn by (0.1 to 0.5 in the paper; the
            larger, the closer to the best one).
        variants: segmentations of the whole training text, each kept on disk; the epochs take turns through them. A
            run that is resumed where they are lost goes on with others, and says so.

    References:
        Kudo 2018, "Subword Regularization"; Provilkov, Emelianenko and Voita 2020, "BPE-Dropout".
    """

    alpha: float = 0.0
    variants: int = 10

    def __post_init__(self):
        check_finite("subword_sampling", self)
        if self.alpha < 0:
            raise ConfigError(f"subword_sampling.alpha must not be negative (0 turns it off), got {self.alpha}.")
        if self.variants < 1:
            raise ConfigError(f"subword_sampling.variants must be at least 1, got {self.variants}.")

    def check_algorithm(self, algorithm: str) -> None:
        """Raises a `ConfigError` unless text can be cut at random by a tokenizer's algorithm."""
        if self.alpha and algorithm not in ("unigram", "bpe"):
            raise ConfigError(
                f"subword_sampling.alpha ({self.alpha}) needs tokenizer.algorithm unigram or bpe: {algorithm!r} cuts a "
                "text in one way alone."
            )
        if algorithm == "bpe" and self.alpha >= 1:
            raise ConfigError(
                f"subword_sampling.alpha must be below 1 for bpe, whose merges it leaves out, got {self.alpha}."
            )


@dataclass(frozen=True)
class SubwordSample:
    """One random segmentation: in one process the same text and the same sample give the same ids.

    In another process they may not: SentencePiece salts its generator, from 0.2.2 on. So what was drawn is kept.

    Attributes:
        alpha: see `SubwordSamplingConfig`.
        seed: not negative.
    """

    alpha: float
    seed: int

    def at(self, *place: int) -> "SubwordSample":
        """Returns a sample with a seed of its own for a part of the text."""
        return SubwordSample(self.alpha, int(np.random.SeedSequence([self.seed, *place]).generate_state(1)[0]))


class Tokenizer:
    """Text to ids and back, over one SentencePiece model.

    Example:
        >>> tokenizer = Tokenizer.train(["a rose is a rose"] * 3, TokenizerConfig(vocab_size=12))
        >>> tokenizer.decode(tokenizer.encode(["a rose"])[0])
        'a rose'
    """

    def __init__(self, model: bytes):
        self.model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise RunFolderError(f"not a SentencePiece model, or a damaged one: {error}") from error
        self._num_pieces = self._processor.get_piece_size()
        end = self._processor.piece_to_id(END_OF_VOCABULARY)
        self._vocab_size = self._num_pieces if end == self._processor.unk_id() else end
        unused = [i for i in range(self._vocab_size) if self._processor.is_unused(i)]
        names = dict(zip(self.pieces(unused), unused, strict=True))
        self._languages = {name: i for name, i in names.items() if LANGUAGE.fullmatch(name)}

    @classmethod
    def train(cls, lines: Iterable[str], config: TokenizerConfig, name: str = "this text") -> "Tokenizer":
        """Returns a tokenizer learnt from `lines`.

        Args:
            lines: the text.
            config: how to learn.
            name: what messages call the text.

        Raises:
            InputError: the text holds fewer pieces than `vocab_size` asks for, or nothing at all.
        """
        buffer = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=buffer,
                model_type=config.algorithm,
                vocab_size=config.vocab_size,
                hard_vocab_limit=config.algorithm in ("unigram", "bpe"),
                character_coverage=config.character_coverage,
                normalization_rule_name=config.normalization,
                pad_id=PAD_ID,
                bos_id=START_ID,
                eos_id=END_ID,
                unk_id=UNKNOWN_ID,
                num_threads=TRAINING_THREADS,
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = str(error).split("] ")[-1].strip()
            raise InputError(
                f"SentencePiece cannot learn tokenizer.vocab_size = {config.vocab_size} pieces from {name}: "
                f"{reason} Give it more text, or a vocab_size between its number of distinct characters and the limit "
                "it names."
            ) from error
        return cls(buffer.getvalue())

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""
        return self._vocab_size

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the model file; equal fingerprints mean equal ids for equal text."""
        return hashlib.sha256(self.model).hexdigest()

    def encode(self, lines: Sequence[str], sample: SubwordSample | None = None) -> list[list[int]]:
        """Returns the ids of each line, without start and end token: the best segmentation, or a random one.

        Where the vocabulary has language tokens that no text is cut into, one that a line begins with is taken off
        before the line is cut; one that the vocabulary does not have is a single unknown token.

        Raises:
            InputError: text with halves of characters (surrogates), which no UTF-8 holds.
        """
        languages = [LANGUAGE.match(line) for line in lines] if self._languages else []
        if any(languages):
            lines = [line[found.end() :] if found else line for line, found in zip(lines, languages, strict=True)]
        try:
            encoded = (
                self._processor.encode(list(lines), out_type=int) if sample is None else self._drawn(lines, sample)
            )
        except TypeError as error:
            wrong = [line for line in lines if SURROGATE.search(line)]
            if not wrong:
                raise
            raise InputError(
                f"not valid Unicode: {ascii(wrong[0][:80])} holds bytes or halves of characters that no UTF-8 has. "
                "Give it in UTF-8, or without them."
            ) from error
        if self._vocab_size < self._num_pieces:
            encoded = [[i if i < self._vocab_size else UNKNOWN_ID for i in ids] for ids in encoded]
        for ids, found in zip(encoded, languages, strict=False):
            if found:
                ids.insert(0, self._languages.get(found[0], UNKNOWN_ID))
        return encoded

    def _drawn(self, lines: Sequence[str], sample: SubwordSample) -> list[list[int]]:
        """Returns a random segmentation of each line, whatever the number of cores that they are cut on."""

        def cut(start: int) -> list[list[int]]:
            part = list(lines[start : start + LINES_IN_A_ROW])
            how = {"enable_sampling": True, "nbest_size": -1, "alpha": sample.alpha, "num_threads": 1}
            return self._processor.encode(part, out_type=int, **how)

        sentencepiece.set_random_generator_seed(sample.seed)  # from which each call below begins a generator of its own
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # SentencePiece lets go of the interpreter
            return [ids for part in pool.map(cut, range(0, len(lines), LINES_IN_A_ROW)) for ids in part]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, one line; special ids other than unknown give nothing.

        A line end, which pieces of bytes can spell, is a space.
        """
        return self._processor.decode(list(ids)).replace("\n", " ")

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Returns the surface form of each id."""
        return [self._processor.id_to_piece(i) for i in ids]

    def id_of(self, piece: str) -> int | None:
        """Returns the id of the piece with a surface form, or None if text is not cut into such a piece."""
        number = PAD_ID if SURROGATE.search(piece) else self._processor.piece_to_id(piece)
        return number if NUM_SPECIAL <= number < self._vocab_size else None

    def encoded_spans(self, line: str) -> list[tuple[int, int]]:
        """Returns which bytes (of UTF-8) of a line each of its ids, as of `encode`, stands for: begin and end."""
        found = LANGUAGE.match(line) if self._languages else None
        language = found[0] if found else ""
        size = len(language.encode())
        spans = _spans(self._processor.encode(line.removeprefix(language), out_type="serialized_proto"))
        return [(0, size)] * bool(found) + [(begin + size, end + size) for begin, end in spans]

    def decoded_spans(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Returns which bytes (of UTF-8) of the text of ids, as of `decode`, each of them became: begin and end."""
        return _spans(self._processor.decode(list(ids), out_type="serialized_proto"))


def _spans(serialized: bytes) -> list[tuple[int, int]]:
    """Returns begin and end of each piece of what SentencePiece has done."""
    from sentencepiece import sentencepiece_pb2 as made_by_protobuf

    sentencepiece_pb2: Any = made_by_protobuf  # a checker sees nothing of what it holds
    text = sentencepiece_pb2.SentencePieceText.FromString(serialized)
    return [(piece.begin, piece.end) for piece in text.pieces]


class TokenizerPair:
    """The tokenizers of the source and the target language; the same object when they share a vocabulary."""

    def __init__(self, source: Tokenizer, target: Tokenizer):
        self.source = source
        self.target = target

    @property
    def joint(self) -> bool:
        """Whether both languages share one vocabulary."""
        return self.source is self.target

    @property
    def fingerprint(self) -> str:
        """Of both; see `Tokenizer.fingerprint`."""
        return f"{self.source.fingerprint}-{self.target.fingerprint}"

    @classmethod
    def train(
        cls, source: Sequence[str], target: Sequence[str], config: TokenizerConfig, name: str = "this text"
    ) -> "TokenizerPair":
        """Returns tokenizers learnt from the two sides of the training text; for the rest see `Tokenizer.train`."""
        if config.joint:
            both = Tokenizer.train([*source, *target], config, f"both sides of {name}")
            return cls(both, both)
        return cls(
            Tokenizer.train(source, config, f"the source side of {name}"),
            Tokenizer.train(target, config, f"the target side of {name}"),
        )

    def save(self, folder: Path) -> None:
        """Writes joint.model, or source.model and target.model, into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        named = {"joint": self.source} if self.joint else {"source": self.source, "target": self.target}
        for name, tokenizer in named.items():
            (folder / f"{name}.model").write_bytes(tokenizer.model)

    @classmethod
    def load(cls, folder: Path) -> "TokenizerPair":
        """Returns the tokenizers that `save` wrote.

        Raises:
            RunFolderError: a file is missing.
        """
        if (folder / "joint.model").is_file():
            both = Tokenizer((folder / "joint.model").read_bytes())
            return cls(both, both)
        for name in ("source", "target"):
            if not (folder / f"{name}.model").is_file():
                raise RunFolderError(
                    f"{folder} holds no tokenizer: expected joint.model, or source.model and target.model. "
                    "Was the run interrupted before it began to train? Start it again in a new folder."
                )
        return cls(Tokenizer((folder / "source.model").read_bytes()), Tokenizer((folder / "target.model").read_bytes()))


@dataclass(frozen=True)
class TokenizedText:
    """Sentences as one flat array of ids, each sentence closed by the end token.

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
        """Returns the ids of `lines`; `sample` as for `Tokenizer.encode`."""
        sentences = tokenizer.encode(lines, sample)
        lengths = np.fromiter((len(s) + 1 for s in sentences), np.int64, len(sentences))
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        ids = np.full(int(offsets[-1]), END_ID, np.int32)
        for start, sentence in zip(offsets[:-1], sentences, strict=True):
            ids[start : start + len(sentence)] = sentence
        return cls(ids, offsets)

    @property
    def lengths(self) -> np.ndarray:
        """[number of sentences], end token included."""
        return np.diff(self.offsets)
