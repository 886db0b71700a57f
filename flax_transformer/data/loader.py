"""Batches in order, from any position on."""

from collections.abc import Iterator, Sequence

import numpy as np

from flax_transformer.data.batching import (
    LENGTH_MULTIPLE,
    ROW_MULTIPLE,
    BatchingConfig,
    BatchShape,
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
    """Several plans with the same shapes, one for each variant of the pairs; the epochs take turns through them."""

    def __init__(self, plans: Sequence[Plan]):
        self._plans = plans

    @property
    def shapes(self) -> list[BatchShape]:
        """Every shape that a batch may have."""
        return self._plans[0].shapes

    def epoch(self, epoch: int) -> list[PlannedBatch]:
        """Returns the batches of an epoch, as its variant plans them."""
        return self._plans[epoch % len(self._plans)].epoch(epoch)


def training_plan(variants: Sequence[TokenizedPairs], config: BatchingConfig, seed: int) -> Plan:
    """Returns shuffled batches in the form that the configuration names.

    Args:
        variants: the training pairs, once or in several segmentations.
        config: form and budget.
        seed: of the shuffle.

    Raises:
        ConfigError: the budget is too small for the longest pairs.
    """
    lengths = np.concatenate([pairs.lengths for pairs in variants])

    def place(index: int) -> str:
        starts = np.cumsum([0, *(len(pairs) for pairs in variants)])
        variant = int(np.searchsorted(starts, index, side="right")) - 1
        return variants[variant].place(index - int(starts[variant]))

    if config.form == "packed":
        row = packed_shape(lengths, config, place)
        return AlternatingPlan([PackedPlan(pairs.lengths, row, seed, pairs.mixture) for pairs in variants])
    shapes = choose_shapes(lengths, config.num_shapes, config.tokens_per_batch, config.micro_batches, place)
    return AlternatingPlan([BucketedPlan(pairs.lengths, shapes, seed, pairs.mixture) for pairs in variants])


def evaluation_plan(lengths: np.ndarray, config: BatchingConfig, row_multiple: int = 1) -> Plan:
    """Returns batches of one shape in order of the text, whatever the form of training, about as large as one piece.

    Rows are a multiple of `row_multiple`, the number of parts that they are split into.
    """
    budget = max(config.tokens_per_batch // config.micro_batches, ROW_MULTIPLE * int(lengths.max() + LENGTH_MULTIPLE))
    (shape,) = choose_shapes(lengths, 1, budget)
    return BucketedPlan(lengths, [shape._replace(rows=round_up(shape.rows, row_multiple))], None)


def training_batches(
    variants: Sequence[TokenizedPairs], plan: Plan, start: Position
) -> Iterator[tuple[Batch, Position]]:
    """Yields batches for ever, from `start` on, each with the position after it (what a checkpoint keeps)."""
    epoch, first = start
    while True:
        batches, pairs = plan.epoch(epoch), variants[epoch % len(variants)]
        for index in range(first, len(batches)):
            last = index + 1 == len(batches)
            yield make_batch(pairs, batches[index]), Position(epoch + 1, 0) if last else Position(epoch, index + 1)
        epoch, first = epoch + 1, 0


def evaluation_batches(pairs: TokenizedPairs, plan: Plan) -> Iterator[Batch]:
    """Yields every pair once."""
    for planned in plan.epoch(0):
        yield make_batch(pairs, planned)
