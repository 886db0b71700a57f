"""Batches by token budget in few fixed shapes, and epochs planned ahead.

Every shape is one compiled program, so there are few; every padded token costs as much as a real one, so they are
chosen from the lengths that the corpus has. An epoch is planned whole from (seed, epoch): the position in the data is
then two integers, exact, and independent of the number of devices and processes.
"""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flax_transformer.data.tokenizer import TokenizedText
from flax_transformer.errors import ConfigError, InputError
from flax_transformer.shapes import Batch

# Rows of a batch divide by this whatever the number of devices, so that the plan does not depend on it.
ROW_MULTIPLE = 8
# Lengths are rounded up to this, so that a corpus with one long line more does not change a shape.
LENGTH_MULTIPLE = 4


@dataclass(frozen=True)
class BatchingConfig:
    """How sentence pairs are put into batches.

    Attributes:
        tokens_per_batch: padded tokens of a batch at most, on the longer side.
        num_shapes: shapes to choose, each of which is compiled once.
    """

    tokens_per_batch: int = 4_096
    num_shapes: int = 4

    def __post_init__(self):
        if self.tokens_per_batch < 1 or self.num_shapes < 1:
            raise ConfigError(
                "batching.tokens_per_batch and batching.num_shapes must be at least 1, got "
                f"{self.tokens_per_batch} and {self.num_shapes}."
            )


class BatchShape(NamedTuple):
    """The fixed size of a batch."""

    rows: int
    source_length: int
    target_length: int


class Position(NamedTuple):
    """Where in the data a run is: the next batch to take."""

    epoch: int
    batch: int


