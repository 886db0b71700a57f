"""Batches with several pairs in each row, separated by segments: one shape, hardly any padding.

References:
    Krell et al. 2021, "Efficient Sequence Packing without Cross-contamination" (segments and restarting positions).
"""

from collections.abc import Callable, Iterator

import numpy as np

from flax_transformer.data.batching import (
    LENGTH_MULTIPLE,
    BatchingConfig,
    BatchShape,
    LengthSummary,
    Mixture,
    PlannedBatch,
    index_dtype,
    round_up,
    rows_within,
)
from flax_transformer.errors import ConfigError

# Number of rows that are filled at the same time. More rows would leave less padding, but their pairs would come from
# farther apart in the order.
OPEN_ROWS = 32
# Number of pairs whose lengths are converted to Python's integers at a time.
PAIRS_AT_ONCE = 65_536


def packed_shape(lengths: LengthSummary, config: BatchingConfig, place: Callable[[], str] | None = None) -> BatchShape:
    """Returns the one shape of packed batches.

    A row has `batching.row_length` tokens on the side with more tokens in the corpus. The other side is shorter in
    proportion, but holds at least its longest sentence.

    Args:
        lengths: summary of all pairs.
        config: size of a batch and length of a row.
        place: returns the place of the longest pair, for messages.

    Raises:
        ConfigError: a pair is longer than a row, or the budget allows too few rows (see `rows_within`).
    """
    longest = lengths.longest.max(axis=0)
    if longest.max() > config.row_length:
        where = "" if place is None else f", {place()}"
        raise ConfigError(
            f"batching.row_length ({config.row_length}) is shorter than the longest pair ({longest.max()} tokens on "
            f"one side{where}). Raise it, or lower model.max_source_length and model.max_target_length to drop such "
            "pairs."
        )
    share = lengths.total / lengths.total.max()
    sides = [
        max(round_up(int(config.row_length * s), LENGTH_MULTIPLE), int(n)) for s, n in zip(share, longest, strict=True)
    ]
    return BatchShape(rows_within(config.tokens_per_batch, max(sides), config.rows_divide_by), *sides)


def pack(lengths: np.ndarray, shape: BatchShape) -> np.ndarray:
    """Returns [number of pairs], the row of each pair. Rows are numbered from 0 in the order in which they are closed.

    Pairs are taken in order, and placed by best fit. Each pair goes into the fullest of `OPEN_ROWS` open rows with room
    on both sides. If no row has room, the fullest row is closed and a new one is opened.

    Args:
        lengths: [number of pairs, 2] tokens.
        shape: size of a batch; a row holds `source_length` and `target_length` tokens.
    """
    # Plain integers: over so few rows a loop is faster than calls of NumPy (docs/lab_book.md, "Packing by best fit").
    source_room, target_room = [shape.source_length] * OPEN_ROWS, [shape.target_length] * OPEN_ROWS
    members: list[list[int]] = [[] for _ in range(OPEN_ROWS)]
    row_of_pair = np.empty(len(lengths), index_dtype(len(lengths)))
    closed = 0
    for pair, (source, target) in enumerate(_plain(lengths)):
        chosen, least = -1, shape.source_length + shape.target_length + 1
        for row in range(OPEN_ROWS):
            if source <= source_room[row] and target <= target_room[row]:
                room = source_room[row] + target_room[row]
                if room < least:
                    chosen, least = row, room
        if chosen < 0:
            chosen = min(range(OPEN_ROWS), key=lambda row: source_room[row] + target_room[row])
            row_of_pair[members[chosen]] = closed
            closed += 1
            members[chosen] = []
            source_room[chosen], target_room[chosen] = shape.source_length, shape.target_length
        members[chosen].append(pair)
        source_room[chosen] -= source
        target_room[chosen] -= target
    for last in filter(None, members):
        row_of_pair[last] = closed
        closed += 1
    return row_of_pair


def _plain(lengths: np.ndarray) -> Iterator[list[int]]:
    """Yields the rows of an array as lists of integers; `PAIRS_AT_ONCE` of them are in memory at a time."""
    for start in range(0, len(lengths), PAIRS_AT_ONCE):
        yield from lengths[start : start + PAIRS_AT_ONCE].tolist()


class PackedPlan:
    """Batches of packed rows; satisfies `Plan`.

    Args:
        lengths: [number of pairs, 2] tokens.
        shape: result of `packed_shape`.
        seed: seed of the shuffle.
        mixture: corpora of the pairs; None means one corpus of weight 1.
    """

    def __init__(self, lengths: np.ndarray, shape: BatchShape, seed: int, mixture: Mixture | None = None):
        self.lengths = lengths
        self.mixture = mixture or Mixture((len(lengths),), (1.0,))
        self.shapes = [shape]
        self.seed = seed

    def epoch(self, epoch: int) -> list[PlannedBatch]:
        """Returns the batches of an epoch; one of them may be partly filled."""
        (shape,) = self.shapes
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(self.mixture.pairs_of_epoch(self.seed, epoch))
        rows = pack(self.lengths[order], shape)
        by_row = np.argsort(rows, kind="stable")
        order, rows = order[by_row], rows[by_row]
        cuts = np.searchsorted(rows, np.arange(0, rows[-1] + 1, shape.rows))
        batches = [
            PlannedBatch(shape, pairs, of_pairs - of_pairs[0])
            for pairs, of_pairs in zip(np.split(order, cuts[1:]), np.split(rows, cuts[1:]), strict=True)
        ]
        return [batches[i] for i in rng.permutation(len(batches))]
