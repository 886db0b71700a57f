"""Which source word each target word was made from, read off the attention."""

from collections.abc import Sequence

import numpy as np

# What SentencePiece puts in place of the space before a word.
WORD_START = "\u2581"


def word_numbers(pieces: Sequence[str]) -> list[int]:
    """Returns for each piece the number of its word, from 0; a word is what stands between spaces.

    Example:
        >>> word_numbers(["\u2581a", "\u2581ro", "se"])
        [0, 1, 1]
    """
    numbers, current = [], -1
    for piece in pieces:
        if piece.startswith(WORD_START) or current < 0:
            current += 1
        numbers.append(current)
    return numbers


def word_alignment(source: Sequence[str], target: Sequence[str], attention: np.ndarray) -> str:
    """Returns pairs "source word-target word" in Moses format, in order of the target.

    Each target piece is aligned to the source piece that it looked at most; the end tokens have no part in it.

    Args:
        source, target: pieces, without the end tokens.
        attention: [target pieces or more, source pieces or more].
    """
    if not source or not target:
        return ""
    looked_at = attention[: len(target), : len(source)].argmax(axis=1)
    source_words, target_words = word_numbers(source), word_numbers(target)
    pairs = {(target_words[t], source_words[s]) for t, s in enumerate(looked_at.tolist())}
    return " ".join(f"{s}-{t}" for t, s in sorted(pairs))
