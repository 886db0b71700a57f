"""A survey of parallel text: its size, its characters, and lines that look wrong.

The text is read once, in a chunk at a time. Memory does not grow with the number of lines.
"""

import functools
import hashlib
import itertools
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

# Number of pairs that are looked at together.
CHUNK_PAIRS = 4_096

# Lines with more characters count as very long. SentencePiece learns nothing from lines of this order.
VERY_LONG = 1_000

# If one side has more than so many times the characters of the other, a pair counts as unequal. It is the default
# ratio of clean-corpus-n.perl in Moses.
UNEQUAL_RATIO = 9.0

# A pair whose longer side has fewer characters is never unequal, since single words may well differ.
LEAST_UNEQUAL = 30

# Number of hashes that are kept. Fewer different pairs are counted exactly.
MOST_HASHES = 1 << 18

# Number of hashes that are sorted in together.
HASHES_AT_ONCE = 1 << 16

# Mean number of letters between spaces, above which a language writes none.
LETTERS_WITHOUT_SPACES = 15.0


@functools.cache
def no_letters() -> re.Pattern[str]:
    r"""Returns the pattern of spaces, punctuation, symbols, and marks that text may have or lack.

    `\W` would have the vowel signs of many scripts, too. Arabic and Hebrew mostly leave theirs out.
    """
    optional = ("ARABIC", "HEBREW", "VARIATION SELECTOR", "COMBINING ENCLOSING")
    all_marks = (c for c in map(chr, range(0x20000)) if unicodedata.category(c).startswith("M"))
    marks = "".join(c for c in all_marks if not unicodedata.name(c, "").startswith(optional))
    return re.compile(rf"(?:[^\w{marks}]|_)+")


