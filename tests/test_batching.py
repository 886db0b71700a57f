"""Batches: bucketed and packed, and the position in them."""

import itertools
import threading
import tracemalloc

import chex
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_transformer.config.reading import from_dict
from flax_transformer.config.recipe import Config
from flax_transformer.data import packing
from flax_transformer.data.batching import (
    BatchingConfig,
    BatchShape,
    LengthSummary,
    Position,
    TokenizedPairs,
    index_dtype,
    make_batch,
    round_up,
)
from flax_transformer.data.bucketing import BucketedPlan, assign_shapes, choose_shapes
from flax_transformer.data.loader import (
    AlternatingPlan,
    evaluation_batches,
    evaluation_plan,
    training_batches,
    training_plan,
)
from flax_transformer.data.packing import PackedPlan, pack, packed_shape
from flax_transformer.data.sentencepiece_tokenizer import SPECIAL
from flax_transformer.data.tokenizer import TokenizedText
from flax_transformer.errors import ConfigError, InputError
from flax_transformer.training.step import Objective, batch_loss
from tests import tiny


def random_text(rng: np.random.Generator, lengths: np.ndarray, vocab: int = 100) -> TokenizedText:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = rng.integers(4, vocab, int(offsets[-1])).astype(np.int32)
    ids[offsets[1:] - 1] = SPECIAL.end
    return TokenizedText(ids, offsets)


def random_pairs(seed: int, num: int, longest: int = 40) -> TokenizedPairs:
    rng = np.random.default_rng(seed)
    return TokenizedPairs(
        random_text(rng, rng.integers(2, longest + 1, num)), random_text(rng, rng.integers(2, longest + 1, num)), 64, 64
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 300), st.integers(1, 6), st.integers(350, 2000))
def test_an_epoch_holds_every_pair_once_in_shapes_within_the_budget(seed, num, num_buckets, budget):
    pairs = random_pairs(seed, num)
    shapes = choose_shapes(LengthSummary.of(pairs.lengths), num_buckets, budget)
    assert len(shapes) <= num_buckets
    for shape in shapes:
        assert shape.rows % 8 == 0 and shape.rows * max(shape.source_length, shape.target_length) <= budget
    epoch = BucketedPlan(pairs.lengths, shapes, seed=seed).epoch(3)
    np.testing.assert_array_equal(np.sort(np.concatenate([b.pairs for b in epoch])), np.arange(num))
    for planned in epoch:
        shape, indices = planned.shape, planned.pairs
        batch = make_batch(pairs, planned)
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
    shapes = choose_shapes(LengthSummary.of(lengths), 3, 4096)

    def padded(of: list[BatchShape]) -> int:
        chosen = assign_shapes(lengths, of)
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


@pytest.mark.parametrize(
    "config",
    [BatchingConfig(tokens_per_batch=640, num_buckets=3), BatchingConfig(True, tokens_per_batch=640, row_length=72)],
)
def test_epochs_differ_and_any_position_can_be_gone_on_from(config):
    pairs = random_pairs(0, 200)
    plan = training_plan([pairs], config, seed=1)
    per_epoch = len(plan.epoch(0))
    stream = training_batches([pairs], plan, Position(0, 0))
    seen = [next(stream) for _ in range(per_epoch + len(plan.epoch(1)) + 3)]
    assert seen[per_epoch - 1][1] == Position(1, 0)
    first = np.concatenate([b.pairs for b in plan.epoch(0)])
    assert not np.array_equal(first, np.concatenate([b.pairs for b in plan.epoch(1)]))
    for start in (1, per_epoch - 1, per_epoch, per_epoch + 2):
        resumed = training_batches([pairs], plan, seen[start - 1][1])
        for batch, position in seen[start : start + 3]:
            again, position_again = next(resumed)
            assert position_again == position
            for a, b in zip(batch, again, strict=True):
                np.testing.assert_array_equal(a, b)


def test_evaluation_sees_every_pair_once():
    pairs = random_pairs(0, 100)
    plan = evaluation_plan(pairs.lengths, BatchingConfig(tokens_per_batch=640))
    assert len(plan.shapes) == 1
    tokens = sum(int(b.target_segments.sum()) for b in evaluation_batches(pairs, plan))
    assert tokens == pairs.lengths[:, 1].sum()


