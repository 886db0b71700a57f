"""Batches in order, from any position on."""

from collections.abc import Iterator

import numpy as np

from flax_transformer.data.batching import (
    LENGTH_MULTIPLE,
    ROW_MULTIPLE,
    BatchingConfig,
    Mixture,
    Plan,
    Position,
    TokenizedPairs,
    make_batch,
    round_up,
)
from flax_transformer.data.bucketing import BucketedPlan, choose_shapes
from flax_transformer.data.packing import PackedPlan, packed_shape
from flax_transformer.shapes import Batch


def training_plan(lengths: np.ndarray, config: BatchingConfig, seed: int, mixture: Mixture | None = None) -> Plan:
    """Returns shuffled batches in the form that the configuration names.

    Args:
        lengths: [number of pairs, 2].
        config: form and budget.
        seed: of the shuffle.
        mixture: of the corpora that the pairs come from; one of weight 1 when left out.

    Raises:
        ConfigError: the budget is too small for the longest pairs.
    """
    if config.form == "packed":
        return PackedPlan(lengths, packed_shape(lengths, config), seed, mixture)
    shapes = choose_shapes(lengths, config.num_shapes, config.tokens_per_batch, config.micro_batches)
    return BucketedPlan(lengths, shapes, seed, mixture)


def evaluation_plan(lengths: np.ndarray, config: BatchingConfig, row_multiple: int = 1) -> Plan:
    """Returns batches of one shape in order of the text, whatever the form of training, about as large as one piece.

    Rows are a multiple of `row_multiple`, the number of parts that they are split into.
    """
    budget = max(config.tokens_per_batch // config.micro_batches, ROW_MULTIPLE * int(lengths.max() + LENGTH_MULTIPLE))
    (shape,) = choose_shapes(lengths, 1, budget)
    return BucketedPlan(lengths, [shape._replace(rows=round_up(shape.rows, row_multiple))], None)


def training_batches(pairs: TokenizedPairs, plan: Plan, start: Position) -> Iterator[tuple[Batch, Position]]:
    """Yields batches for ever, from `start` on, each with the position after it (what a checkpoint keeps)."""
    epoch, first = start
    while True:
        batches = plan.epoch(epoch)
        for index in range(first, len(batches)):
            last = index + 1 == len(batches)
            yield make_batch(pairs, batches[index]), Position(epoch + 1, 0) if last else Position(epoch, index + 1)
        epoch, first = epoch + 1, 0


def evaluation_batches(pairs: TokenizedPairs, plan: Plan) -> Iterator[Batch]:
    """Yields every pair once."""
    for planned in plan.epoch(0):
        yield make_batch(pairs, planned)
