"""Batches of sentence pairs: their plan and their arrays.

A plan assigns the pairs of an epoch to batches before the epoch starts (`data/bucketing.py`, `data/packing.py`). Two
integers, the epoch and the batch, then give an exact position in the data. The position does not depend on the number
of devices or processes.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from flax_transformer.data.filters import TOO_LONG, FilterConfig, PairMarks, filter_pairs
from flax_transformer.data.parallel_text import ParallelText
from flax_transformer.data.tokenizer import TokenizedText
from flax_transformer.errors import ConfigError, InputError, check_fields
from flax_transformer.shapes import Batch

# Default of `batching.row_multiple`. It does not depend on the number of devices, so neither does the plan.
ROW_MULTIPLE = 8
# Lengths are rounded up to a multiple of this. So a slightly longer line rarely changes a shape.
LENGTH_MULTIPLE = 4


@dataclass(frozen=True)
class BatchingConfig:
    """Settings of the batches of a training.

    Attributes:
        packing: whether a row holds several pairs; recurrent models have no packing. Packed batches have one shape and
            hardly any padding, but attention computes whole rows.
        tokens_per_batch: maximum number of tokens of a batch, padding included, on its longer side.
        num_buckets: maximum number of batch shapes without packing. Each shape is compiled once.
        row_length: number of tokens of a packed row, padding included, on its longer side.
        gradient_accumulation_steps: number of micro-batches that a batch is divided into. A step computes them one
            after the other, in less memory, and sums their gradients. The update is that of the whole batch.
        row_multiple: number that divides the rows of every micro-batch, a multiple of mesh.data * mesh.fsdp. The
            batches do not depend on the mesh, so a run can be resumed on another number of devices.
    """

    packing: bool = False
    tokens_per_batch: int = 4_096
    num_buckets: int = 4
    row_length: int = 256
    gradient_accumulation_steps: int = 1
    row_multiple: int = ROW_MULTIPLE

    def __post_init__(self):
        check_fields("batching", self)
        for name in ("tokens_per_batch", "num_buckets", "row_length", "gradient_accumulation_steps", "row_multiple"):
            if getattr(self, name) < 1:
                raise ConfigError(f"batching.{name} must be at least 1, got {getattr(self, name)}.")

    @property
    def rows_divide_by(self) -> int:
        """Number that divides the rows of every batch, so that `row_multiple` divides those of every micro-batch."""
        return self.row_multiple * self.gradient_accumulation_steps


class BatchShape(NamedTuple):
    """The fixed size of a batch."""

    rows: int
    source_length: int
    target_length: int


class Position(NamedTuple):
    """A position in the data: the next batch of a run."""

    epoch: int
    batch: int


@dataclass(frozen=True)
class Mixture:
    """Corpora in a fixed order, each with a weight.

    Attributes:
        ends: for each corpus, the index after its last pair.
        weights: for each corpus, the number of times that an epoch contains its pairs; see `TextPart.weight`.
        names: names of the corpora in messages. They are not compared, because files may be moved.
    """

    ends: tuple[int, ...]
    weights: tuple[float, ...]
    names: tuple[str, ...] = field(default=(), compare=False, repr=False)

    def name_of(self, corpus: int) -> str:
        """Returns the name of a corpus in messages; `corpus` is its 0-based number."""
        number = f"corpus {corpus + 1} of {len(self.ends)}"
        if not self.names:
            return number
        return self.names[corpus] if len(self.ends) == 1 else f"{self.names[corpus]} ({number})"

    def pairs_of_epoch(self, seed: int, epoch: int) -> np.ndarray:
        """Returns the pairs of an epoch, corpus by corpus, the same at every call.

        The fraction of a weight takes pairs from a permutation of the corpus. Each epoch continues where the epoch
        before it stopped. A new permutation begins when all pairs have been taken. So every pair occurs once before any
        pair occurs twice.

        Variants of the text that keep different numbers of pairs have different permutations (see
        `SubwordSamplingConfig`).
        """
        dtype = index_dtype(self.ends[-1])
        chosen, start = [], 0
        for corpus, (end, weight) in enumerate(zip(self.ends, self.weights, strict=True)):
            whole, size = int(weight), end - start
            chosen.append(np.tile(np.arange(start, end, dtype=dtype), whole))
            first, last = (int(e * (weight - whole) * size + 0.5) for e in (epoch, epoch + 1))
            for cycle in range(first // size, -(-last // size)):
                # The third number is never 0, so this generator differs from the one that shuffles the epoch.
                permutation = np.random.default_rng((seed, cycle, corpus + 1)).permutation(size)
                share = permutation[max(first - cycle * size, 0) : last - cycle * size]
                chosen.append(share.astype(dtype) + start)
            start = end
        return np.concatenate(chosen)


def index_dtype(num: int) -> type[np.signedinteger]:
    """Returns the integer type for indices of `num` pairs: int32 if it is large enough, else int64."""
    return np.int32 if num < 2**31 else np.int64


class TokenizedPairs:
    """Tokenized sentence pairs within the length limits of a model, in a fixed order.

    Attributes:
        source, target: tokenized text of the two sides, including pairs that are left out.
        kept: [number of pairs kept] indices into the original lines.
        dropped: number of pairs left out for each reason.
        first_too_long: place of the first pair beyond the model's lengths; "" if there is none.
        mixture: corpora of the kept pairs.

    Args:
        source, target: tokenized text of the two sides.
        max_source_length, max_target_length: limits of the model, in tokens.
        filters: further reasons to leave out pairs; None adds none to "empty" and "too long".
        marks: properties of the text that filters read.
        mixture: corpora of the original lines; None means one corpus of weight 1.

    Raises:
        InputError: a corpus has no pair left, or gives less than one pair to an epoch.
    """

    def __init__(
        self,
        source: TokenizedText,
        target: TokenizedText,
        max_source_length: int,
        max_target_length: int,
        filters: FilterConfig | None = None,
        marks: PairMarks | None = None,
        mixture: Mixture | None = None,
    ):
        self.source = source
        self.target = target
        self._marks = marks
        lengths = np.stack([source.lengths, target.lengths], axis=1)
        filters = filters or FilterConfig()
        self._lines = mixture or Mixture((len(lengths),), (1.0,))
        reason, reasons = filter_pairs(
            lengths, marks, max_source_length, max_target_length, filters, self._lines.ends, self._lines.weights
        )
        self.dropped = _counts(reason, reasons)
        too_long = reason == 1 + reasons.index(TOO_LONG)
        self.first_too_long = self._place_of_line(int(too_long.argmax())) if too_long.any() else ""
        kept = np.flatnonzero(reason == 0)
        self.mixture = replace(self._lines, ends=tuple(np.searchsorted(kept, self._lines.ends).tolist()))
        self.kept = kept.astype(index_dtype(len(lengths)))
        for corpus, size in enumerate(np.diff((0, *self.mixture.ends)).tolist()):
            name, weight = self._lines.name_of(corpus), self._lines.weights[corpus]
            if 0 < size and weight * size < 1:
                raise InputError(
                    f"data.train_weights: {weight} of the {size} pairs of {name} is less than one pair an epoch. Give "
                    "it a larger weight, or leave it out."
                )
            if size == 0:
                lines = slice((0, *self._lines.ends)[corpus], self._lines.ends[corpus])
                counts = ", ".join(f"{n} {why}" for why, n in _counts(reason[lines], reasons).items())
                loosen = "" if filters == FilterConfig() else ", or loosen section 'filters'"
                raise InputError(
                    f"no sentence pair of {name} is left: of its {lines.stop - lines.start} pairs, left out were "
                    f"{counts}. A pair is empty if one side is empty. It is too long beyond model.max_source_length "
                    f"({max_source_length}) or model.max_target_length ({max_target_length}) tokens. Check the files, "
                    f"or raise the limits{loosen}."
                )

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of ids, lengths and mixture. A position is valid only for pairs with the same fingerprint."""
        digest = hashlib.sha256()
        if self.mixture != Mixture((len(self),), (1.0,)):
            digest.update(repr(self.mixture).encode())
        if any(weight % 1 for weight in self.mixture.weights):
            digest.update(b"slices of permutations")  # distinguishes it from an older scheme, whose positions differ
        for array in (self.source.ids, self.source.offsets, self.target.ids, self.target.offsets):
            digest.update(np.ascontiguousarray(array).data)
        digest.update(self.kept.astype(np.int64).data)
        return digest.hexdigest()

    @property
    def text_fingerprint(self) -> str:
        """SHA-256 of the text, whatever its segmentation. It is computed from the marks of the pairs."""
        assert self._marks is not None, "text that is cut in several ways comes from a cache, which has them"
        digest = hashlib.sha256(repr((self._lines.ends, self._lines.weights)).encode())
        digest.update(np.ascontiguousarray(self._marks.digests).data)
        return digest.hexdigest()

    @property
    def left_out(self) -> str:
        """The number of pairs left out for each reason, as in "1,203 empty, 2 identical"; "" if there are none.

        For pairs that are too long it also names the first one and the fields that set the limits.
        """
        where = {TOO_LONG: f" (the first: {self.first_too_long}; see model.max_source_length and max_target_length)"}
        return ", ".join(f"{n:,} {reason}{where.get(reason, '')}" for reason, n in self.dropped.items() if n)

    def place(self, pair: int) -> str:
        """Returns the place of a kept pair for messages: its corpus and its line there."""
        return self._place_of_line(int(self.kept[pair]))

    def _place_of_line(self, line: int) -> str:
        corpus = int(np.searchsorted(self._lines.ends, line, side="right"))
        return f"{self._lines.name_of(corpus)}, line {line - (0, *self._lines.ends)[corpus] + 1}"

    @property
    def lengths(self) -> np.ndarray:
        """[number of pairs, 2], source and target lengths, end tokens included."""
        sides = [self.source.lengths[self.kept], self.target.lengths[self.kept]]
        return np.stack(sides, axis=1, dtype=np.int32)


