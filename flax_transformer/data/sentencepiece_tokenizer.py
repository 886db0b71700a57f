"""A tokenizer over one SentencePiece model, which is learnt from training text or read from a MarianMT folder."""

import functools
import hashlib
import io
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import sentencepiece

from flax_transformer.data.tokenizer import SpecialIds, SubwordSample, TokenizerConfig
from flax_transformer.errors import InputError, RunFolderError

# Special ids of the models that this project learns. Other models may have others.
SPECIAL = SpecialIds(start=1, end=2, pad=0, unknown=3)
# SentencePiece's mark for the space before a word.
WORD_START = "\u2581"
# This piece ends the vocabulary. SentencePiece may also cut text into the pieces after it; they become the unknown
# token.
END_OF_VOCABULARY = "<end of vocabulary>"
# A language token, such as ">>deu<<". A text for a model of many languages starts with one.
LANGUAGE = re.compile(">>.*?<<", re.DOTALL)

SURROGATE = re.compile("[\ud800-\udfff]")

# SentencePiece does not learn from longer lines. This is its default, and is not set, since a model stores what is set.
MAX_LEARNT_BYTES = 4_192

# A unigram model depends on the number of training threads. A fixed number makes it reproducible.
TRAINING_THREADS = 1


class SentencePieceTokenizer:
    """Text to ids and back, over one SentencePiece model.

    Raises:
        RunFolderError: the bytes are no SentencePiece model, or a damaged one.

    Example:
        >>> tokenizer = SentencePieceTokenizer.train(["a rose is a rose"] * 3, TokenizerConfig(vocab_size=12))
        >>> tokenizer.decode(tokenizer.encode(["a rose"])[0])
        'a rose'
    """

    suffix: ClassVar[str] = "model"
    version: ClassVar[str] = sentencepiece.__version__

    def __init__(self, model: bytes):
        self.model = model
        try:
            if not model:  # SentencePiece would accept it
                raise RuntimeError("it is empty")
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.pieces(range(self._processor.get_piece_size()))  # a damaged one may be no UTF-8
        except (RuntimeError, UnicodeDecodeError) as error:
            raise RunFolderError(f"not a SentencePiece model, or a damaged one: {error}") from error
        self._num_pieces = self._processor.get_piece_size()
        end = self._processor.piece_to_id(END_OF_VOCABULARY)
        self._vocab_size = self._num_pieces if end == self._processor.unk_id() else end
        unused = [i for i in range(self._vocab_size) if self._processor.is_unused(i)]
        names = dict(zip(self.pieces(unused), unused, strict=True))
        self._languages = {name: i for name, i in names.items() if LANGUAGE.fullmatch(name)}

    @classmethod
    def train(cls, lines: Iterable[str], config: TokenizerConfig, name: str = "this text") -> "SentencePieceTokenizer":
        """Returns a tokenizer learnt from `lines`.

        Args:
            lines: the text.
            config: settings of the tokenizer.
            name: name of the text in messages.

        Raises:
            InputError: no line is left to learn from, or the text has fewer pieces than `vocab_size`.
        """
        buffer = io.BytesIO()
        lines = list(lines)
        if not any(0 < len(line.encode(errors="replace")) <= MAX_LEARNT_BYTES for line in lines):
            raise InputError(
                f"SentencePiece cannot learn from {name}: of its {len(lines):,} lines, each is empty or longer than "
                f"{MAX_LEARNT_BYTES:,} bytes, and such lines are left out. Give text with one sentence a line."
            )
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=buffer,
                model_type=config.algorithm,
                vocab_size=config.vocab_size,
                hard_vocab_limit=config.algorithm in ("unigram", "bpe"),
                character_coverage=config.character_coverage,
                normalization_rule_name=config.normalization,
                pad_id=SPECIAL.pad,
                bos_id=SPECIAL.start,
                eos_id=SPECIAL.end,
                unk_id=SPECIAL.unknown,
                num_threads=TRAINING_THREADS,
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = str(error).split("] ")[-1].strip() or "no character is left after normalisation."
            raise InputError(
                f"SentencePiece cannot learn tokenizer.vocab_size = {config.vocab_size} pieces from {name}: "
                f"{reason} Give more text, or a vocab_size between the number of distinct characters and the limit "
                "that SentencePiece names."
            ) from error
        return cls(buffer.getvalue())

    @classmethod
    def special_ids(cls, config: TokenizerConfig) -> SpecialIds:
        """Returns the special ids of any tokenizer that `train` returns for `config`."""
        return SPECIAL

    @functools.cached_property
    def special(self) -> SpecialIds:
        """The ids that stand for no text, as the model defines them.

        Raises:
            RunFolderError: the model has no start token or no end token.
        """
        start, end, pad = self._processor.bos_id(), self._processor.eos_id(), self._processor.pad_id()
        if start < 0 or end < 0:
            raise RunFolderError(
                "this SentencePiece model has no start token (bos) or no end token (eos), and a decoder needs both. "
                "Train it with a bos_id and an eos_id that are not negative."
            )
        return SpecialIds(start, end, pad if pad >= 0 else None, self._processor.unk_id())

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ids included."""
        return self._vocab_size

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the model file; equal fingerprints mean equal ids for equal text."""
        return hashlib.sha256(self.model).hexdigest()

    def encode(self, lines: Sequence[str], sample: SubwordSample | None = None) -> list[list[int]]:
        """Returns the ids of each line, without start and end token: the best segmentation, or a random one.

        Some vocabularies have language tokens, which SentencePiece itself never produces. Such a token at the start of
        a line becomes one id, and the rest of the line is cut. A language token outside the vocabulary becomes the
        unknown token.

        Raises:
            InputError: a line contains lone surrogates, which UTF-8 cannot encode.
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
                f"not valid Unicode: {ascii(wrong[0][:80])} holds bytes or lone surrogates, which UTF-8 cannot "
                "encode. Convert the text to UTF-8, or remove them."
            ) from error
        unknown = self._processor.unk_id()
        if self._vocab_size < self._num_pieces:
            encoded = [[i if i < self._vocab_size else unknown for i in ids] for ids in encoded]
        for ids, found in zip(encoded, languages, strict=False):
            if found:
                ids.insert(0, self._languages.get(found[0], unknown))
        return encoded

    def _drawn(self, lines: Sequence[str], sample: SubwordSample) -> list[list[int]]:
        """Returns a random segmentation of each line. It does not depend on the number of CPU cores."""

        def cut(start: int) -> list[list[int]]:
            part = list(lines[start : start + sample.num_lines])
            how = {"enable_sampling": True, "nbest_size": -1, "alpha": sample.alpha, "num_threads": 1}
            return self._processor.encode(part, out_type=int, **how)

        sentencepiece.set_random_generator_seed(sample.seed)  # each call below starts a generator from it
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # SentencePiece releases Python's lock
            return [ids for part in pool.map(cut, range(0, len(lines), sample.num_lines)) for ids in part]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, in one line. Special ids other than unknown add no text.

        Byte pieces can spell a line end, which becomes a space.
        """
        return self._processor.decode(list(ids)).replace("\n", " ")

    def normalized(self, lines: Sequence[str]) -> list[str]:
        """Returns the text of each line that is cut into pieces. Spaces may differ from those of the line."""
        return [line.replace(WORD_START, " ") for line in self._processor.normalize(list(lines))]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Returns the surface form of each id."""
        return self._processor.id_to_piece(list(ids))

    def id_of(self, piece: str) -> int | None:
        """Returns the id of a piece by its surface form, or None if it does not exist or is special."""
        if SURROGATE.search(piece):
            return None
        number = self._processor.piece_to_id(piece)
        return number if number < self._vocab_size and number not in self.special.ids else None

    def encoded_spans(self, line: str) -> list[tuple[int, int]]:
        """Returns begin and end, in bytes of UTF-8, of the part of `line` that each id of `encode` stands for."""
        found = LANGUAGE.match(line) if self._languages else None
        language = found[0] if found else ""
        size = len(language.encode())
        spans = _spans(self._processor.encode(line.removeprefix(language), out_type="serialized_proto"))
        return [(0, size)] * bool(found) + [(begin + size, end + size) for begin, end in spans]

    def decoded_spans(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Returns begin and end, in bytes of UTF-8, of the part of the decoded text that each id becomes."""
        return _spans(self._processor.decode(list(ids), out_type="serialized_proto"))


def _spans(serialized: bytes) -> list[tuple[int, int]]:
    """Returns begin and end of each piece in a serialised result of SentencePiece."""
    from sentencepiece import sentencepiece_pb2 as made_by_protobuf

    sentencepiece_pb2: Any = made_by_protobuf  # type checkers do not know its members
    text = sentencepiece_pb2.SentencePieceText.FromString(serialized)
    return [(piece.begin, piece.end) for piece in text.pieces]
