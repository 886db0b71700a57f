"""From files to training pairs: formats, filters, mixtures, and the caches of tokenizers and of tokenised text."""

import gzip
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from flax_transformer import progress
from flax_transformer.cli import main as cli
from flax_transformer.config.reading import read_config
from flax_transformer.config.recipe import Config
from flax_transformer.data import preparation, token_cache
from flax_transformer.data.batching import BatchingConfig, Mixture, Position, TokenizedPairs
from flax_transformer.data.bucketing import BatchShape, BucketedPlan
from flax_transformer.data.corpus import load_corpus
from flax_transformer.data.filters import FilterConfig, PairMarks, filter_pairs
from flax_transformer.data.loader import training_batches, training_plan
from flax_transformer.data.packing import PackedPlan
from flax_transformer.data.parallel_text import (
    Corpus,
    ParallelFiles,
    ParallelText,
    ParallelTextConfig,
    read_corpus,
    read_parallel_text,
)
from flax_transformer.data.preparation import held_out_pairs, prepare_tokenizers, prepare_training_pairs
from flax_transformer.data.synthetic import NumberWordsConfig, english_number_words, number_words_corpus
from flax_transformer.data.token_cache import tokenized_parts
from flax_transformer.data.tokenizer import SubwordSample, SubwordSamplingConfig, TokenizedText, TokenizerConfig
from flax_transformer.data.tokenizer_pair import TokenizerPair
from flax_transformer.errors import ConfigError, InputError
from flax_transformer.experiment.new_run import tokenizers_of_new_run
from flax_transformer.experiment.report import describe_pairs, describe_run
from flax_transformer.experiment.text import PreparedText, prepare_text
from flax_transformer.models.recurrent_config import RecurrentConfig

SOURCE = [english_number_words(n) for n in range(400)]
TARGET = SOURCE[::-1]
TEXT = ParallelText(SOURCE, TARGET)
TOKENIZERS = TokenizerPair.train(SOURCE, TARGET, TokenizerConfig(vocab_size=40))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# --- formats


def test_tsv_and_json_lines_read_like_plain_text(tmp_path):
    pairs = [("a b", "c"), ("d", "e\u2028f"), ("", "g")]
    (tmp_path / "text.tsv").write_text("".join(f"{t}\t1.0\t{s}\n" for s, t in pairs), encoding="utf-8")
    objects = "".join(json.dumps({"de": t, "en": s}) + "\n" for s, t in pairs)
    (tmp_path / "text.jsonl.gz").write_bytes(gzip.compress(objects.encode()))
    config = ParallelTextConfig(
        folder=str(tmp_path),
        train_source=("text.tsv", "text.jsonl.gz"),
        train_target=("text.tsv", "text.jsonl.gz"),
        validation_source="text.tsv",
        validation_target="text.tsv",
        test_source="text.jsonl.gz",
        test_target="text.jsonl.gz",
        source_column=3,
        target_column=1,
        source_key="en",
        target_key="de",
    )
    corpus = read_corpus(config)
    as_json = [(s, " ".join(t.splitlines())) for s, t in pairs]
    assert list(corpus.validation.pairs()) == pairs
    assert list(corpus.test.pairs()) == as_json
    assert [list(part.pairs()) for part in corpus.train] == [pairs, as_json]


def test_bad_lines_are_named(tmp_path):
    (tmp_path / "bad.tsv").write_text("a\tb\nonly one\n")
    with pytest.raises(InputError, match=r"bad.tsv, line 2: expected at least 2 columns with tabs .*, found 1"):
        read_parallel_text(tmp_path / "bad.tsv", tmp_path / "bad.tsv")
    for line in (
        '{"source": 3, "target": "b"}',
        '{"source": "\\ud800", "target": "b"}',
        '{"target": "b"}',
        "no json",
        "[1]",
        "[" * 100_000,
    ):
        (tmp_path / "bad.jsonl").write_text('{"source": "a", "target": "b"}\n' + line + "\n")
        with pytest.raises(InputError, match=r"bad.jsonl, line 2: expected a JSON object with a text under the key"):
            read_parallel_text(tmp_path / "bad.jsonl", tmp_path / "bad.jsonl")
    (tmp_path / "a").write_text("1\n2\n3\n")
    (tmp_path / "b").write_text("1\n")
    for one, other in (("a", "b"), ("b", "a")):
        with pytest.raises(InputError, match=rf"{one} has \d and .*{other} has \d"):
            read_parallel_text(tmp_path / one, tmp_path / other)
    with pytest.raises(ConfigError, match="equally many files, at least one, and data.train_weights .*got 2, 1 and 0"):
        ParallelTextConfig(train_source=("a", "b"))
    with pytest.raises(ConfigError, match=r"train_weights must be above 0 and at most 1000, got 0.0"):
        ParallelTextConfig(train_weights=(0.0,))
    with pytest.raises(InputError, match="no text file at"):  # before anything is learnt
        read_corpus(ParallelTextConfig(folder=str(tmp_path), train_source=("a",), train_target=("missing",)))


