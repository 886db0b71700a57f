"""Iterators over batches, from any position in the data."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

import numpy as np

from flax_transformer.data.batching import (
    LENGTH_MULTIPLE,
    ROW_MULTIPLE,
    BatchingConfig,
    BatchShape,
    LengthSummary,
    Plan,
    PlannedBatch,
    Position,
    TokenizedPairs,
    make_batch,
    round_up,
)
from flax_transformer.data.bucketing import BucketedPlan, choose_shapes
from flax_transformer.data.packing import PackedPlan, packed_shape
from flax_transformer.shapes import Batch


class AlternatingPlan:
    """One plan for each variant of the pairs, all with the same shapes. The epochs use the variants in turn.

    Args:
        shapes: all shapes that a batch may have.
        num_variants: number of variants.
        make: returns the plan of a variant, given its number. It is called anew for each epoch, because the plans of
            all variants may need much memory.
    """

    def __init__(self, shapes: list[BatchShape], num_variants: int, make: Callable[[int], Plan]):
        self.shapes = shapes
        self._num_variants = num_variants
        self._make = make
        self._newest: tuple[int, list[PlannedBatch]] | None = None

    def epoch(self, epoch: int) -> list[PlannedBatch]:
        """Returns the batches of an epoch, from the plan of its variant. The newest result is cached."""
        newest = self._newest
        if newest is None or newest[0] != epoch:
            newest = self._newest = epoch, self._make(epoch % self._num_variants).epoch(epoch)
        return newest[1]


def training_plan(variants: Sequence[TokenizedPairs], config: BatchingConfig, seed: int) -> Plan:
    """Returns the plan of shuffled training batches, packed or bucketed.

    Args:
        variants: the training pairs, in one or several segmentations.
        config: form and size of the batches.
        seed: seed of the shuffle.

    Raises:
        ConfigError: the budget is too small for the longest pairs.
    """
    first, *others = (LengthSummary.of(pairs.lengths) for pairs in variants)
    lengths = sum(others, first)

    def place() -> str:  # the place of the longest pair
        longest = [pairs.lengths.max(axis=1).max() for pairs in variants]
        pairs = variants[int(np.argmax(longest))]
        return pairs.place(int(pairs.lengths.max(axis=1).argmax()))

    if config.packing:
        row = packed_shape(lengths, config, place)
        shapes = [row]

        def make(variant: int) -> Plan:
            pairs = variants[variant]
            return PackedPlan(pairs.lengths, row, seed, pairs.mixture)
    else:
        shapes = choose_shapes(lengths, config.num_buckets, config.tokens_per_batch, config.rows_divide_by, place)

        def make(variant: int) -> Plan:
            pairs = variants[variant]
            return BucketedPlan(pairs.lengths, shapes, seed, pairs.mixture)

    return AlternatingPlan(shapes, len(variants), make)


def evaluation_plan(lengths: np.ndarray, config: BatchingConfig, row_multiple: int = 1) -> Plan:
    """Returns a plan with one shape, in the order of the text, for packed and bucketed training alike.

    A batch is about as large as a micro-batch of training. Its number of rows is a multiple of `row_multiple`, the
    number of shards of a batch.
    """
    budget = max(
        config.tokens_per_batch // config.gradient_accumulation_steps,
        ROW_MULTIPLE * int(lengths.max() + LENGTH_MULTIPLE),
    )
    (shape,) = choose_shapes(LengthSummary.of(lengths), 1, budget)
    return BucketedPlan(lengths, [shape._replace(rows=round_up(shape.rows, row_multiple))], None)


def training_batches(
    variants: Sequence[TokenizedPairs], plan: Plan, start: Position
) -> Iterator[tuple[Batch, Position]]:
    """Yields batches without end from `start` on, each with the position after it, which a checkpoint stores.

    In the middle of an epoch a thread begins to plan the next epoch. Packing a large corpus takes long
    (docs/lab_book.md, "Epochs planned in the background").
    """
    epoch, first = start
    batches = plan.epoch(epoch)
    while True:
        pairs, planned_ahead = variants[epoch % len(variants)], None
        for index in range(first, len(batches)):
            if planned_ahead is None and 2 * index >= len(batches) - 1:
                planned_ahead = _planned_in_background(plan, epoch + 1)
            last = index + 1 == len(batches)
            yield make_batch(pairs, batches[index]), Position(epoch + 1, 0) if last else Position(epoch, index + 1)
        assert planned_ahead is not None, "an epoch has a last batch, and a position is never behind it"
        batches = planned_ahead()
        epoch, first = epoch + 1, 0


def _planned_in_background(plan: Plan, epoch: int) -> Callable[[], list[PlannedBatch]]:
    """Starts to plan an epoch in a daemon thread. Returns a function that waits for the batches and returns them."""
    made: Future[list[PlannedBatch]] = Future()

    def run() -> None:
        try:
            made.set_result(plan.epoch(epoch))
        except BaseException as error:  # the waiting caller gets it
            made.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return made.result


def evaluation_batches(pairs: TokenizedPairs, plan: Plan) -> Iterator[Batch]:
    """Yields batches that contain every pair once."""
    for planned in plan.epoch(0):
        yield make_batch(pairs, planned)
