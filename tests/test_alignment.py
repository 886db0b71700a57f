"""Word alignments: the words that pieces belong to, for every kind of tokenizer, beside what the vocabulary lacks."""

from typing import Any

import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2 as made_by_protobuf

from flax_transformer.data.sentencepiece_tokenizer import SPECIAL, SentencePieceTokenizer
from flax_transformer.data.tokenizer import TokenizerConfig
from flax_transformer.inference.alignment import word_alignment, word_numbers

UNKNOWN: Any = SPECIAL.unknown
TEXT = ["a rose is a rose", "the rose is red", "a red sea"] * 5
TOKENIZERS = {
    "word": SentencePieceTokenizer.train(TEXT, TokenizerConfig("word", 9)),  # a, rose, is, red and the
    "unigram": SentencePieceTokenizer.train(TEXT, TokenizerConfig("unigram", 17)),
    "bpe": SentencePieceTokenizer.train(TEXT, TokenizerConfig("bpe", 22)),
    "char": SentencePieceTokenizer.train(TEXT, TokenizerConfig("char", 20)),
    "few characters": SentencePieceTokenizer.train(TEXT, TokenizerConfig("char", 9)),
}
# Known and unknown words, beside each other and in one word, and characters that normalisation makes spaces, no
# characters or several words of.
LINES = [
    "a xyz rose",
    "xyz a",
    "a xyz XYZ rose red XYZ",
    "aQ Qa rose",
    "  a   rose ",
    "a\u00b4rose a",
    "a\u00a0rose",
    "\u200b a \u200b rose",
    "\U0001f600a \u4e2d\u6587 rose",
    "\ufb01 rose",
    "a\u2581rose",
    "a \ufdfa rose",
    "a\trose red",
    "\u2047 a",
]


def words_of(text: str) -> list[str]:
    return [word for word in text.split(" ") if word]


def identity(size: int) -> np.ndarray:
    return np.eye(size + 1)


def test_words_by_hand():
    assert word_numbers("a rose", [(0, 1), (1, 4), (4, 6)]) == [[0], [1], [1]]
    assert word_numbers("a rose", [(0, 0), (0, 1), (1, 2), (2, 6), (6, 6)]) == [[0], [0], [1], [1], []]  # spaces alone
    assert word_numbers("a \u00e4\u00f6  b ", [(0, 9), (9, 10)]) == [[0, 1, 2], []]  # in bytes
    assert word_numbers("  ", [(0, 1), (1, 2)]) == [[], []]
    weights = np.array([[0.1, 0.2, 0.7, 0.0], [0.8, 0.1, 0.1, 0.0], [0.0, 0.0, 0.1, 0.9]])
    assert word_alignment([[0], [1], [1]], [[0], [1]], weights) == "1-0 0-1"
    assert word_alignment([[0], [1], [2, 3]], [[0], [1]], weights) == "2-0 3-0 0-1"
    assert word_alignment([[0], [1], []], [[0], [1]], weights) == "0-1"
    assert word_alignment([], [[0]], weights) == word_alignment([[0]], [], weights) == ""


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pieces_of_a_line_belong_to_its_words(kind):
    tokenizer = TOKENIZERS[kind]
    for line in LINES:
        numbers = word_numbers(line, tokenizer.encoded_spans(line))
        (ids,) = tokenizer.encode([line])
        assert len(numbers) == len(ids)
        assert all(0 <= number < len(words_of(line)) for of in numbers for number in of), line
        assert sum(numbers, []) == sorted(sum(numbers, []))
    # Known words keep their number beside unknown ones, however many of these SentencePiece has put into one piece.
    line = "a xyz XYZ rose qq red"
    pieces = tokenizer.pieces(tokenizer.encode([line])[0])
    numbers = word_numbers(line, tokenizer.encoded_spans(line))
    assert {number for of in numbers for number in of} == set(range(6))
    known = {0: "a", 3: "rose", 5: "red"} if kind != "few characters" else {0: "a", 3: "r<unk>se", 5: "re<unk>"}
    for number, word in known.items():
        of_word = [piece for piece, of in zip(pieces, numbers, strict=True) if number in of]
        assert "".join(of_word).removeprefix("\u2581") == word


