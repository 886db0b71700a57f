"""Batches in order, from any position on."""

from collections.abc import Iterator

from flax_transformer.data.batching import EpochPlan, Position, TokenizedPairs, make_batch
from flax_transformer.shapes import Batch


def training_batches(pairs: TokenizedPairs, plan: EpochPlan, start: Position) -> Iterator[tuple[Batch, Position]]:
    """Yields batches for ever, from `start` on, each with the position after it (what a checkpoint keeps)."""
    epoch, first = start
    while True:
        batches = plan.epoch(epoch)
        for index in range(first, len(batches)):
            last = index + 1 == len(batches)
            yield make_batch(pairs, *batches[index]), Position(epoch + 1, 0) if last else Position(epoch, index + 1)
        epoch, first = epoch + 1, 0


def evaluation_batches(pairs: TokenizedPairs, plan: EpochPlan) -> Iterator[Batch]:
    """Yields every pair once."""
    for shape, indices in plan.epoch(0):
        yield make_batch(pairs, shape, indices)
