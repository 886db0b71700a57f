"""The errors that a user can cause, and the words that help to mend them.

Every message says what was expected, what came, and what to do. The command line prints the message alone and
exits with code 2 (1 for a `DivergenceError`); any other exception is a defect of the program and keeps its traceback.
"""

import difflib
import math
from collections.abc import Iterable


class InputError(ValueError):
    """Something given by the user (a file, a value, a line of text) cannot be used as it is."""


class ConfigError(InputError):
    """A configuration has an unknown field, a value of the wrong type, or sizes that contradict one another."""


class RunFolderError(InputError):
    """A run folder does not hold what is asked of it, or holds another run already."""


class DivergenceError(RuntimeError):
    """Training or search met numbers that are not finite; a person must change the recipe."""


def shortened(text: str, num_characters: int = 80) -> str:
    """Returns a text as an error shows it: its beginning, where it is long."""
    return text if len(text) <= num_characters else f"{text[:num_characters]}..."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the nearest known names, else a list of all of them.

    Args:
        name: what the user wrote.
        known: the names that would have been right.
    """
    known = sorted(known)
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if nearest:
        return " Did you mean " + " or ".join(repr(n) for n in nearest) + "?"
    return " Known are: " + ", ".join(known) + "."


def check_seed(name: str, seed: int) -> None:
    """Raises a `ConfigError` unless `seed` is a 32-bit number that is not negative."""
    if not 0 <= seed < 2**32:
        raise ConfigError(f"{name} must lie between 0 and 4294967295, got {seed}.")


def check_finite(section: str, config: object) -> None:
    """Raises a `ConfigError` if a field of a dataclass is a number that is infinite or not a number."""
    for name, value in vars(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{section}.{name} must be a finite number, got {value}.")