def test_the_next_epoch_is_planned_while_one_is_trained_on():
    """And none is planned twice, nor before half of the one before it has been seen."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 20, 90)
    pairs = TokenizedPairs(random_text(rng, lengths), random_text(rng, lengths), 20, 20)
    config = BatchingConfig(tokens_per_batch=160, num_buckets=2)
    plain, planned = training_plan([pairs], config, 3), []

    class Watched(BucketedPlan):
        def epoch(self, epoch):
            planned.append((epoch, threading.current_thread() is threading.main_thread()))
            return super().epoch(epoch)

    plan = AlternatingPlan(plain.shapes, 1, lambda _: Watched(pairs.lengths, plain.shapes, 3, pairs.mixture))
    num = len(plan.epoch(0))
    stream = training_batches([pairs], plan, Position(0, 0))
    for index in range(2 * num + 1):
        batch, _ = next(stream)
        epoch, place = divmod(index, num)
        chex.assert_trees_all_equal(batch, make_batch(pairs, plain.epoch(epoch)[place]))
        if place < num // 3:
            assert [e for e, _ in planned] == list(range(epoch + 1))
    assert planned == [(0, True), (1, False), (2, False)]


def test_a_plan_that_fails_in_the_background_is_heard_of():
    rng = np.random.default_rng(0)
    lengths = np.full(30, 5)
    pairs = TokenizedPairs(random_text(rng, lengths), random_text(rng, lengths), 20, 20)
    shapes = training_plan([pairs], BatchingConfig(tokens_per_batch=64), 0).shapes

    class Failing(BucketedPlan):
        def epoch(self, epoch):
            if epoch:
                raise MemoryError("no room for the next epoch")
            return super().epoch(epoch)

    stream = training_batches([pairs], Failing(pairs.lengths, shapes, 0, pairs.mixture), Position(0, 0))
    with pytest.raises(MemoryError, match="no room for the next epoch"):
        for _ in range(60):
            next(stream)


def test_rows_divide_by_what_a_large_mesh_needs():
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 60, 400)
    pairs = TokenizedPairs(random_text(rng, lengths), random_text(rng, lengths), 64, 64)
    for packed, pieces in itertools.product((False, True), (1, 2)):
        values = {"packing": packed, "row_length": 64, "gradient_accumulation_steps": pieces, "row_multiple": 24}
        config = from_dict(BatchingConfig, values | {"tokens_per_batch": 8192, "num_buckets": 3})
        shapes = training_plan([pairs], config, 0).shapes
        assert all(shape.rows % (24 * pieces) == 0 for shape in shapes)
        assert all(shape.rows * max(shape[1:]) <= 8192 for shape in shapes)
    with pytest.raises(ConfigError, match="batching.row_multiple must be at least 1, got 0"):
        BatchingConfig(row_multiple=0)


def test_the_last_shape_need_not_hold_every_pair_but_one_shape_does():
    """Long on one side and long on the other: each shape is as long as its own pairs, side by side."""
    lengths = np.array([[8, 20]] * 50 + [[40, 4]] * 20)
    several = choose_shapes(LengthSummary.of(lengths), 2, 640)
    assert several[-1].target_length < 20
    assert len(BucketedPlan(lengths, several, None).epoch(0)) == 2 + 2
    (single,) = choose_shapes(LengthSummary.of(lengths), 1, 640)
    assert (single.source_length, single.target_length) == (40, 20)


def test_pairs_that_do_not_fit_are_counted_and_nothing_left_is_explained():
    rng = np.random.default_rng(0)
    source, target = random_text(rng, np.array([1, 5, 30, 4])), random_text(rng, np.array([5, 1, 5, 9]))
    pairs = TokenizedPairs(source, target, 20, 20)
    assert (pairs.dropped, pairs.kept.tolist()) == ({"empty": 2, "too long": 1}, [3])
    with pytest.raises(
        InputError, match=r"of its 4 pairs, left out were 2 empty, 2 too long. .*model.max_source_length \(3\)"
    ):
        TokenizedPairs(source, target, 3, 3)


def test_a_budget_smaller_than_the_longest_pairs_is_explained():
    with pytest.raises(ConfigError, match=r"tokens_per_batch \(100\) is too small: .* a row has 40 tokens.*320"):
        choose_shapes(LengthSummary.of(np.array([[40, 3], [4, 4]])), 2, 100)


def test_lengths_of_several_texts_are_summed_up_as_if_they_were_one():
    """So that the lengths of many segmentations of a text are never in memory together."""
    texts = [random_pairs(seed, num, longest).lengths for seed, num, longest in ((1, 90, 9), (2, 50, 40), (3, 70, 25))]
    first, *others = map(LengthSummary.of, texts)
    added, whole = sum(others, first), LengthSummary.of(np.concatenate(texts))
    chex.assert_trees_all_equal(vars(added), vars(whole))
    assert added.counts.sum() == 210 and added.longest.max() == 40


def test_a_plan_of_many_variants_keeps_nothing_of_their_pairs():
    """But for the newest epoch: a byte for each pair of the seven others would be 28,000 here."""
    variants = [random_pairs(seed, 4_000) for seed in range(8)]
    for config in (BatchingConfig(tokens_per_batch=640), BatchingConfig(True, 640, row_length=72)):
        kept = []
        for num in (1, 8):
            tracemalloc.start()
            plan = training_plan(variants[:num], config, 0)
            kept.append(tracemalloc.get_traced_memory()[0])
            tracemalloc.stop()
        assert kept[1] < kept[0] + 8_000, (config.packing, kept)
        ones = [training_plan([variant], config, 0) for variant in variants]
        pairs = [np.concatenate([b.pairs for b in plan.epoch(e)]) for e in (1, 9)]
        assert all(sorted(p.tolist()) == list(range(4_000)) for p in pairs)
        assert plan.shapes[-1].rows == ones[0].shapes[-1].rows


# --- packed batches


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 200), st.integers(40, 120))
def test_packed_rows_hold_every_pair_once_whole_and_apart(seed, num, row_length):
    pairs = random_pairs(seed, num)
    config = BatchingConfig(True, tokens_per_batch=16 * 120, row_length=row_length)
    plan = training_plan([pairs], config, seed)
    (shape,) = plan.shapes
    assert shape.rows % 8 == 0 and max(shape.source_length, shape.target_length) <= round_up(row_length, 4)
    seen = []
    for planned in plan.epoch(2):
        batch = make_batch(pairs, planned)
        sides = (pairs.source, *batch[:3]), (pairs.target, *batch[3:])
        for row in range(shape.rows):
            members = planned.pairs[planned.rows == row]
            for text, tokens, positions, segments in sides:
                sentences = [text.ids[text.offsets[p] : text.offsets[p + 1]] for p in members]
                filled = int((segments[row] > 0).sum())
                np.testing.assert_array_equal(tokens[row, :filled], np.concatenate([[], *sentences]))
                np.testing.assert_array_equal(
                    positions[row, :filled], np.concatenate([[], *(np.arange(len(s)) for s in sentences)])
                )
                expected = [np.full(len(s), k) for k, s in enumerate(sentences, start=1)]
                np.testing.assert_array_equal(segments[row, :filled], np.concatenate([[], *expected]))
            seen += members.tolist()
    assert sorted(seen) == list(range(num))


def test_packing_leaves_less_padding_than_buckets():
    pairs = random_pairs(3, 3000, longest=24)

    def padding(config: BatchingConfig) -> float:
        batches = training_plan([pairs], config, 0).epoch(0)
        padded = sum(b.shape.rows * (b.shape.source_length + b.shape.target_length) for b in batches)
        return 1 - pairs.lengths.sum() / padded

    packed = padding(BatchingConfig(True, tokens_per_batch=2048, row_length=128))
    assert packed < 0.1 < padding(BatchingConfig(tokens_per_batch=2048, num_buckets=6))


def test_packed_bucketed_and_single_pairs_have_the_same_loss():
    model = tiny.transformer()
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 12, (2, 40))
    pairs = TokenizedPairs(random_text(rng, lengths[0], 19), random_text(rng, lengths[1], 19), 32, 24)
    step = jax.jit(lambda m, b: batch_loss(m, b, Objective(0.1), None))

    def losses(plan) -> list[float]:
        sums = [step(model, make_batch(pairs, planned)) for planned in plan.epoch(0)]
        return [float(sum(values)) for values in zip(*sums, strict=True)]

    bucketed = losses(BucketedPlan(pairs.lengths, choose_shapes(LengthSummary.of(pairs.lengths), 2, 160), 0))
    packed = losses(
        PackedPlan(pairs.lengths, packed_shape(LengthSummary.of(pairs.lengths), BatchingConfig(True, 256, 4, 24)), 0)
    )
    single = losses(BucketedPlan(pairs.lengths, [BatchShape(1, 12, 12)], 0))
    assert bucketed[3] == packed[3] == single[3] == pairs.lengths[:, 1].sum()
    np.testing.assert_allclose(packed, single, rtol=1e-5)
    np.testing.assert_allclose(bucketed, single, rtol=1e-5)


@pytest.mark.parametrize("at_once", [1, 7, 200, 201])
def test_packing_in_pieces_is_packing(monkeypatch, at_once):
    lengths = random_pairs(4, 200).lengths
    shape = BatchShape(8, 64, 64)
    whole = pack(lengths, shape)
    monkeypatch.setattr(packing, "PAIRS_AT_ONCE", at_once)
    np.testing.assert_array_equal(pack(lengths, shape), whole)
    assert whole.max() > 2 * packing.OPEN_ROWS  # rows are closed while pairs are yet to come


def test_what_is_kept_of_every_pair_is_small():
    pairs = random_pairs(4, 200)
    shapes = [BatchShape(8, 16, 16), BatchShape(8, 64, 64)]
    assert pairs.kept.dtype == pairs.lengths.dtype == np.int32
    assert assign_shapes(pairs.lengths, shapes).dtype == np.uint8
    assert assign_shapes(pairs.lengths, shapes * 150).dtype == np.uint16
    for plan in (BucketedPlan(pairs.lengths, shapes, 0), PackedPlan(pairs.lengths, shapes[1], 0)):
        assert {batch.pairs.dtype for batch in plan.epoch(0)} == {np.dtype(np.int32)}
    assert (index_dtype(2**31 - 1), index_dtype(2**31)) == (np.int32, np.int64)


def test_a_pair_longer_than_a_packed_row_is_explained():
    with pytest.raises(ConfigError, match=r"batching.row_length \(32\) is shorter than the longest pair \(40 tokens"):
        packed_shape(LengthSummary.of(np.array([[40, 3], [4, 4]])), BatchingConfig(True, row_length=32))


def test_packing_for_a_model_that_cannot_is_explained():
    with pytest.raises(ConfigError, match=r"batching.packing: true .* model.kind rnn .* Set batching.packing: false"):
        from_dict(Config, {"model": {"kind": "rnn"}, "batching": {"packing": True}})