# --- filters


def test_every_filter_counts_what_it_leaves_out():
    lengths = np.array([[1, 4], [9, 3], [2, 8], [4, 4], [4, 4], [5, 5], [5, 5], [3, 9]])
    identical = np.array([0, 0, 0, 1, 0, 0, 0, 0], bool)
    digests = np.array([1, 2, 3, 4, 5, 6, 6, 1], np.uint64)
    marks = PairMarks(identical, digests)
    reason, reasons = filter_pairs(lengths, None, 8, 8, FilterConfig())
    assert reason.tolist() == [1, 2, 0, 0, 0, 0, 0, 2] and reasons == ["empty", "too long"]
    reason, reasons = filter_pairs(lengths, marks, 8, 8, FilterConfig(3.0, drop_identical=True, drop_duplicates=True))
    assert reason.tolist() == [1, 2, 3, 4, 0, 0, 5, 2]
    assert reasons == ["empty", "too long", "of unequal length", "identical", "duplicate"]
    for ratio, must in ((0.5, "at least 1"), (-1.0, "at least 1"), (float("nan"), "a finite number")):
        with pytest.raises(ConfigError, match=f"filters.max_length_ratio must be {must}"):
            FilterConfig(max_length_ratio=ratio)


def test_a_duplicate_stays_in_the_corpus_of_the_largest_weight():
    lengths = np.full((10, 2), 4)
    ends = (4, 7, 10)
    marks = PairMarks(np.zeros(10, bool), np.array([1, 2, 1, 3, 3, 1, 4, 4, 2, 4], np.uint64))
    config = FilterConfig(drop_duplicates=True)
    assert np.flatnonzero(filter_pairs(lengths, marks, 8, 8, config)[0] == 0).tolist() == [0, 1, 3, 6]  # in one corpus
    for weights, expected in (
        ((1.0, 1.0, 1.0), [0, 1, 3, 6]),
        ((0.5, 4.0, 4.0), [4, 5, 6, 8]),
        ((0.5, 1.0, 4.0), [4, 5, 7, 8]),
        ((4.0, 1.0, 1.5), [0, 1, 3, 7]),
    ):
        reason, reasons = filter_pairs(lengths, marks, 8, 8, config, ends, weights)
        assert np.flatnonzero(reason == 0).tolist() == expected
        assert np.count_nonzero(reason == 1 + reasons.index("duplicate")) == 6
    web, ours = ParallelText(SOURCE, TARGET, "web", 0.5), ParallelText(SOURCE[:30], TARGET[:30], "ours", 4.0)
    (pairs,) = prepare_training_pairs((web, ours), TOKENIZERS, config, 64, 64)
    assert pairs.kept.tolist() == list(range(30, 430)) and pairs.mixture.ends == (370, 400)


def test_a_corpus_of_which_nothing_is_left_is_named():
    empty = ParallelText(["", ""], ["a", "b"], "web.en and web.de")
    for filters, advice in (
        (FilterConfig(), r"Check the files, or raise the limits\.$"),
        (FilterConfig(4.0), r"Check the files, or raise the limits, or loosen section 'filters'\.$"),
    ):
        with pytest.raises(
            InputError,
            match=r"no sentence pair of web.en and web.de \(corpus 2 of 2\) is left: of its 2 pairs, left out were "
            r"2 empty, 0 too.* " + advice,
        ):
            prepare_training_pairs((TEXT, empty), TOKENIZERS, filters, 64, 64)


def test_held_out_text_of_which_nothing_is_left_is_named():
    with pytest.raises(
        InputError,
        match=r"no sentence pair of dev.en and dev.de is left: of its 400 pairs, .*, 400 too long. "
        r".*max_source_length \(2\).* Check the files, or raise the limits\.$",
    ):
        held_out_pairs(ParallelText(SOURCE, TARGET, "dev.en and dev.de"), TOKENIZERS, 2, 2)


