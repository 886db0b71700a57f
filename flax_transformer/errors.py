"""Errors that a user can cause, and helpers for their messages.

Every message says what was expected, what came, and what to do. The command line prints the message alone. It exits
with code 2, or with code 1 for a `DivergenceError`. Any other exception is a defect of the program, and keeps its
traceback.
"""

import contextlib
import difflib
import errno
import math
import reprlib
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any


class InputError(ValueError):
    """An input of the user cannot be used as it is, such as a file, a value or a line of text."""


class ConfigError(InputError):
    """A configuration has an unknown field, a value of the wrong type, or fields that contradict each other."""


class RunFolderError(InputError):
    """A run folder lacks something, has a damaged file, or contains another run already."""


class DivergenceError(RuntimeError):
    """A training or a search met numbers that are not finite. The user has to change the recipe."""


class LostProcessError(RuntimeError):
    """Another process of the same command has ended, or cannot be reached."""


def shortened(text: str, num_characters: int = 80) -> str:
    """Returns a text for an error message; of a long text only the beginning."""
    return text if len(text) <= num_characters else f"{text[:num_characters]}..."


_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxlong, _short.maxother = 3, 80, 80, 80


def shown(value: Any) -> str:
    """Returns `repr` of a value for an error message, cut to about 80 characters, at a cost that is bounded, too."""
    try:
        return shortened(_short.repr(value), 100)
    except ValueError:  # Python refuses to write out an integer of thousands of digits
        return "a number of thousands of digits"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" with the nearest known names, or a list of all known names.

    Args:
        name: name that the user wrote.
        known: names that are right.
    """
    name, known = name[:80], sorted(known)
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if nearest:
        return " Did you mean " + " or ".join(repr(n) for n in nearest) + "?"
    return " Known are: " + ", ".join(known) + "."


# What a user can do about an error of the system.
ADVICE = {
    errno.ENOSPC: "Make room on that disk, or choose another one.",
    errno.EDQUOT: "Make room in that quota, or choose another disk.",
    errno.EROFS: "Choose a place that can be written.",
    errno.EACCES: "Change its permissions, or choose another place.",
    errno.EPERM: "Change its permissions, or choose another place.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.EMFILE: "Raise the limit on open files (ulimit -n).",
    errno.ENETUNREACH: "Check the name of the bucket, your credentials and the network.",
}


def describe_os_error(error: OSError) -> str:
    """Returns the message of an error of the system: the file, what happened, and what to do."""
    what = error.strerror or str(error) or type(error).__name__
    file = "" if error.filename is None else f"{error.filename}: "
    advice = ADVICE.get(error.errno or 0, "Check the path and the disk.")
    return f"{file}{what.rstrip('.')}. {advice}"


@contextlib.contextmanager
def writing(path: Path) -> Generator[None, None, None]:
    """Gives the errors of the system inside a `with` block the path of a file, which a full disk does not tell.

    Raises:
        OSError: the error, with a path.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def as_texts(name: str, texts: Any) -> list[str]:
    """Returns a list of texts, from any iterable such as a generator, a tuple or a column of a table.

    Args:
        name: name of the argument, for messages.
        texts: the texts.

    Raises:
        ConfigError: not an iterable of several texts, or an item that is no text.
    """
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise ConfigError(f"{name} must be a list of texts, got {shown(texts)}; put a single one into a list: [text].")
    found = list(texts)
    for number, text in enumerate(found):
        if not isinstance(text, str):
            raise ConfigError(
                f"{name} must be texts, but {name}[{number}] is {shown(text)} ({type(text).__name__}). Leave "
                "it out, or put a text in its place; bytes need decode()."
            )
    return [str(text) for text in found]


def check_seed(name: str, seed: int) -> None:
    """Raises a `ConfigError` unless `seed` is an unsigned 32-bit number."""
    if not 0 <= seed < 2**32:
        raise ConfigError(f"{name} must lie between 0 and 4294967295, got {seed}.")


def check_finite(section: str, config: object) -> None:
    """Raises a `ConfigError` if a field of a dataclass is infinite, NaN, or an integer beyond 32 bits.

    A larger integer is a mistake in every field, and the arithmetic of later checks could not take it.
    """
    for name, value in vars(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{section}.{name} must be a finite number, got {value}.")
        if isinstance(value, int) and abs(value) >= 2**32:
            raise ConfigError(f"{section}.{name} must lie between -4294967295 and 4294967295, got {shown(value)}.")
