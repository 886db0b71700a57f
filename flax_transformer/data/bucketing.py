"""Batches with one pair a row, in few fixed shapes.

Every shape is one compiled program, so there are few; every padded token costs as much as a real one, so they are
chosen from the lengths that the corpus has.
"""

from collections.abc import Callable

import numpy as np

from flax_transformer.data.batching import (
    LENGTH_MULTIPLE,
    ROW_MULTIPLE,
    BatchShape,
    LengthSummary,
    Mixture,
    PlannedBatch,
    rows_within,
)
from flax_transformer.errors import InputError


def choose_shapes(
    lengths: LengthSummary,
    most: int,
    tokens_per_batch: int,
    multiple: int = ROW_MULTIPLE,
    place: Callable[[], str] | None = None,
) -> list[BatchShape]:
    """Returns at most `most` shapes, shortest first, with the least padding that so many shapes allow.

    Pairs are ordered by their longer side; a shape holds a range of that order and is as long, on each side, as the
    longest pair in it. Of all cuts into ranges, dynamic programming finds the one with the fewest padded tokens.

    Args:
        lengths: of all pairs.
        most: number of shapes.
        tokens_per_batch: padded tokens at most, on the longer side.
        multiple: rows divide by this.
        place: returns where the longest pair stands, for messages.

    Raises:
        ConfigError: the budget does not hold `multiple` of the longest pairs.
    """
    groups = np.flatnonzero(lengths.counts)
    counts, longest = lengths.counts[groups], lengths.longest[groups]
    rounded = (longest + LENGTH_MULTIPLE - 1) // LENGTH_MULTIPLE * LENGTH_MULTIPLE

    num_groups = len(groups)
    num_buckets = min(most, num_groups)
    # least[k][j]: fewest padded tokens for the first j groups in k shapes; cut[k][j]: where the last shape begins.
    least = np.full((num_buckets + 1, num_groups + 1), np.inf)
    cut = np.zeros((num_buckets + 1, num_groups + 1), np.int64)
    least[0, 0] = 0
    for j in range(1, num_groups + 1):
        sizes = [rounded[i:j].max(axis=0).sum() * counts[i:j].sum() for i in range(j)]
        for k in range(1, num_buckets + 1):
            totals = least[k - 1, :j] + np.array(sizes)
            cut[k, j] = int(totals.argmin())
            least[k, j] = totals[cut[k, j]]
    shapes: list[BatchShape] = []
    k, j = int(least[:, num_groups].argmin()), num_groups
    while j:
        i = int(cut[k, j])
        source_length, target_length = (int(n) for n in rounded[i:j].max(axis=0))
        rows = rows_within(tokens_per_batch, max(source_length, target_length), multiple, None if shapes else place)
        shapes.append(BatchShape(rows, source_length, target_length))
        k, j = k - 1, i
    return shapes[::-1]


def assign_shapes(lengths: np.ndarray, shapes: list[BatchShape]) -> np.ndarray:
    """Returns [number of pairs], the index of the first shape that holds each pair.

    Raises:
        InputError: a pair that no shape holds.
    """
    fits = np.stack([(lengths[:, 0] <= s.source_length) & (lengths[:, 1] <= s.target_length) for s in shapes])
    if not fits.any(axis=0).all():
        raise InputError(
            f"pair {int(np.flatnonzero(~fits.any(axis=0))[0])} is longer than the largest batch shape {shapes[-1]}."
        )
    return fits.argmax(axis=0).astype(np.min_scalar_type(len(shapes)))


class BucketedPlan:
    """Batches with one pair a row, each pair in the smallest shape that holds it; satisfies `Plan`.

    Args:
        lengths: [number of pairs, 2].
        shapes: as `choose_shapes` gives them.
        seed: of the shuffle; None leaves the pairs of each shape in order of the text (for evaluation).
        mixture: of the corpora that the pairs come from; a shuffled plan has one.
    """

    def __init__(self, lengths: np.ndarray, shapes: list[BatchShape], seed: int | None, mixture: Mixture | None = None):
        self.shapes = shapes
        self.seed = seed
        self.mixture = mixture or Mixture((len(lengths),), (1.0,))
        self._shape_of_pair = assign_shapes(lengths, shapes)

    def epoch(self, epoch: int) -> list[PlannedBatch]:
        """Returns the batches of an epoch; the last of each shape may be part full."""
        if self.seed is None:
            rng, order = None, np.arange(len(self._shape_of_pair))
        else:
            rng = np.random.default_rng((self.seed, epoch))
            order = rng.permutation(self.mixture.pairs_of_epoch(self.seed, epoch))
        batches = []
        rows = np.arange(max(shape.rows for shape in self.shapes))
        for index, shape in enumerate(self.shapes):
            members = order[self._shape_of_pair[order] == index]
            for start in range(0, len(members), shape.rows):
                pairs = members[start : start + shape.rows]
                batches.append(PlannedBatch(shape, pairs, rows[: len(pairs)]))
        return batches if rng is None else [batches[i] for i in rng.permutation(len(batches))]
