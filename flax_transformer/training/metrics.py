"""Token counts and mean losses of several batches."""

import math
from dataclasses import dataclass

import numpy as np

from flax_transformer.shapes import Batch


@dataclass(frozen=True)
class TokenCounts:
    """Numbers of tokens of one or more batches, counted on the host.

    Attributes:
        source, target: tokens of each side, without padding.
        padded: positions of both sides, padding included.
    """

    source: int = 0
    target: int = 0
    padded: int = 0

    @classmethod
    def of(cls, batch: Batch) -> "TokenCounts":
        """Returns the counts of a batch of NumPy arrays."""
        source, target = batch.source_segments, batch.target_segments
        return cls(int(np.count_nonzero(source)), int(np.count_nonzero(target)), source.size + target.size)

    def __add__(self, other: "TokenCounts") -> "TokenCounts":
        return TokenCounts(self.source + other.source, self.target + other.target, self.padded + other.padded)

    def __sub__(self, other: "TokenCounts") -> "TokenCounts":
        return TokenCounts(self.source - other.source, self.target - other.target, self.padded - other.padded)

    @property
    def padding_share(self) -> float:
        """Share of padding among all positions, in [0, 1]."""
        return 1.0 - (self.source + self.target) / self.padded if self.padded else 0.0


@dataclass(frozen=True)
class LossSummary:
    """Means over target tokens.

    Attributes:
        loss: label-smoothed cross entropy in nats per token.
        perplexity: exponential of the reference's negative log-likelihood per token.
        accuracy: share of tokens that are predicted right under teacher forcing.
    """

    loss: float
    perplexity: float
    accuracy: float

    @classmethod
    def of(cls, loss: float, negative_log_likelihood: float, correct: float, count: float) -> "LossSummary":
        """Returns the means of sums over `count` tokens."""
        count = max(count, 1.0)
        return cls(loss / count, math.exp(min(negative_log_likelihood / count, 700.0)), correct / count)