def hash_of(text: str) -> int:
    """Returns a 64-bit hash of a text, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def source_key(source: str) -> int:
    """Returns the hash of a source sentence, without case, spaces and punctuation.

    Sentences of the same key are never on both sides of a split.
    """
    return hash_of(no_letters().sub("", unicodedata.normalize("NFC", source.casefold())) or source)


def is_unequal(source: str, target: str) -> bool:
    """Returns whether the sides of a pair differ so much in length that one can hardly translate the other."""
    shorter, longer = sorted((len(source), len(target)))
    return longer >= LEAST_UNEQUAL and longer > UNEQUAL_RATIO * shorter


def is_clean(source: str, target: str) -> bool:
    """Returns whether a pair may be validation or test text: not empty, copied, unequal or very long."""
    return bool(
        source.strip()
        and target.strip()
        and source != target
        and max(len(source), len(target)) <= VERY_LONG
        and not is_unequal(source, target)
    )


class SmallestHashes:
    """The smallest different hashes of a stream. They are a sample of its items, and tell how many differ.

    Args:
        most: maximum number of hashes to keep.

    References:
        Bar-Yossef et al. 2002, "Counting Distinct Elements in a Data Stream"; Beyer et al. 2007, "On Synopses for
        Distinct-Value Estimation Under Multiset Operations", section 4.1.
    """

    def __init__(self, most: int = MOST_HASHES):
        self._most = most
        self._sorted = np.zeros(0, np.uint64)
        self._waiting: list[int] = []  # not sorted in yet
        self._exact = True

    def add(self, hashes: list[int]) -> None:
        """Adds the hashes of further items."""
        self._waiting += hashes
        if len(self._waiting) >= HASHES_AT_ONCE:
            self._sort()

    @property
    def values(self) -> np.ndarray:
        """[at most `most`] uint64, sorted."""
        self._sort()
        return self._sorted

    def _sort(self) -> None:
        if self._waiting:
            merged = np.union1d(self._sorted, np.array(self._waiting, np.uint64))
            self._exact &= len(merged) <= self._most
            self._sorted, self._waiting = merged[: self._most], []

    @property
    def exact(self) -> bool:
        """Whether `num_distinct` is exact."""
        self._sort()
        return self._exact

    @property
    def num_distinct(self) -> int:
        """Number of different items. If it is an estimate, its relative standard error is 1 / sqrt(most)."""
        if self.exact:
            return len(self.values)
        return round((self._most - 1) / (float(self.values[-1]) / 2.0**64))


@dataclass
class SideSurvey:
    """One side of a text.

    Attributes:
        empty: number of lines without a letter, digit or sign.
        characters: number of characters.
        words: number of words between spaces.
        longest: number of characters of the longest line.
        longest_line: number of that line, counted from 1.
        counts: number of occurrences of each character.
    """

    empty: int = 0
    characters: int = 0
    words: int = 0
    longest: int = 0
    longest_line: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, lines: list[str], first: int) -> np.ndarray:
        """Adds lines, and returns [number of lines] int: their lengths. `first` is the number of the first line."""
        lengths = np.fromiter((len(line) for line in lines), np.int64, len(lines))
        self.empty += sum(not line.strip() for line in lines)
        self.characters += int(lengths.sum())
        self.words += sum(len(line.split()) for line in lines)
        self.counts.update("".join(lines))
        if (longest := int(lengths.max())) > self.longest:
            self.longest, self.longest_line = longest, first + int(lengths.argmax())
        return lengths

    @property
    def letters(self) -> Counter[str]:
        """Number of occurrences of each letter."""
        return Counter({character: count for character, count in self.counts.items() if character.isalpha()})

    @property
    def writes_spaces(self) -> bool:
        """Whether spaces stand between words."""
        return sum(self.letters.values()) <= LETTERS_WITHOUT_SPACES * max(self.words, 1)

    @property
    def num_letters(self) -> int:
        """Number of occurrences of letters."""
        return sum(self.letters.values())

    def num_characters(self, coverage: float) -> int:
        """Returns the number of different characters, most frequent first, that make up a share of the text."""
        needed, total = coverage * sum(self.counts.values()), 0
        for number, (_, count) in enumerate(self.counts.most_common(), start=1):
            total += count
            if total >= needed:
                return number
        return len(self.counts)

    def share_of_script(self, *names: str) -> float:
        """Returns the share of the letters whose Unicode name begins with one of `names`."""
        of_script = sum(n for letter, n in self.letters.items() if unicodedata.name(letter, "").startswith(names))
        return of_script / max(self.num_letters, 1)


@dataclass
class TextSurvey:
    """What a survey of parallel text found.

    Attributes:
        num_pairs: number of pairs.
        source, target: the two sides.
        num_empty: number of pairs with an empty side.
        num_copied: number of pairs whose sides are the same text, without empty ones.
        num_very_long: number of pairs with a side above `VERY_LONG` characters.
        num_unequal: number of pairs for which `is_unequal` holds, without empty ones.
        first_unequal: number of the first such line, counted from 1; 0 without one.
        pairs: hashes of the pairs.
        clean_sources: keys of the sources of clean pairs; see `source_key` and `is_clean`.
    """

    num_pairs: int = 0
    source: SideSurvey = field(default_factory=SideSurvey)
    target: SideSurvey = field(default_factory=SideSurvey)
    num_empty: int = 0
    num_copied: int = 0
    num_very_long: int = 0
    num_unequal: int = 0
    first_unequal: int = 0
    pairs: SmallestHashes = field(default_factory=SmallestHashes)
    clean_sources: SmallestHashes = field(default_factory=SmallestHashes)
    _moments: np.ndarray = field(default_factory=lambda: np.zeros(5))

    def add(self, pairs: list[tuple[str, str]]) -> None:
        """Adds pairs that follow those so far."""
        first = self.num_pairs + 1
        sources, targets = [source for source, _ in pairs], [target for _, target in pairs]
        x, y = np.log1p(self.source.add(sources, first)), np.log1p(self.target.add(targets, first))
        self._moments += [x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()]
        clean = []
        for number, (source, target) in enumerate(pairs, start=first):
            self.num_very_long += max(len(source), len(target)) > VERY_LONG
            if not (source.strip() and target.strip()):
                self.num_empty += 1
            elif source == target:
                self.num_copied += 1
            elif is_unequal(source, target):
                self.num_unequal += 1
                self.first_unequal = self.first_unequal or number
            if is_clean(source, target):
                clean.append(source_key(source))
        self.pairs.add([hash_of(f"{source}\n{target}") for source, target in pairs])
        self.clean_sources.add(clean)
        self.num_pairs += len(pairs)

    @property
    def num_duplicates(self) -> int:
        """Number of pairs that repeat an earlier one; an estimate unless `pairs.exact`."""
        return max(self.num_pairs - self.pairs.num_distinct, 0)

    @property
    def length_correlation(self) -> float:
        """Correlation of the logarithms of both sides' lengths, in [-1, 1]; NaN if a side has lines of one length."""
        mean_x, mean_y, xx, yy, xy = self._moments / max(self.num_pairs, 1)
        variances = (xx - mean_x**2) * (yy - mean_y**2)
        return (xy - mean_x * mean_y) / math.sqrt(variances) if variances > 1e-12 else math.nan

    @property
    def shared_letters(self) -> float:
        """Share of the target's letters that the source has, too. It is near 1 for languages of one script."""
        known = self.source.counts
        return sum(n for letter, n in self.target.letters.items() if letter in known) / max(self.target.num_letters, 1)


def survey_pairs(pairs: Iterable[tuple[str, str]]) -> TextSurvey:
    """Returns the survey of a text. It raises the errors of the iterator."""
    survey, rest = TextSurvey(), iter(pairs)
    while chunk := list(itertools.islice(rest, CHUNK_PAIRS)):
        survey.add(chunk)
    return survey
