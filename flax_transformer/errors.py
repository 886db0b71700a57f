"""The errors that a user can cause, and the words that help to mend them.

Every message says what was expected, what came, and what to do. The command line prints the message alone and
exits with code 2; anything that is not an `InputError` is a defect of the program and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something given by the user (a file, a value, a line of text) cannot be used as it is."""


class ConfigError(InputError):
    """A configuration has an unknown field, a value of the wrong type, or sizes that contradict one another."""


class RunFolderError(InputError):
    """A run folder does not hold what is asked of it, or holds another run already."""


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