def _counts(reason: np.ndarray, reasons: list[str]) -> dict[str, int]:
    """Returns the number of pairs left out for each reason, from the results of `filter_pairs`."""
    return dict(zip(reasons, np.bincount(reason, minlength=len(reasons) + 1)[1:].tolist(), strict=True))


class DataFingerprint(NamedTuple):
    """What a checkpoint knows of the text that its run reads.

    The names and the folder of the files are not part of it, so files may be moved.

    Attributes:
        train: fingerprint of the training pairs. If they were cut at random, it is that of their text alone.
        draws: fingerprint of the random segmentations of the training text; "" without them. Another process may draw
            others (docs/lab_book.md, "SentencePiece draws differently in each process"). So a segmentation that the
            cache has lost cannot be drawn again.
        held_out: fingerprint of the validation and the test text; "" in a checkpoint of an earlier version.
    """

    train: str
    draws: str = ""
    held_out: str = ""

    @classmethod
    def of(cls, variants: Sequence[TokenizedPairs], drawn: bool, held_out: Sequence[ParallelText]) -> "DataFingerprint":
        """Returns the fingerprint of training pairs, which were cut at random if `drawn`, and of held-out text."""
        others = hashlib.sha256("".join(text.fingerprint for text in held_out).encode()).hexdigest()
        if not drawn:
            (pairs,) = variants
            return cls(pairs.fingerprint, "", others)
        draws = hashlib.sha256("".join(pairs.fingerprint for pairs in variants).encode()).hexdigest()
        return cls(variants[0].text_fingerprint, draws, others)

    @classmethod
    def parse(cls, text: str) -> "DataFingerprint":
        """Returns the fingerprint that `str` wrote."""
        return cls(*text.split(":"))

    def __str__(self) -> str:
        return ":".join(self)


