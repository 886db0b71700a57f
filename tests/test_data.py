"""Corpus and tokenizer."""

import gzip
import io
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from flax_transformer.data.parallel_text import (
    ParallelText,
    ParallelTextConfig,
    read_corpus,
    read_parallel_text,
)
from flax_transformer.data.sentencepiece_tokenizer import SPECIAL, SentencePieceTokenizer
from flax_transformer.data.synthetic import (
    NumberWordsConfig,
    english_number_words,
    german_number_words,
    number_words_corpus,
)
from flax_transformer.data.text_files import iterate_lines
from flax_transformer.data.tokenizer import TokenizedText, TokenizerConfig
from flax_transformer.data.tokenizer_pair import TokenizerPair
from flax_transformer.errors import ConfigError, InputError, RunFolderError

# --- number words


@pytest.mark.parametrize(
    "number, english, german",
    [
        (0, "zero", "null"),
        (1, "one", "eins"),
        (16, "sixteen", "sechzehn"),
        (17, "seventeen", "siebzehn"),
        (21, "twenty-one", "einundzwanzig"),
        (30, "thirty", "dreißig"),
        (60, "sixty", "sechzig"),
        (70, "seventy", "siebzig"),
        (100, "one hundred", "einhundert"),
        (101, "one hundred one", "einhunderteins"),
        (111, "one hundred eleven", "einhundertelf"),
        (999, "nine hundred ninety-nine", "neunhundertneunundneunzig"),
        (1000, "one thousand", "eintausend"),
        (1001, "one thousand one", "eintausendeins"),
        (21_000, "twenty-one thousand", "einundzwanzigtausend"),
        (101_000, "one hundred one thousand", "einhunderteintausend"),
        (234_561, "two hundred thirty-four thousand five hundred sixty-one",
         "zweihundertvierunddreißigtausendfünfhunderteinundsechzig"),
        (999_999, "nine hundred ninety-nine thousand nine hundred ninety-nine",
         "neunhundertneunundneunzigtausendneunhundertneunundneunzig"),
    ],
)  # fmt: skip
def test_number_words(number, english, german):
    assert english_number_words(number) == english
    assert german_number_words(number) == german


def test_number_words_are_a_bijection_on_a_sample():
    numbers = np.random.default_rng(0).choice(1_000_000, 3_000, replace=False)
    assert len({english_number_words(int(n)) for n in numbers}) == 3_000
    assert len({german_number_words(int(n)) for n in numbers}) == 3_000


def test_parts_have_no_number_in_common_and_short_numbers_occur():
    config = NumberWordsConfig(num_train=1_000, num_validation=60, num_test=400)
    corpus = number_words_corpus(config)
    (train,) = corpus.train
    assert isinstance(train, ParallelText)
    texts = (train, corpus.validation, corpus.test)
    parts = [set(part.source) for part in texts]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert [len(p.source) for p in texts] == [1_000, 60, 400]
    assert len(parts[1]) == 60 and len(parts[2]) == 400  # distinct
    assert "zero" in parts[0]
    for part in texts:
        assert sum("thousand" not in source for source in part.source) >= 0.04 * len(part.source)
    again = number_words_corpus(config)
    assert again == corpus
    assert number_words_corpus(NumberWordsConfig(1_000, 60, 400, seed=1)) != corpus


# --- files


def test_plain_and_compressed_text_read_alike(tmp_path):
    text = "a b\nzweite Zeile\u2028noch dieselbe\r\n\nlast"
    (tmp_path / "plain").write_bytes(text.encode())
    (tmp_path / "packed.gz").write_bytes(gzip.compress(text.encode()))
    expected = ["a b", "zweite Zeile\u2028noch dieselbe", "", "last"]
    assert list(iterate_lines(tmp_path / "plain")) == expected
    assert list(iterate_lines(tmp_path / "packed.gz")) == expected


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    """Windows programs write one; within a text it is a character like others."""
    mark = "\ufeff"
    (tmp_path / "plain").write_text(f"{mark}eins\n{mark}zwei\n", encoding="utf-8")
    (tmp_path / "packed.gz").write_bytes(gzip.compress(f"{mark}eins\n{mark}zwei\n".encode()))
    (tmp_path / "pairs.jsonl").write_text(f'{mark}{{"source": "eins", "target": "one"}}\n', encoding="utf-8")
    for name in ("plain", "packed.gz"):
        assert list(iterate_lines(tmp_path / name)) == ["eins", f"{mark}zwei"]
    pairs = read_parallel_text(tmp_path / "pairs.jsonl", tmp_path / "pairs.jsonl")
    assert (pairs.source, pairs.target) == (["eins"], ["one"])


