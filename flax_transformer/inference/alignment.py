"""Which source word each target word was made from, read off the attention."""

import bisect
import re
from collections.abc import Sequence

import numpy as np


def word_numbers(text: str, spans: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Returns for each piece of a text the numbers of its words, from 0; a word is what stands between spaces (U+0020).

    A piece without a character of a word, such as a space alone, belongs to the word that follows, if any does. One
    that is unknown may stand for several words in a row.

    Args:
        text: the line that was cut into the pieces, or the output that they were put together to.
        spans: begin and end of each piece, in bytes of UTF-8; see `Tokenizer.encoded_spans` and `decoded_spans`.

    Example:
        >>> word_numbers("a rose", [(0, 1), (1, 4), (4, 6)])
        [[0], [1], [1]]
    """
    words = [word.span() for word in re.finditer(rb"[^ ]+", text.encode())]
    begins, ends = [begin for begin, _ in words], [end for _, end in words]
    numbers = []
    for begin, end in spans:
        first = bisect.bisect_right(ends, begin)  # of the words that end behind the piece's begin
        behind = bisect.bisect_left(begins, end)  # the first word that begins behind the piece
        numbers.append(list(range(first, min(max(behind, first + 1), len(words)))))
    return numbers


def word_alignment(source: Sequence[Sequence[int]], target: Sequence[Sequence[int]], attention: np.ndarray) -> str:
    """Returns pairs "source word-target word" in Moses format, in order of the target.

    Each target piece is aligned to the source piece that it looked at most; the end tokens have no part in it.

    Args:
        source, target: numbers of the words of each piece (see `word_numbers`), without the end tokens.
        attention: [target pieces or more, source pieces or more].
    """
    if not source or not target:
        return ""
    looked_at = attention[: len(target), : len(source)].argmax(axis=1)
    pairs = {(t, s) for of, place in zip(target, looked_at.tolist(), strict=True) for t in of for s in source[place]}
    return " ".join(f"{s}-{t}" for t, s in sorted(pairs))
