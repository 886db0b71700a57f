"""A tokenizer over one SentencePiece model, learnt from the training text or brought along by another's model."""

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

# What is learnt depends on the version.
VERSION = sentencepiece.__version__
# The special ids of a model that is learnt here. What was learnt elsewhere may have others.
SPECIAL = SpecialIds(start=1, end=2, pad=0, unknown=3)
# What SentencePiece puts in place of the space before a word.
WORD_START = "\u2581"
# Where this piece stands a vocabulary ends: text may be cut into the pieces after it, but they are unknown to a model.
END_OF_VOCABULARY = "<end of vocabulary>"
# What stands before a text that is meant for a model of many languages, such as ">>deu<<".
LANGUAGE = re.compile(">>.*?<<", re.DOTALL)

SURROGATE = re.compile("[\ud800-\udfff]")

# A unigram model depends on the number of threads that trained it; a fixed number makes it reproducible.
TRAINING_THREADS = 1


class SentencePieceTokenizer:
    """Text to ids and back, over one SentencePiece model.

    Example:
        >>> tokenizer = SentencePieceTokenizer.train(["a rose is a rose"] * 3, TokenizerConfig(vocab_size=12))
        >>> tokenizer.decode(tokenizer.encode(["a rose"])[0])
        'a rose'
    """

    suffix: ClassVar[str] = "model"

    def __init__(self, model: bytes):
        self.model = model
        try:
            if not model:  # which SentencePiece takes for none
                raise RuntimeError("it is empty")
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
    def train(cls, lines: Iterable[str], config: TokenizerConfig, name: str = "this text") -> "SentencePieceTokenizer":
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
                pad_id=SPECIAL.pad,
                bos_id=SPECIAL.start,
                eos_id=SPECIAL.end,
                unk_id=SPECIAL.unknown,
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

    @functools.cached_property
    def special(self) -> SpecialIds:
        """The ids that stand for no text, as the model names them.

        Raises:
            RunFolderError: a model without a start or an end token.
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
        unknown = self._processor.unk_id()
        if self._vocab_size < self._num_pieces:
            encoded = [[i if i < self._vocab_size else unknown for i in ids] for ids in encoded]
        for ids, found in zip(encoded, languages, strict=False):
            if found:
                ids.insert(0, self._languages.get(found[0], unknown))
        return encoded

    def _drawn(self, lines: Sequence[str], sample: SubwordSample) -> list[list[int]]:
        """Returns a random segmentation of each line, whatever the number of cores that they are cut on."""

        def cut(start: int) -> list[list[int]]:
            part = list(lines[start : start + sample.num_lines])
            how = {"enable_sampling": True, "nbest_size": -1, "alpha": sample.alpha, "num_threads": 1}
            return self._processor.encode(part, out_type=int, **how)

        sentencepiece.set_random_generator_seed(sample.seed)  # from which each call below begins a generator of its own
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # SentencePiece lets go of the interpreter
            return [ids for part in pool.map(cut, range(0, len(lines), sample.num_lines)) for ids in part]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, one line; special ids other than unknown give nothing.

        A line end, which pieces of bytes can spell, is a space.
        """
        return self._processor.decode(list(ids)).replace("\n", " ")

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Returns the surface form of each id."""
        return [self._processor.id_to_piece(i) for i in ids]

    def id_of(self, piece: str) -> int | None:
        """Returns the id of the piece with a surface form, or None if there is none or it is special."""
        if SURROGATE.search(piece):
            return None
        number = self._processor.piece_to_id(piece)
        return number if number < self._vocab_size and number not in self.special.ids else None

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