def test_bad_files_are_explained(tmp_path: Path):
    good, short, empty = tmp_path / "good", tmp_path / "short", tmp_path / "empty"
    good.write_text("a\nb\nc\n")
    short.write_text("a\nb\n")
    empty.write_text("")
    (tmp_path / "latin").write_bytes("fein\nschön\n".encode("latin-1"))
    (tmp_path / "no.gz").write_text("not gzip")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"line\n" * 1000)[:-20])
    with pytest.raises(InputError, match=r"no text file at .*missing"):
        read_parallel_text(good, tmp_path / "missing")
    with pytest.raises(InputError, match=r"good has 3 and .*short has 2"):
        read_parallel_text(good, short)
    (tmp_path / "nothing").write_text("")
    with pytest.raises(InputError, match="no line; at least one sentence pair is needed"):
        read_parallel_text(empty, tmp_path / "nothing")
    with pytest.raises(InputError, match=r"latin, line 2: not valid UTF-8"):
        list(iterate_lines(tmp_path / "latin"))
    for name in ("no.gz", "cut.gz"):
        with pytest.raises(InputError, match="not a whole gzip file"):
            list(iterate_lines(tmp_path / name))


def test_paths_are_relative_to_the_folder(tmp_path):
    for name in ("train", "validation", "test"):
        for side in ("source", "target"):
            (tmp_path / f"{name}.{side}").write_text(f"{name} {side}\n")
    corpus = read_corpus(ParallelTextConfig(folder=str(tmp_path)))
    assert corpus.validation.target == ["validation target"]


# --- tokenizer

LINES = [english_number_words(n) for n in range(300)] + ["Straße und Katze"]


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
def test_tokenizer_round_trip_and_reproducible_training(algorithm):
    config = TokenizerConfig(algorithm, vocab_size=40)
    tokenizer = SentencePieceTokenizer.train(LINES, config)
    assert tokenizer.vocab_size == 40
    assert [tokenizer.decode(ids) for ids in tokenizer.encode(LINES)] == LINES
    assert SentencePieceTokenizer.train(LINES, config).fingerprint == tokenizer.fingerprint
    assert not any(i in (0, 1, 2) for ids in tokenizer.encode(LINES) for i in ids)


@pytest.mark.parametrize("joint", [True, False])
def test_tokenizers_survive_saving(tmp_path, joint):
    pair = TokenizerPair.train(LINES, LINES[::2], TokenizerConfig(vocab_size=40, joint=joint))
    pair.save(tmp_path)
    loaded = TokenizerPair.load(tmp_path)
    assert loaded.joint == joint
    for side in ("source", "target"):
        assert getattr(loaded, side).fingerprint == getattr(pair, side).fingerprint


def test_bad_tokenizers_are_explained(tmp_path):
    with pytest.raises(InputError, match="cannot learn tokenizer.vocab_size = 5000 pieces from this text"):
        SentencePieceTokenizer.train(LINES, TokenizerConfig(vocab_size=5000))
    with pytest.raises(ConfigError, match="vocab_size must be above 4, got 3"):
        TokenizerConfig(vocab_size=3)
    with pytest.raises(RunFolderError, match=r"holds no tokenizer: expected joint.model, or source.model and target"):
        TokenizerPair.load(tmp_path)


def test_line_ends_and_halves_of_characters():
    """Pieces of bytes can spell a line end, and an output is one line; no text holds half a character."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["one two three four"] * 20), model_writer=model, vocab_size=290, byte_fallback=True,
        hard_vocab_limit=False, pad_id=0, bos_id=1, eos_id=SPECIAL.end, unk_id=SPECIAL.unknown, minloglevel=2,
    )  # fmt: skip
    tokenizer = SentencePieceTokenizer(model.getvalue())
    one, two = tokenizer.encode(["one", "two"])
    end_of_line = tokenizer.id_of("<0x0A>")
    assert end_of_line is not None and tokenizer.pieces([end_of_line]) == ["<0x0A>"]
    assert tokenizer.decode([*one, end_of_line, *two]).split("one")[1].strip() == "two"
    assert sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).decode([end_of_line]) == "\n"
    assert tokenizer.decode([end_of_line]) == " "
    with pytest.raises(InputError, match=r"not valid Unicode: 'a\\udcff' holds bytes or lone surrogates"):
        tokenizer.encode(["one", "a\udcff"])


def test_tokenized_text_closes_each_sentence():
    tokenizer = SentencePieceTokenizer.train(LINES, TokenizerConfig(vocab_size=40))
    text = TokenizedText.from_lines(["forty", "", "two hundred"], tokenizer)
    ids = tokenizer.encode(["forty", "", "two hundred"])
    for i, sentence in enumerate(ids):
        assert text.ids[text.offsets[i] : text.offsets[i + 1]].tolist() == [*sentence, SPECIAL.end]
    assert text.lengths.tolist() == [len(s) + 1 for s in ids]