class PlannedBatch(NamedTuple):
    """The pairs of one batch.

    Attributes:
        shape: size of the batch.
        pairs: [number of pairs] indices into the kept pairs.
        rows: [number of pairs] row of each pair, ascending, so that the pairs of one row are neighbours.
    """

    shape: BatchShape
    pairs: np.ndarray
    rows: np.ndarray


@runtime_checkable
class Plan(Protocol):
    """The batches of every epoch."""

    @property
    def shapes(self) -> list[BatchShape]:
        """All shapes that a batch may have."""
        ...

    def epoch(self, epoch: int) -> list[PlannedBatch]:
        """Returns the batches of an epoch, the same at every call.

        The weight of a corpus says how often each of its pairs occurs.
        """
        ...


@dataclass(frozen=True)
class LengthSummary:
    """Statistics of sentence lengths, from which the shapes of batches are chosen.

    Pairs are grouped by the length of their longer side, in steps of `LENGTH_MULTIPLE`. Summaries of several texts can
    be added.

    Attributes:
        counts: [groups], number of pairs in each group.
        longest: [groups, 2], length of the longest source and the longest target of each group.
        total: [2], number of tokens of each side.
    """

    counts: np.ndarray
    longest: np.ndarray
    total: np.ndarray

    @classmethod
    def of(cls, lengths: np.ndarray) -> "LengthSummary":
        """Returns the summary of lengths [number of pairs, 2]."""
        group = (lengths.max(axis=1) + LENGTH_MULTIPLE - 1) // LENGTH_MULTIPLE
        counts = np.bincount(group)
        longest = np.zeros((len(counts), 2), np.int64)
        for number in np.flatnonzero(counts):
            longest[number] = lengths[group == number].max(axis=0)
        return cls(counts, longest, lengths.sum(axis=0, dtype=np.int64))

    def __add__(self, other: "LengthSummary") -> "LengthSummary":
        groups = max(len(self.counts), len(other.counts))
        counts, longest = np.zeros(groups, np.int64), np.zeros((groups, 2), np.int64)
        for each in (self, other):
            counts[: len(each.counts)] += each.counts
            longest[: len(each.counts)] = np.maximum(longest[: len(each.counts)], each.longest)
        return LengthSummary(counts, longest, self.total + other.total)


