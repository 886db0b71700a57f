"""Corpus, tokenizer and batches."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_transformer.data.batching import (
    BatchingConfig,
    BatchShape,
    EpochPlan,
    Position,
    TokenizedPairs,
    choose_shapes,
    make_batch,
)
from flax_transformer.data.loader import evaluation_batches, training_batches
from flax_transformer.data.parallel_text import ParallelTextConfig, iterate_lines, read_corpus, read_parallel_text
from flax_transformer.data.synthetic import (
    NumberWordsConfig,
    english_number_words,
    german_number_words,
    number_words_corpus,
)
from flax_transformer.data.tokenizer import END_ID, TokenizedText, Tokenizer, TokenizerConfig, TokenizerPair
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
    parts = [set(part.source) for part in corpus]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert [len(p.source) for p in corpus] == [1_000, 60, 400]
    assert len(parts[1]) == 60 and len(parts[2]) == 400  # distinct
    assert "zero" in parts[0]
    for part in corpus:
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
    with pytest.raises(InputError, match="are empty: at least one sentence pair is needed"):
        read_parallel_text(empty, empty)
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
    tokenizer = Tokenizer.train(LINES, config)
    assert tokenizer.vocab_size == 40
    assert [tokenizer.decode(ids) for ids in tokenizer.encode(LINES)] == LINES
    assert Tokenizer.train(LINES, config).fingerprint == tokenizer.fingerprint
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
        Tokenizer.train(LINES, TokenizerConfig(vocab_size=5000))
    with pytest.raises(ConfigError, match="vocab_size must be above 4, got 3"):
        TokenizerConfig(vocab_size=3)
    with pytest.raises(RunFolderError, match=r"holds no tokenizer: expected joint.model, or source.model and target"):
        TokenizerPair.load(tmp_path)


def test_tokenized_text_closes_each_sentence():
    tokenizer = Tokenizer.train(LINES, TokenizerConfig(vocab_size=40))
    text = TokenizedText.from_lines(["forty", "", "two hundred"], tokenizer)
    ids = tokenizer.encode(["forty", "", "two hundred"])
    for i, sentence in enumerate(ids):
        assert text.ids[text.offsets[i] : text.offsets[i + 1]].tolist() == [*sentence, END_ID]
    assert text.lengths.tolist() == [len(s) + 1 for s in ids]


# --- batches


def random_text(rng: np.random.Generator, lengths: np.ndarray) -> TokenizedText:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = rng.integers(4, 100, int(offsets[-1])).astype(np.int32)
    ids[offsets[1:] - 1] = END_ID
    return TokenizedText(ids, offsets)


def random_pairs(seed: int, num: int, longest: int = 40) -> TokenizedPairs:
    rng = np.random.default_rng(seed)
    return TokenizedPairs(
        random_text(rng, rng.integers(2, longest + 1, num)), random_text(rng, rng.integers(2, longest + 1, num)), 64, 64
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 300), st.integers(1, 6), st.integers(350, 2000))
def test_an_epoch_holds_every_pair_once_in_shapes_within_the_budget(seed, num, num_shapes, budget):
    pairs = random_pairs(seed, num)
    shapes = choose_shapes(pairs.lengths, BatchingConfig(budget, num_shapes))
    assert len(shapes) <= num_shapes
    for shape in shapes:
        assert shape.rows % 8 == 0 and shape.rows * max(shape.source_length, shape.target_length) <= budget
    plan = EpochPlan(pairs.lengths, shapes, seed=seed)
    epoch = plan.epoch(3)
    assert len(epoch) == plan.batches_per_epoch
    np.testing.assert_array_equal(np.sort(np.concatenate([i for _, i in epoch])), np.arange(num))
    for shape, indices in epoch:
        batch = make_batch(pairs, shape, indices)
        assert batch.source_tokens.shape == (shape.rows, shape.source_length)
        for row, pair in enumerate(indices):
            for text, tokens, positions, segments in (
                (pairs.source, *batch[:3]),
                (pairs.target, *batch[3:]),
            ):
                sentence = text.ids[text.offsets[pair] : text.offsets[pair + 1]]
                n = len(sentence)
                np.testing.assert_array_equal(tokens[row, :n], sentence)
                np.testing.assert_array_equal(positions[row, :n], np.arange(n))
                assert segments[row].sum() == n and segments[row, :n].all()
        assert not batch.target_segments[len(indices) :].any()


def test_shapes_have_the_least_padding_of_all_cuts():
    from itertools import combinations

    lengths = random_pairs(5, 400, longest=30).lengths
    shapes = choose_shapes(lengths, BatchingConfig(4096, 3))

    def padded(of: list[BatchShape]) -> int:
        chosen = EpochPlan(lengths, of, None)._shape_of_pair
        return sum(of[i].source_length + of[i].target_length for i in chosen)

    longer = lengths.max(axis=1)

    def cut(bounds) -> list[BatchShape]:
        result, low = [], 0
        for high in bounds:
            members = lengths[(longer > low) & (longer <= high)]
            if len(members):
                source, target = (-(-members.max(axis=0) // 4) * 4).tolist()
                result.append(BatchShape(8, source, target))
            low = high
        return result

    best = min(padded(cut([*inner, 32])) for inner in combinations(range(4, 32, 4), 2))
    assert padded(shapes) <= best


def test_epochs_differ_and_any_position_can_be_gone_on_from():
    pairs = random_pairs(0, 200)
    plan = EpochPlan(pairs.lengths, choose_shapes(pairs.lengths, BatchingConfig(640, 3)), seed=1)
    stream = training_batches(pairs, plan, Position(0, 0))
    seen = [next(stream) for _ in range(2 * plan.batches_per_epoch + 3)]
    assert seen[plan.batches_per_epoch - 1][1] == Position(1, 0)
    first = np.concatenate([i for _, i in plan.epoch(0)])
    assert not np.array_equal(first, np.concatenate([i for _, i in plan.epoch(1)]))
    for start in (1, plan.batches_per_epoch - 1, plan.batches_per_epoch, plan.batches_per_epoch + 2):
        resumed = training_batches(pairs, plan, seen[start - 1][1])
        for batch, position in seen[start : start + 3]:
            again, position_again = next(resumed)
            assert position_again == position
            for a, b in zip(batch, again, strict=True):
                np.testing.assert_array_equal(a, b)


def test_evaluation_sees_every_pair_once():
    pairs = random_pairs(0, 100)
    plan = EpochPlan(pairs.lengths, choose_shapes(pairs.lengths, BatchingConfig(640, 2)), None)
    tokens = sum(int(b.target_segments.sum()) for b in evaluation_batches(pairs, plan))
    assert tokens == pairs.lengths[:, 1].sum()


def test_the_last_shape_need_not_hold_every_pair_but_one_shape_does():
    """Long on one side and long on the other: each shape is as long as its own pairs, side by side."""
    lengths = np.array([[8, 20]] * 50 + [[40, 4]] * 20)
    several = choose_shapes(lengths, BatchingConfig(640, 2))
    assert several[-1].target_length < 20
    assert EpochPlan(lengths, several, None).batches_per_epoch == 2 + 2
    (single,) = choose_shapes(lengths, BatchingConfig(640, 1))
    assert (single.source_length, single.target_length) == (40, 20)


def test_pairs_that_do_not_fit_are_counted_and_nothing_left_is_explained():
    rng = np.random.default_rng(0)
    source, target = random_text(rng, np.array([1, 5, 30, 4])), random_text(rng, np.array([5, 1, 5, 9]))
    pairs = TokenizedPairs(source, target, 20, 20)
    assert (pairs.num_empty, pairs.num_too_long, pairs.kept.tolist()) == (2, 1, [3])
    with pytest.raises(InputError, match=r"of 4 pairs 2 have an empty side and 2 are longer than model.max_source_len"):
        TokenizedPairs(source, target, 3, 3)


def test_a_budget_smaller_than_the_longest_pairs_is_explained():
    with pytest.raises(ConfigError, match=r"tokens_per_batch \(100\) is too small: .* longest pair has 40 tokens.*320"):
        choose_shapes(np.array([[40, 3], [4, 4]]), BatchingConfig(100, 2))
