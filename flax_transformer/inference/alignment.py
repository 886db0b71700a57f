"""Alignments of target words to source words, computed from the attention."""

import bisect
import re
from collections.abc import Sequence

import numpy as np


def word_numbers(text: str, spans: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Returns the numbers of the words that each piece of a text belongs to.

    Words are separated by spaces (U+0020), and counted from 0. A piece without a character of a word, such as a single
    space, belongs to the next word, if there is one. An unknown piece may belong to several words.

    Args:
        text: the line that was tokenised, or the output that was detokenised.
        spans: begin and end of each piece, in bytes of UTF-8; see `Tokenizer.encoded_spans` and `decoded_spans`.

    Example:
        >>> word_numbers("a rose", [(0, 1), (1, 4), (4, 6)])
        [[0], [1], [1]]
    """
    words = [word.span() for word in re.finditer(rb"[^ ]+", text.encode())]
    begins, ends = [begin for begin, _ in words], [end for _, end in words]
    numbers = []
    for begin, end in spans:
        first = bisect.bisect_right(ends, begin)  # the first word that ends after the begin of the piece
        behind = bisect.bisect_left(begins, end)  # the first word that begins after the piece
        numbers.append(list(range(first, min(max(behind, first + 1), len(words)))))
    return numbers


def word_alignment(source: Sequence[Sequence[int]], target: Sequence[Sequence[int]], attention: np.ndarray) -> str:
    """Returns pairs "source word-target word" in Moses format, in the order of the target.

    Each target piece is aligned to the source piece with its highest attention weight. End tokens are left out.

    Args:
        source, target: word numbers of each piece (see `word_numbers`), without the end tokens.
        attention: [T, S] attention weights of the pieces; further rows and columns are not read.
    """
    if not source or not target:
        return ""
    looked_at = attention[: len(target), : len(source)].argmax(axis=1)
    pairs = {(t, s) for of, place in zip(target, looked_at.tolist(), strict=True) for t in of for s in source[place]}
    return " ".join(f"{s}-{t}" for t, s in sorted(pairs))