def rows_within(budget: int, length: int, multiple: int, place: Callable[[], str] | None = None) -> int:
    """Returns the number of rows of `length` tokens that a budget allows.

    Args:
        budget: most padded tokens of a batch.
        length: tokens of a row.
        multiple: the number of rows is a multiple of this.
        place: returns the place of the pair that sets the length, for the message.

    Raises:
        ConfigError: the budget allows fewer than `multiple` rows.
    """
    rows = budget // length // multiple * multiple
    if rows < multiple:
        longest = "" if place is None else f", for the pair of {place()}"
        raise ConfigError(
            f"batching.tokens_per_batch ({budget}) is too small: a batch has at least {multiple} rows, and a row has "
            f"{length} tokens on one side{longest}. Give at least "
            f"{multiple * length}, or lower the longest row: "
            "model.max_source_length and model.max_target_length (bucketed), batching.row_length (packed)."
        )
    return rows


def round_up(value: int, multiple: int) -> int:
    """Returns `value` rounded up to a multiple."""
    return -(-value // multiple) * multiple


def _side(text: TokenizedText, lines: np.ndarray, rows: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Returns tokens, positions and segments, [rows, length] each. The sentences of a row follow one another."""
    lengths = text.offsets[lines + 1] - text.offsets[lines]
    first_of_row = np.searchsorted(rows, rows)  # index of the first sentence in each one's row
    starts = np.cumsum(lengths) - lengths
    columns = starts - starts[first_of_row]
    within = np.arange(lengths.sum()) - np.repeat(starts, lengths)  # position of each token in its sentence
    place = np.repeat(rows, lengths), np.repeat(columns, lengths) + within
    tokens, positions, segments = (np.zeros(shape, np.int32) for _ in range(3))
    tokens[place] = text.ids[np.repeat(text.offsets[lines], lengths) + within]
    positions[place] = within
    segments[place] = np.repeat(np.arange(len(lines)) - first_of_row + 1, lengths)
    return tokens, positions, segments


def make_batch(pairs: TokenizedPairs, planned: PlannedBatch) -> Batch:
    """Returns the arrays of a planned batch; places without a token are padding."""
    shape, lines = planned.shape, pairs.kept[planned.pairs]
    return Batch(
        *_side(pairs.source, lines, planned.rows, (shape.rows, shape.source_length)),
        *_side(pairs.target, lines, planned.rows, (shape.rows, shape.target_length)),
    )