def test_a_weight_too_small_for_one_pair_is_explained():
    text = ParallelText(SOURCE[:100], TARGET[:100], "our.tsv", 0.009)
    with pytest.raises(
        InputError,
        match=r"data.train_weights: 0.009 of the 100 pairs of our.tsv \(corpus 2 of 2\) is less than one pair an epoch",
    ):
        prepare_training_pairs((TEXT, text), TOKENIZERS, FilterConfig(), 64, 64)


def test_what_is_left_out_is_told_with_its_place():
    text = ParallelText(["", *SOURCE[20:25], ""], ["a", *TARGET[20:25], "b"], "dev.tsv")
    pairs = held_out_pairs(text, TOKENIZERS, 64, 64)
    assert pairs.left_out == "2 empty" and held_out_pairs(TEXT, TOKENIZERS, 64, 64).left_out == ""
    assert pairs.place(0) == "dev.tsv, line 2" and pairs.place(4) == "dev.tsv, line 6"
    (both,) = prepare_training_pairs((TEXT, text), TOKENIZERS, FilterConfig(), 64, 64)
    assert both.place(399) == "text (corpus 1 of 2), line 400"
    assert both.place(400) == "dev.tsv (corpus 2 of 2), line 2"
    # Of the pairs that are too long for the model the first is named, with what limits them.
    words = [" ".join(["one"] * n) for n in (3, 100, 120)]
    (short,) = prepare_training_pairs((TEXT, ParallelText(words, words, "x.tsv")), TOKENIZERS, FilterConfig(), 64, 64)
    where = "(the first: x.tsv (corpus 2 of 2), line 2; see model.max_source_length and max_target_length)"
    assert (
        short.left_out == f"2 too long {where}"
        and describe_pairs(short) == f"401 training pairs ({short.left_out} left out)"
    )
    # The line of the longest pair is named where it fits in no batch.
    lines = [" ".join(["one"] * n) for n in (3, 2, 20, 4)]
    last = ParallelText(["", *lines], ["a", *lines], "long.tsv")
    (long,) = prepare_training_pairs((last,), TOKENIZERS, FilterConfig(), 200, 200)
    tokens = int(long.lengths.max())
    with pytest.raises(ConfigError, match=rf"longest pair \({tokens} tokens on one side, long.tsv, line 4\)"):
        training_plan([long], BatchingConfig(True, row_length=16), 0)
    for variants in ([long], [pairs, long], [long, pairs]):
        with pytest.raises(ConfigError, match=r"tokens on one side, for the pair of long.tsv, line 4. Give at least"):
            training_plan(variants, BatchingConfig(tokens_per_batch=100), 0)


def test_a_started_run_tells_what_the_validation_loss_leaves_out(one_device):
    text = ParallelText(["", *SOURCE[:5]], ["a", *TARGET[:5]], "dev.tsv")
    corpus = Corpus((TEXT,), text, TEXT)
    (train,) = prepare_training_pairs(corpus.train, TOKENIZERS, FilterConfig(), 64, 64)
    plan = training_plan([train], BatchingConfig(tokens_per_batch=640, num_buckets=2), 0)
    config = Config(data=ParallelTextConfig())
    for held_out, expected in (
        (held_out_pairs(text, TOKENIZERS, 64, 64), "400 training pairs, 6 validation (1 empty left out of the loss), "),
        (held_out_pairs(ParallelText(SOURCE[:6], TARGET[:6]), TOKENIZERS, 64, 64), "pairs, 6 validation, 400 test"),
    ):
        prepared = PreparedText(corpus, TOKENIZERS, [train], held_out, plan, plan, "")
        assert expected in describe_run(config, prepared, 1_000, one_device)


# --- mixtures


def test_an_epoch_holds_each_corpus_as_often_as_it_weighs():
    mixture = Mixture((10, 30, 70), (1.0, 2.5, 0.25))
    epochs = [np.bincount(mixture.pairs_of_epoch(0, epoch), minlength=70) for epoch in range(40)]
    for counts in epochs:
        assert (counts[:10] == 1).all()
        assert set(counts[10:30]) == {2, 3} and counts[10:30].sum() == 50
        assert set(counts[30:]) == {0, 1} and counts[30:].sum() == 10
    assert (np.sum(epochs[4:8], axis=0)[30:] == 1).all()  # each epoch takes another quarter


