"""Batches in order, from any position on."""

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
    """Several plans with the same shapes, one for each variant of the pairs; the epochs take turns through them.

    Args:
        shapes: every shape that a batch may have.
        num_variants: of the pairs.
        make: returns the plan of a variant by its number. It is made for each epoch, since it holds something of every
            pair, and there may be many variants of many pairs.
    """

    def __init__(self, shapes: list[BatchShape], num_variants: int, make: Callable[[int], Plan]):
        self.shapes = shapes
        self._num_variants = num_variants
        self._make = make
        self._newest: tuple[int, list[PlannedBatch]] | None = None

    def epoch(self, epoch: int) -> list[PlannedBatch]:
        """Returns the batches of an epoch, as its variant plans them; the newest are kept for who asks again."""
        newest = self._newest
        if newest is None or newest[0] != epoch:
            newest = self._newest = epoch, self._make(epoch % self._num_variants).epoch(epoch)
        return newest[1]


def training_plan(variants: Sequence[TokenizedPairs], config: BatchingConfig, seed: int) -> Plan:
    """Returns shuffled batches in the form that the configuration names.

    Args:
        variants: the training pairs, once or in several segmentations.
        config: form and budget.
        seed: of the shuffle.

    Raises:
        ConfigError: the budget is too small for the longest pairs.
    """
    first, *others = (LengthSummary.of(pairs.lengths) for pairs in variants)
    lengths = sum(others, first)

    def place() -> str:  # of the longest pair
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
    """Returns batches of one shape in order of the text, whatever the form of training, about as large as one piece.

    Rows are a multiple of `row_multiple`, the number of parts that they are split into.
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
    """Yields batches for ever, from `start` on, each with the position after it (what a checkpoint keeps).

    In the middle of an epoch the next one is planned in the background: to pack a hundred million pairs takes minutes.
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
    """Starts to plan an epoch in a thread, which a program that ends does not wait for; returns what waits for it."""
    made: Future[list[PlannedBatch]] = Future()

    def run() -> None:
        try:
            made.set_result(plan.epoch(epoch))
        except BaseException as error:  # whoever waits gets it
            made.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return made.result


def evaluation_batches(pairs: TokenizedPairs, plan: Plan) -> Iterator[Batch]:
    """Yields every pair once."""
    for planned in plan.epoch(0):
        yield make_batch(pairs, planned)
