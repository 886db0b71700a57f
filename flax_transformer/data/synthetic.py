"""A generated corpus: English number words and their German translations, 0 to 999,999.

It is a small but real translation problem. German puts the unit before the ten ("twenty-one" -> "einundzwanzig") and
writes a number as one compound. Thousands are counted by a number of their own. The corpus needs no file and no
download.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flax_transformer.data.parallel_text import Corpus, ParallelText
from flax_transformer.errors import ConfigError, check_fields, check_seed

ENGLISH_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
ENGLISH_TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()
GERMAN_UNITS = (
    "null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn "
    "achtzehn neunzehn"
).split()
GERMAN_TENS = "- - zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()

MAX_NUMBER = 999_999
MAX_DIGITS = 6


@dataclass(frozen=True)
class NumberWordsConfig:
    """Settings of generated number words.

    Each count of digits gets an equal share. Numbers drawn uniformly would nearly all have six digits.

    Attributes:
        num_train: number of training pairs. A count of digits with few numbers repeats them, at most 20 times each.
        num_validation: number of validation pairs; none of them is in training.
        num_test: number of test pairs; none of them is in training or validation.
        seed: seed of the generator, which decides how the numbers are split.

    Raises:
        ConfigError: a value is out of range, or fields contradict each other.

    Example:
        >>> corpus = number_words_corpus(NumberWordsConfig(num_train=8, num_validation=1, num_test=1))
        >>> len(corpus.validation.source), english_number_words(21), german_number_words(21)
        (1, 'twenty-one', 'einundzwanzig')
    """

    kind: ClassVar[str] = "number_words"

    num_train: int = 60_000
    num_validation: int = 512
    num_test: int = 2_048
    seed: int = 0

    def __post_init__(self):
        check_fields("data", self)
        check_seed("data.seed", self.seed)
        if min(self.num_train, self.num_validation, self.num_test) < 1 or self.num_validation + self.num_test > 20_000:
            raise ConfigError(
                "data.num_train, num_validation and num_test must be at least 1, and validation and test together at "
                f"most 20,000 numbers; got {self.num_train}, {self.num_validation} and {self.num_test}."
            )


def english_number_words(number: int) -> str:
    """Returns the English words for `number` in [0, 999,999], without "and": 21 -> "twenty-one"."""
    if number >= 1000:
        rest = f" {english_number_words(number % 1000)}" if number % 1000 else ""
        return f"{english_number_words(number // 1000)} thousand{rest}"
    if number >= 100:
        rest = f" {english_number_words(number % 100)}" if number % 100 else ""
        return f"{ENGLISH_UNITS[number // 100]} hundred{rest}"
    if number >= 20:
        unit = f"-{ENGLISH_UNITS[number % 10]}" if number % 10 else ""
        return f"{ENGLISH_TENS[number // 10]}{unit}"
    return ENGLISH_UNITS[number]


def german_number_words(number: int) -> str:
    """Returns the German word for `number` in [0, 999,999]: 21 -> "einundzwanzig", 101 -> "einhunderteins"."""

    def compound(n: int) -> str:  # the form before another part: "ein", not "eins"
        if n >= 1000:
            return f"{compound(n // 1000)}tausend{compound(n % 1000) if n % 1000 else ''}"
        if n >= 100:
            return f"{GERMAN_UNITS[n // 100]}hundert{compound(n % 100) if n % 100 else ''}"
        if n >= 20:
            unit = f"{GERMAN_UNITS[n % 10]}und" if n % 10 else ""
            return f"{unit}{GERMAN_TENS[n // 10]}"
        return GERMAN_UNITS[n]

    return compound(number) + ("s" if number % 100 == 1 else "")


def _held_out_counts(available: list[int], wanted: int) -> list[int]:
    """Splits `wanted` evenly over the strata. Each gives at most a tenth of its numbers."""
    counts, left = [], wanted
    for stratum, size in enumerate(available):
        counts.append(min(size // 10, left // (len(available) - stratum)))
        left -= counts[-1]
    return counts


def number_words_corpus(config: NumberWordsConfig) -> Corpus:
    """Returns training, validation and test pairs, each stratified by digits. They have no number in common.

    Zero is always in training. Its word "null" is part of no other number, so a model cannot translate it unseen.
    """
    rng = np.random.default_rng(config.seed)
    strata = [np.arange(1, 10)] + [np.arange(10 ** (d - 1), 10**d) for d in range(2, MAX_DIGITS + 1)]
    strata = [rng.permutation(stratum) for stratum in strata]
    sizes = [len(stratum) for stratum in strata]
    test_counts = _held_out_counts(sizes, config.num_test)
    validation_counts = _held_out_counts(sizes, config.num_validation)

    train, validation, test = [np.zeros(1, np.int64)], [], []
    left = config.num_train - 1
    for i, stratum in enumerate(strata):
        test.append(stratum[: test_counts[i]])
        validation.append(stratum[test_counts[i] : test_counts[i] + validation_counts[i]])
        rest = stratum[test_counts[i] + validation_counts[i] :]
        count = min(20 * len(rest), left // (len(strata) - i))
        train.append(np.resize(rest, count))
        left -= count

    def pairs(parts: list[np.ndarray], name: str) -> ParallelText:
        numbers = rng.permutation(np.concatenate(parts))
        return ParallelText(
            [english_number_words(int(n)) for n in numbers], [german_number_words(int(n)) for n in numbers], name
        )

    return Corpus(
        train=(pairs(train, "the number words for training"),),
        validation=pairs(validation, "the number words for validation"),
        test=pairs(test, "the number words for testing"),
    )