@pytest.mark.parametrize("weight", [0.25, 0.4, 1.5, 0.07, 2.9])
def test_a_fraction_is_of_every_pair_before_it_is_of_one_again(weight):
    mixture = Mixture((50, 91), (1.0, weight))  # 41 pairs: no weight here divides them
    seen = np.zeros(41, int)
    whole = int(weight)
    orders = []
    for epoch in range(60):
        pairs = mixture.pairs_of_epoch(7, epoch)
        np.testing.assert_array_equal(pairs, mixture.pairs_of_epoch(7, epoch))
        counts = np.bincount(pairs, minlength=91)
        assert (counts[:50] == 1).all() and abs(counts[50:].sum() - weight * 41) < 1
        seen += counts[50:] - whole
        assert seen.max() - seen.min() <= 1 and abs(seen.sum() - (epoch + 1) * (weight - whole) * 41) < 1
        if epoch + 1 == math.ceil(1 / (weight - whole)):
            assert seen.min() == 1
        orders += pairs[50 + 41 * whole :].tolist()
    first, second = orders[:41], orders[41:82]  # two permutations, and other ones with another seed
    assert first != second and sorted(first) == sorted(second) == list(range(50, 91))
    assert not np.array_equal(mixture.pairs_of_epoch(8, 0), mixture.pairs_of_epoch(7, 0))


def test_without_fractions_an_epoch_is_one_shuffle():
    # Of the pairs, then of the batches: nothing else is drawn, so that runs go on as they began.
    for ends, weights, pairs in (
        ((50,), (1.0,), np.arange(50)),
        ((20, 50), (3.0, 1.0), np.concatenate([np.tile(np.arange(20), 3), np.arange(20, 50)])),
    ):
        plan = BucketedPlan(np.full((50, 2), 16), [BatchShape(8, 16, 16)], 3, Mixture(ends, weights))
        rng = np.random.default_rng((3, 5))
        order = rng.permutation(pairs)
        batches = [order[start : start + 8] for start in range(0, len(order), 8)]
        expected = [batches[i] for i in rng.permutation(len(batches))]
        for planned, of_batch in zip(plan.epoch(5), expected, strict=True):
            np.testing.assert_array_equal(planned.pairs, of_batch)


@pytest.mark.parametrize("packing", [False, True])
def test_plans_follow_the_mixture(packing):
    lengths = np.random.default_rng(0).integers(2, 9, (90, 2))
    mixture = Mixture((30, 90), (3.0, 0.5))
    shape = BatchShape(8, 16, 16)
    plan = PackedPlan(lengths, shape, 1, mixture) if packing else BucketedPlan(lengths, [shape], 1, mixture)
    counts = np.bincount(np.concatenate([batch.pairs for batch in plan.epoch(0)]), minlength=90)
    assert (counts[:30] == 3).all() and counts[30:].sum() == 30
    again = np.concatenate([batch.pairs for batch in plan.epoch(0)])
    np.testing.assert_array_equal(again, np.concatenate([batch.pairs for batch in plan.epoch(0)]))


def test_weights_and_files_reach_the_pairs(tmp_path):
    for name, lines in (("a", SOURCE[:30]), ("b", SOURCE[30:90])):
        for side in ("", "2"):
            (tmp_path / f"{name}{side}").write_text("".join(f"{line}\n" for line in lines))
        for part in ("validation", "test"):
            for side in ("source", "target"):
                (tmp_path / f"{part}.{side}").write_text("one\n")
    config = ParallelTextConfig(
        folder=str(tmp_path), train_source=("a", "b"), train_target=("a2", "b2"), train_weights=(3.0, 0.5)
    )
    (pairs,) = prepare_training_pairs(read_corpus(config).train, TOKENIZERS, FilterConfig(), 64, 64)
    assert pairs.mixture == Mixture((30, 90), (3.0, 0.5))
    with pytest.raises(InputError, match="of its 30 pairs, left out were 0 empty, 0 too long, 30 identical"):
        prepare_training_pairs(read_corpus(config).train, TOKENIZERS, FilterConfig(drop_identical=True), 64, 64)


# --- tokenizers


