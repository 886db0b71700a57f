"""Sentences of several lengths as arrays of one shape."""

from collections.abc import Iterable, Sequence

import numpy as np


def padded_sentences(
    sentences: Sequence[Sequence[int]], num_rows: int, length: int, rows: Iterable[int] | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns tokens, positions and segments, [num_rows, length] each; other places are padding (see `Batch`).

    Args:
        sentences: ids of each sentence, at most `length`.
        num_rows: number of rows.
        length: padded length.
        rows: row of each sentence; None takes the first rows in order.

    Example:
        >>> tokens, positions, segments = padded_sentences([[7, 8, 2], [9, 2]], num_rows=3, length=4)
        >>> tokens.tolist()
        [[7, 8, 2, 0], [9, 2, 0, 0], [0, 0, 0, 0]]
        >>> positions[1].tolist(), segments[1].tolist()
        ([0, 1, 2, 3], [1, 1, 0, 0])
    """
    tokens, segments = np.zeros((2, num_rows, length), np.int32)
    for row, ids in zip(range(len(sentences)) if rows is None else rows, sentences, strict=True):
        tokens[row, : len(ids)] = ids
        segments[row, : len(ids)] = 1
    positions = np.ascontiguousarray(np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape))
    return tokens, positions, segments