def test_a_word_tokenizer_counts_unknown_words():
    tokenizer = TOKENIZERS["word"]
    assert tokenizer.pieces(tokenizer.encode(["a xyz rose"])[0]) == ["\u2581a", "<unk>", "\u2581rose"]
    assert word_numbers("a xyz rose", tokenizer.encoded_spans("a xyz rose")) == [[0], [1], [2]]
    assert word_numbers("a xyz XYZ rose", tokenizer.encoded_spans("a xyz XYZ rose")) == [[0], [1, 2], [3]]
    a, rose = tokenizer.encode(["a rose"])[0]
    ids = [UNKNOWN, a, UNKNOWN, UNKNOWN, rose]
    source = word_numbers("xyz a xyz rose", tokenizer.encoded_spans("xyz a xyz rose"))
    target = word_numbers(tokenizer.decode(ids), tokenizer.decoded_spans(ids))
    assert words_of(tokenizer.decode(ids)) == ["\u2047", "a", "\u2047", "\u2047", "rose"]
    assert target == [[0], [1], [2], [3], [4]]
    weights = identity(4)[[0, 1, 2, 2, 3, 4]]
    assert word_alignment(source, target, weights) == "0-0 1-1 2-2 2-3 3-4"


def test_a_language_token_stands_where_the_line_has_it():
    proto: Any = made_by_protobuf
    model = proto.ModelProto.FromString(TOKENIZERS["bpe"].model)
    model.pieces.add(piece=">>deu<<", score=0.0, type=proto.ModelProto.SentencePiece.Type.UNUSED)
    tokenizer = SentencePieceTokenizer(model.SerializeToString())
    for line, expected in ((">>deu<< a rose", [0, 1, 2]), (">>fra<< \u4e2d", [0, 1, 1]), ("a rose", [0, 1])):
        (ids,), numbers = tokenizer.encode([line]), word_numbers(line, tokenizer.encoded_spans(line))
        assert numbers == [[number] for number in expected] and len(ids) == len(numbers)
    assert word_numbers(">>deu<<a rose", tokenizer.encoded_spans(">>deu<<a rose")) == [[0], [0], [1]]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pieces_of_an_output_belong_to_the_words_of_its_text(kind):
    tokenizer, rng = TOKENIZERS[kind], np.random.default_rng(0)
    for _ in range(300):
        ids = rng.integers(0, tokenizer.vocab_size, int(rng.integers(1, 9)))
        ids = np.where(rng.random(ids.shape) < 0.3, UNKNOWN, ids).tolist()
        text = tokenizer.decode(ids)
        numbers, words = word_numbers(text, tokenizer.decoded_spans(ids)), words_of(text)
        assert len(numbers) == len(ids)
        assert {number for of in numbers for number in of} == set(range(len(words)))
        for piece, of in zip(tokenizer.pieces(ids), numbers, strict=True):
            if piece == "<unk>":
                assert len(of) == 1 and "\u2047" in words[of[0]]
            elif tokenizer.id_of(piece) is not None and (letters := piece.strip("\u2581")):
                assert len(of) == 1 and letters in words[of[0]]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_an_alignment_of_a_line_to_itself(kind):
    """Each word of the output is aligned to the word that it stands for, unknown or not."""
    tokenizer = TOKENIZERS[kind]
    line = "a xyz rose red"
    (ids,) = tokenizer.encode([line])
    source = word_numbers(line, tokenizer.encoded_spans(line))
    target = word_numbers(tokenizer.decode(ids), tokenizer.decoded_spans(ids))
    pairs = [tuple(map(int, pair.split("-"))) for pair in word_alignment(source, target, identity(len(ids))).split()]
    if kind == "few characters":  # "o" and "d" are unknown, and so words of their own in the output: "r ? se re ?"
        assert pairs == [(0, 0), (1, 1), (2, 2), (2, 3), (2, 4), (3, 5), (3, 6)]
    else:
        assert pairs == [(0, 0), (1, 1), (2, 2), (3, 3)]