def test_tokenizers_are_learnt_once(monkeypatch):
    config = TokenizerConfig(vocab_size=40)
    first = prepare_tokenizers((TEXT,), config)
    assert first.source.fingerprint == TOKENIZERS.source.fingerprint
    monkeypatch.setattr(preparation.TokenizerPair, "train", None)  # would fail
    assert prepare_tokenizers((ParallelText(SOURCE, TARGET),), config).source.fingerprint == first.source.fingerprint
    for text, other in ((TEXT, TokenizerConfig(vocab_size=41)), (ParallelText(SOURCE, SOURCE), config)):
        with pytest.raises(TypeError):
            prepare_tokenizers((text,), other)


@pytest.mark.parametrize(
    "source, target, joint, name",
    [
        (["a"] * 400, TARGET, False, "the source side of a.en and a.de, b.tsv"),
        (SOURCE, ["a"] * 400, False, "the target side of a.en and a.de, b.tsv"),
        (["a"], ["b"], True, "both sides of a.en and a.de, b.tsv"),
    ],
)
def test_text_with_too_few_pieces_is_named(source, target, joint, name):
    parts = [ParallelText(source, target, part) for part in ("a.en and a.de", "b.tsv")]
    with pytest.raises(InputError, match=f"cannot learn tokenizer.vocab_size = 40 pieces from {name}: "):
        prepare_tokenizers(parts, TokenizerConfig(vocab_size=40, joint=joint))


@pytest.mark.parametrize("most", [1, 7, 100, 399, 400, 1000])
def test_tokenizers_learn_from_a_spread_out_sample(most):
    source, target = preparation._sample((TEXT, TEXT), most)
    assert min(most, 800) / 2 <= len(source) == len(target) <= min(most, 800)
    assert all(pair in set(TEXT.pairs()) for pair in zip(source, target, strict=True))
    if most >= 7:
        places = [SOURCE.index(s) for s in source]
        assert min(places) < 60 and max(places) > 340


@pytest.mark.parametrize("algorithm", ["word", "char"])
def test_words_and_characters(algorithm):
    lines = ["ein Hund , und &quot; zwei", "zwei Hunde", "ein  Hund ."]
    config = TokenizerConfig(algorithm, vocab_size=60, normalization="identity")
    tokenizer = TokenizerPair.train(lines, lines, config).source
    assert tokenizer.vocab_size < 60  # as many as the text has
    for line in lines:
        (ids,) = tokenizer.encode([line])
        words = line.split()
        assert len(ids) == (len(words) if algorithm == "word" else len(" ".join(words)) + 1)
        assert tokenizer.decode(ids) == " ".join(words)


def test_text_that_is_tokenised_already_passes_through_unchanged():
    lines = ["ﬁn ½ &apos;s «a»", "x² … ①"] * 3
    kept = TokenizerPair.train(lines, lines, TokenizerConfig(vocab_size=40, algorithm="char", normalization="identity"))
    assert [kept.source.decode(ids) for ids in kept.source.encode(lines)] == lines
    changed = TokenizerPair.train(lines, lines, TokenizerConfig(vocab_size=40, algorithm="char"))
    assert changed.source.decode(changed.source.encode(lines)[0]) == "fin 1⁄2 &apos;s «a»"


@pytest.mark.parametrize("damage", [b"", b"cut"])
def test_damaged_tokenizers_are_learnt_again(tmp_path, damage):
    config = TokenizerConfig(vocab_size=40)
    first = prepare_tokenizers((TEXT,), config)
    (kept,) = (tmp_path / "cache").rglob("joint.model")
    kept.write_bytes(damage)
    assert prepare_tokenizers((TEXT,), config).source.fingerprint == first.source.fingerprint


# --- the cache of tokenised text