class TokenizedPairs:
    """Tokenized sentence pairs that fit a model, in an order that never changes.

    Attributes:
        source, target: the two sides.
        kept: [number of pairs kept] indices into the original lines.
        num_empty: pairs dropped because a side is empty.
        num_too_long: pairs dropped because a side is beyond the model's maximum length.
    """

    def __init__(self, source: TokenizedText, target: TokenizedText, max_source_length: int, max_target_length: int):
        self.source = source
        self.target = target
        empty = (source.lengths == 1) | (target.lengths == 1)
        too_long = ~empty & ((source.lengths > max_source_length) | (target.lengths > max_target_length))
        self.num_empty = int(empty.sum())
        self.num_too_long = int(too_long.sum())
        self.kept = np.flatnonzero(~empty & ~too_long)
        if not len(self.kept):
            raise InputError(
                f"no sentence pair is left: of {len(empty)} pairs {self.num_empty} have an empty side and "
                f"{self.num_too_long} are longer than model.max_source_length ({max_source_length}) or "
                f"model.max_target_length ({max_target_length}) tokens. Check the files, or raise the limits."
            )

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all ids and lengths: positions in the data mean the same only while it is the same."""
        digest = hashlib.sha256()
        for array in (self.source.ids, self.source.offsets, self.target.ids, self.target.offsets, self.kept):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    @property
    def lengths(self) -> np.ndarray:
        """[number of pairs, 2], source and target lengths with the end token."""
        return np.stack([self.source.lengths[self.kept], self.target.lengths[self.kept]], axis=1)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def choose_shapes(lengths: np.ndarray, config: BatchingConfig) -> list[BatchShape]:
    """Returns at most `num_shapes` shapes, shortest first, with the least padding that so many shapes allow.

    Pairs are ordered by their longer side; a shape holds a range of that order and is as long, on each side, as the
    longest pair in it. Of all cuts into ranges, dynamic programming finds the one with the fewest padded tokens.

    Args:
        lengths: [number of pairs, 2].
        config: budget and number of shapes.

    Raises:
        ConfigError: the budget does not hold `ROW_MULTIPLE` of the longest pairs.
    """
    longer = (lengths.max(axis=1) + LENGTH_MULTIPLE - 1) // LENGTH_MULTIPLE  # one group for each rounded length
    groups = np.unique(longer)
    counts = np.array([(longer == g).sum() for g in groups])
    longest = np.array([lengths[longer == g].max(axis=0) for g in groups])  # [groups, 2]
    rounded = (longest + LENGTH_MULTIPLE - 1) // LENGTH_MULTIPLE * LENGTH_MULTIPLE

    num_groups = len(groups)
    num_shapes = min(config.num_shapes, num_groups)
    # least[k][j]: fewest padded tokens for the first j groups in k shapes; cut[k][j]: where the last shape begins.
    least = np.full((num_shapes + 1, num_groups + 1), np.inf)
    cut = np.zeros((num_shapes + 1, num_groups + 1), np.int64)
    least[0, 0] = 0
    for j in range(1, num_groups + 1):
        sizes = [rounded[i:j].max(axis=0).sum() * counts[i:j].sum() for i in range(j)]
        for k in range(1, num_shapes + 1):
            totals = least[k - 1, :j] + np.array(sizes)
            cut[k, j] = int(totals.argmin())
            least[k, j] = totals[cut[k, j]]
    shapes: list[BatchShape] = []
    k, j = int(least[:, num_groups].argmin()), num_groups
    while j:
        i = int(cut[k, j])
        source_length, target_length = (int(n) for n in rounded[i:j].max(axis=0))
        rows = config.tokens_per_batch // max(source_length, target_length) // ROW_MULTIPLE * ROW_MULTIPLE
        if rows < ROW_MULTIPLE:
            needed = ROW_MULTIPLE * max(source_length, target_length)
            raise ConfigError(
                f"batching.tokens_per_batch ({config.tokens_per_batch}) is too small: a batch has at least "
                f"{ROW_MULTIPLE} rows, and the longest pair has {int(lengths.max())} tokens on one side. Give at "
                f"least {needed}, or lower model.max_source_length and model.max_target_length to drop such pairs."
            )
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
    return fits.argmax(axis=0)


class EpochPlan:
    """The batches of every epoch, as functions of the seed.

    Args:
        lengths: [number of pairs, 2].
        shapes: as `choose_shapes` gives them.
        seed: of the shuffle; None leaves the pairs in order of length (for evaluation).
    """

    def __init__(self, lengths: np.ndarray, shapes: list[BatchShape], seed: int | None):
        self.shapes = shapes
        self.seed = seed
        self._shape_of_pair = assign_shapes(lengths, shapes)

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches; the last of each shape may be part full."""
        counts = np.bincount(self._shape_of_pair, minlength=len(self.shapes))
        return sum(-(-int(n) // s.rows) for n, s in zip(counts, self.shapes, strict=True))

    def epoch(self, epoch: int) -> list[tuple[BatchShape, np.ndarray]]:
        """Returns each batch of an epoch as its shape and the indices of its pairs; every pair occurs once."""
        rng = None if self.seed is None else np.random.default_rng((self.seed, epoch))
        num_pairs = len(self._shape_of_pair)
        order = np.arange(num_pairs) if rng is None else rng.permutation(num_pairs)
        batches = []
        for index, shape in enumerate(self.shapes):
            members = order[self._shape_of_pair[order] == index]
            batches += [(shape, members[i : i + shape.rows]) for i in range(0, len(members), shape.rows)]
        return batches if rng is None else [batches[i] for i in rng.permutation(len(batches))]


def _padded(text: TokenizedText, sentences: np.ndarray, rows: int, length: int) -> tuple[np.ndarray, ...]:
    """Returns tokens, positions and segments [rows, length] of the sentences, then rows of padding."""
    lengths = np.zeros(rows, np.int64)
    lengths[: len(sentences)] = text.lengths[sentences]
    starts = np.zeros(rows, np.int64)
    starts[: len(sentences)] = text.offsets[sentences]
    columns = np.arange(length)[None, :]
    real = columns < lengths[:, None]
    tokens = np.where(real, text.ids[np.where(real, starts[:, None] + columns, 0)], 0).astype(np.int32)
    positions = np.where(real, columns, 0).astype(np.int32)
    return tokens, positions, real.astype(np.int32)


def make_batch(pairs: TokenizedPairs, shape: BatchShape, indices: np.ndarray) -> Batch:
    """Returns the batch of the given pairs (indices into the kept ones), filled up with rows of padding."""
    lines = pairs.kept[indices]
    return Batch(
        *_padded(pairs.source, lines, shape.rows, shape.source_length),
        *_padded(pairs.target, lines, shape.rows, shape.target_length),
    )
