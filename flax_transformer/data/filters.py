"""Filters of training pairs.

Validation and test text is never filtered. Only the validation loss leaves out empty pairs and pairs beyond the model's
lengths.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flax_transformer.errors import ConfigError, check_fields

TOO_LONG = "too long"


@dataclass(frozen=True)
class FilterConfig:
    """Settings of the filters of training text, beside those of empty and of too long pairs.

    Attributes:
        max_length_ratio: maximum ratio of the number of tokens of the two sides; 0 sets no maximum.
        drop_identical: whether pairs with the same text on both sides are left out.
        drop_duplicates: whether only one of equal pairs is kept. It is the first one in the corpus with the largest
            weight (`data.train_weights`). Among corpora of equal weight the first counts.
    """

    max_length_ratio: float = 0.0
    drop_identical: bool = False
    drop_duplicates: bool = False

    def __post_init__(self):
        check_fields("filters", self)
        if self.max_length_ratio != 0 and not self.max_length_ratio >= 1:
            raise ConfigError(
                f"filters.max_length_ratio must be at least 1 (or 0 for no limit), got {self.max_length_ratio}."
            )


class PairMarks(NamedTuple):
    """Properties of each pair's text that filters read.

    Attributes:
        identical: [number of pairs] bool, whether both sides are the same text.
        digests: [number of pairs] uint64, equal for equal pairs.
    """

    identical: np.ndarray
    digests: np.ndarray


def filter_pairs(
    lengths: np.ndarray,
    marks: PairMarks | None,
    max_source_length: int,
    max_target_length: int,
    config: FilterConfig,
    ends: Sequence[int] = (),
    weights: Sequence[float] = (),
) -> tuple[np.ndarray, list[str]]:
    """Returns the reason why each pair is left out, and the names of the reasons.

    The first result is [number of pairs] uint8: 0 for a pair that stays, n for the n-th name. If several reasons apply,
    the first one counts.

    Args:
        lengths: [number of pairs, 2] in tokens, end tokens included.
        marks: properties of the text; may be None if neither identical pairs nor duplicates are dropped.
        max_source_length, max_target_length: limits of the model, in tokens.
        config: further reasons to leave out pairs.
        ends, weights: corpora, as in `Mixture`; one corpus if they are empty.
    """
    reason = np.zeros(len(lengths), np.uint8)
    reasons: list[str] = []

    def drop(name: str, bad: np.ndarray) -> None:
        reasons.append(name)
        reason[bad & (reason == 0)] = len(reasons)

    drop("empty", (lengths == 1).any(axis=1))
    drop(TOO_LONG, (lengths[:, 0] > max_source_length) | (lengths[:, 1] > max_target_length))
    if config.max_length_ratio:
        words = lengths - 1  # without end tokens
        drop("of unequal length", words.max(axis=1) > config.max_length_ratio * words.min(axis=1))
    if config.drop_identical:
        assert marks is not None, "identical pairs are known by their marks"
        drop("identical", marks.identical)
    if config.drop_duplicates:
        assert marks is not None, "duplicates are known by their marks"
        drop("duplicate", ~_kept_of_equals(marks.digests, ends or (len(lengths),), weights or (1.0,)))
    return reason, reasons


def _kept_of_equals(digests: np.ndarray, ends: Sequence[int], weights: Sequence[float]) -> np.ndarray:
    """Returns [number of pairs] bool: whether each pair is the one that stays among its duplicates."""
    corpora = [slice(*bounds) for bounds in itertools.pairwise((0, *ends))]
    looked_at = [corpora[i] for i in sorted(range(len(corpora)), key=lambda i: -weights[i])]  # the sort is stable
    values = np.concatenate([digests[corpus] for corpus in looked_at])
    order = np.argsort(values, kind="stable")
    values = values[order]
    first = np.ones(len(values), bool)  # whether a sorted value is the first of its kind
    first[1:] = values[1:] != values[:-1]
    stays = np.empty_like(first)  # in the order of `looked_at`
    stays[order] = first
    kept, start = np.empty_like(first), 0
    for corpus in looked_at:
        size = corpus.stop - corpus.start
        kept[corpus] = stays[start : start + size]
        start += size
    return kept
