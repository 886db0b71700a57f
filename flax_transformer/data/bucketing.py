"""Batches with one pair in each row, in a few fixed shapes.

Each shape needs a compiled program, so there are few shapes. Each padded token costs as much as a real one, so the
shapes are chosen from the lengths in the corpus.
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
    """Returns at most `most` shapes, shortest first, with the least padding.

    Pairs are ordered by the length of their longer side. Each shape holds a range of that order. Its length on each
    side is that of the longest pair in the range. Dynamic programming finds the ranges with the fewest padded tokens.

    Args:
        lengths: summary of all pairs.
        most: largest number of shapes.
        tokens_per_batch: most padded tokens of a batch, on the longer side.
        multiple: the number of rows is a multiple of this.
        place: returns the place of the longest pair, for messages.

    Raises:
        ConfigError: the budget allows fewer than `multiple` rows of the longest shape.
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
    """Returns [number of pairs]: for each pair, the index of the first shape that holds it.

    Raises:
        InputError: no shape holds a pair.
    """
    fits = np.stack([(lengths[:, 0] <= s.source_length) & (lengths[:, 1] <= s.target_length) for s in shapes])
    if not fits.any(axis=0).all():
        raise InputError(
            f"pair {int(np.flatnonzero(~fits.any(axis=0))[0])} is longer than the largest batch shape {shapes[-1]}."
        )
    return fits.argmax(axis=0).astype(np.min_scalar_type(len(shapes)))


class BucketedPlan:
    """Batches with one pair in each row; satisfies `Plan`. Each pair goes to the first shape that holds it.

    Args:
        lengths: [number of pairs, 2] tokens.
        shapes: result of `choose_shapes`.
        seed: seed of the shuffle; None leaves the pairs of each shape in the order of the text (for evaluation).
        mixture: corpora of the pairs, for a shuffled plan; None means one corpus of weight 1.
    """

    def __init__(self, lengths: np.ndarray, shapes: list[BatchShape], seed: int | None, mixture: Mixture | None = None):
        self.shapes = shapes
        self.seed = seed
        self.mixture = mixture or Mixture((len(lengths),), (1.0,))
        self._shape_of_pair = assign_shapes(lengths, shapes)

    def epoch(self, epoch: int) -> list[PlannedBatch]:
        """Returns the batches of an epoch. For each shape, one batch may be partly filled."""
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