def test_cached_pairs_are_the_pairs(monkeypatch, tmp_path):
    monkeypatch.setattr(token_cache, "PAIRS_AT_ONCE", 37)  # several pieces, the last of them short
    (pairs,) = prepare_training_pairs((TEXT, ParallelText(TARGET, SOURCE)), TOKENIZERS, FilterConfig(), 64, 64)
    direct = TokenizedPairs(
        TokenizedText.from_lines(SOURCE + TARGET, TOKENIZERS.source),
        TokenizedText.from_lines(TARGET + SOURCE, TOKENIZERS.target),
        64,
        64,
        mixture=Mixture((400, 800), (1.0, 1.0)),
    )
    assert isinstance(pairs.source.ids, np.memmap)
    assert pairs.fingerprint == direct.fingerprint
    monkeypatch.setattr(token_cache, "_write", None)  # would fail
    (again,) = prepare_training_pairs((TEXT, ParallelText(TARGET, SOURCE)), TOKENIZERS, FilterConfig(), 64, 64)
    assert again.fingerprint == direct.fingerprint
    other = TokenizerPair.train(SOURCE, TARGET, TokenizerConfig(vocab_size=41))
    for text, tokenizers in ((ParallelText(SOURCE, SOURCE), TOKENIZERS), (TEXT, other)):
        with pytest.raises(TypeError):
            prepare_training_pairs((text,), tokenizers, FilterConfig(), 64, 64)


def test_a_log_is_told_how_far_tokenising_is(monkeypatch, capsys):
    monkeypatch.setattr(token_cache, "PAIRS_AT_ONCE", 150)
    prepare_training_pairs((TEXT,), TOKENIZERS, FilterConfig(), 64, 64)
    assert not capsys.readouterr().err  # it took no time
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    prepare_training_pairs((ParallelText(TARGET, SOURCE),), TOKENIZERS, FilterConfig(), 64, 64)
    told = [re.sub(r", [\d,]+ a second$", "", line) for line in capsys.readouterr().err.splitlines()]
    assert told == [f"tokenising: {pairs} pairs" for pairs in (150, 300, 400)]


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
def test_sampled_segmentations_differ_and_come_back(algorithm):
    sampling = SubwordSamplingConfig(alpha=0.1, variants=3)
    tokenizers = TokenizerPair.train(SOURCE, TARGET, TokenizerConfig(algorithm, vocab_size=40))
    variants = prepare_training_pairs((TEXT,), tokenizers, FilterConfig(), 64, 64, sampling)
    (best,) = prepare_training_pairs((TEXT,), tokenizers, FilterConfig(), 64, 64)
    assert len({pairs.fingerprint for pairs in (*variants, best)}) == 4
    direct = TokenizedText.from_lines(TEXT.target, tokenizers.target, SubwordSample(0.1, 2).at(1, 0))
    np.testing.assert_array_equal(variants[2].target.ids, direct.ids)
    for pairs in variants:
        text, offsets = pairs.target, pairs.target.offsets
        lines = [text.ids[a : b - 1].tolist() for a, b in zip(offsets, offsets[1:], strict=False)]
        assert [tokenizers.target.decode(line) for line in lines] == list(TEXT.target)
        assert pairs.lengths.sum() > best.lengths.sum()
    # The epochs take turns, in the same shapes, and a position says which variant it stands in.
    plan = training_plan(variants, BatchingConfig(tokens_per_batch=640, num_buckets=2), 0)
    per_epoch = [len(plan.epoch(e)) for e in range(4)]
    stream = training_batches(variants, plan, Position(0, 0))
    seen = list(itertools.islice(stream, sum(per_epoch)))
    tokens = [int((batch.target_segments > 0).sum()) for batch, _ in seen]
    starts = np.cumsum([0, *per_epoch])
    sums = [sum(tokens[a:b]) for a, b in zip(starts, starts[1:], strict=False)]
    assert sums == [int(variants[e % 3].lengths[:, 1].sum()) for e in range(4)]
    position = seen[per_epoch[0] + 1][1]
    again, _ = next(training_batches(variants, plan, position))
    np.testing.assert_array_equal(again.target_tokens, seen[per_epoch[0] + 2][0].target_tokens)


def test_a_sampled_segmentation_does_not_depend_on_the_number_of_cores(monkeypatch):
    lines, sample = [*TEXT.target[:20]] * 3, SubwordSample(0.02, 5, num_lines=10)  # nearly every way is as likely
    found = []
    for cores in (1, 1, 2, 5):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        found.append(TOKENIZERS.target.encode(lines, sample))
    assert found[1:] == [found[0]] * 3
    assert found[0] != TOKENIZERS.target.encode(lines, sample.at(1)) and len(found[0]) == 60


