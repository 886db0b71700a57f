"""Which training pairs are left out. Validation and test text is never filtered."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flax_transformer.errors import ConfigError


@dataclass(frozen=True)
class FilterConfig:
    """What else to leave out of the training text beside empty pairs and pairs beyond the model's lengths.

    Attributes:
        max_length_ratio: pairs in which one side has more than so many times the other's tokens; 0 leaves none out.
        drop_identical: pairs whose two sides are the same text.
        drop_duplicates: pairs that have occurred before.
    """

    max_length_ratio: float = 0.0
    drop_identical: bool = False
    drop_duplicates: bool = False

    def __post_init__(self):
        if self.max_length_ratio != 0 and not self.max_length_ratio >= 1:
            raise ConfigError(
                f"filters.max_length_ratio must be at least 1 (or 0 for no limit), got {self.max_length_ratio}."
            )


class PairMarks(NamedTuple):
    """What filters must know of the text of each pair.

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
) -> tuple[np.ndarray, dict[str, int]]:
    """Returns the indices of the pairs that stay, and how many were left out for which reason (the first that holds).

    Args:
        lengths: [number of pairs, 2] in tokens, end tokens included.
        marks: may be None when neither identical pairs nor duplicates are looked for.
        max_source_length, max_target_length: of the model.
        config: what else to leave out.
    """
    keep = np.ones(len(lengths), bool)
    dropped: dict[str, int] = {}

    def drop(name: str, bad: np.ndarray) -> None:
        dropped[name] = int((keep & bad).sum())
        keep[bad] = False

    drop("empty", (lengths == 1).any(axis=1))
    drop("too long", (lengths[:, 0] > max_source_length) | (lengths[:, 1] > max_target_length))
    if config.max_length_ratio:
        words = lengths - 1  # without end tokens
        drop("of unequal length", words.max(axis=1) > config.max_length_ratio * words.min(axis=1))
    if config.drop_identical:
        assert marks is not None, "identical pairs are known by their marks"
        drop("identical", marks.identical)
    if config.drop_duplicates:
        assert marks is not None, "duplicates are known by their marks"
        first = np.zeros(len(lengths), bool)
        first[np.unique(marks.digests, return_index=True)[1]] = True
        drop("duplicate", ~first)
    return np.flatnonzero(keep), dropped