def test_sampling_that_cannot_be_is_explained():
    with pytest.raises(ConfigError, match="needs tokenizer.algorithm unigram or bpe: 'word' cuts a text in one way"):
        Config(
            subword_sampling=SubwordSamplingConfig(alpha=0.1),
            tokenizer=TokenizerConfig("word"),
            model=RecurrentConfig(),
        )
    with pytest.raises(ConfigError, match="subword_sampling.alpha must be below 1 for bpe"):
        Config(subword_sampling=SubwordSamplingConfig(alpha=1.0), tokenizer=TokenizerConfig("bpe"))
    with pytest.raises(ConfigError, match="must not be negative"):
        SubwordSamplingConfig(alpha=-0.1)
    with pytest.raises(ConfigError, match="variants must be at least 1"):
        SubwordSamplingConfig(variants=0)


def test_marks_know_identical_pairs_and_duplicates(tmp_path):
    text = ParallelText(["a", "b", "a", "a", "c"], ["b", "b", "b", "a", "d"])
    marks = tokenized_parts((text,), TOKENIZERS, tmp_path).marks
    assert marks.identical.tolist() == [False, True, False, True, False]
    assert len(set(marks.digests.tolist())) == 4 and marks.digests[0] == marks.digests[2]


def test_a_writer_that_is_killed_leaves_nothing_that_is_taken_for_whole(tmp_path):
    """In a process of its own, which is killed while it writes the last of three pieces."""
    code = """
import os, sys
from pathlib import Path
from flax_transformer.data import token_cache
from tests.test_preparation import TEXT, TOKENIZERS
encode, calls = token_cache._encode, []
def killed(*arguments):
    calls.append(1)
    if len(calls) == 6:
        os.kill(os.getpid(), 9)
    return encode(*arguments)
token_cache._encode, token_cache.PAIRS_AT_ONCE = killed, 150
token_cache.tokenized_parts((TEXT,), TOKENIZERS, Path(sys.argv[1]))
"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    (partial,) = tmp_path.iterdir()
    assert ".partial-" in partial.name
    whole = tokenized_parts((TEXT,), TOKENIZERS, tmp_path)
    assert whole.ends == (400,) and whole.folder.is_dir() and partial.is_dir()  # its writer might live yet
    long_ago = time.time() - 2 * token_cache.ABANDONED_SECONDS
    for path in (*partial.iterdir(), partial):
        os.utime(path, (long_ago, long_ago))
    tokenized_parts((ParallelText(SOURCE, SOURCE),), TOKENIZERS, tmp_path)
    assert not partial.is_dir()


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "long").write_text("a\nb\n")
    (tmp_path / "short").write_text("a\n")
    bad = ParallelFiles(tmp_path / "long", tmp_path / "short", ParallelTextConfig())
    with pytest.raises(InputError, match="long has 2 and"):
        tokenized_parts((bad,), TOKENIZERS, tmp_path / "tokens")
    assert not list((tmp_path / "tokens").iterdir())


# --- the verb


def test_prepare_makes_what_training_takes(tmp_path, capsys, monkeypatch, one_device):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "data: {kind: number_words, num_train: 300, num_validation: 20, num_test: 24}\n"
        "tokenizer: {vocab_size: 60}\nmodel: {max_source_length: 20, max_target_length: 20}\n"
        "batching: {tokens_per_batch: 640, num_buckets: 2}\nfilters: {drop_duplicates: true}\n"
    )
    assert cli.run_verb(cli.verb("prepare"), ["--config", str(recipe)], "flax-transformer prepare") == 0
    said = capsys.readouterr().out
    parts = number_words_corpus(NumberWordsConfig(300, 20, 24)).train
    unique = len(set(parts[0].pairs()))
    assert re.search(r"^([\d,]+) training pairs \((\d+) too long \(.*\), \d+ duplicate left out\)$", said, re.MULTILINE)
    kept, long = map(int, re.findall(r"(\d+) training pairs \((\d+) too long", said)[0])
    assert kept <= unique and kept + long >= unique
    assert re.search(r"2 compiled shapes, \d+ batches an epoch, padding \d+ %", said)
    monkeypatch.setattr(token_cache, "_write", None)
    monkeypatch.setattr(preparation.TokenizerPair, "train", None)
    assert cli.run_verb(cli.verb("prepare"), ["--config", str(recipe)], "flax-transformer prepare") == 0
    assert capsys.readouterr().out == said

    # A training takes the tokenizer and the tokens that lie there, too.
    config = read_config(recipe)
    corpus = load_corpus(config.data)
    prepared = prepare_text(config, corpus, tokenizers_of_new_run(config, corpus), one_device)
    assert describe_pairs(prepared.train[0]) in said
