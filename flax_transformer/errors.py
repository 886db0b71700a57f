"""Errors that a user can cause, and helpers for their messages.

Every message says what was expected, what came, and what to do. The command line prints the message alone. It exits
with code 2, or with code 1 for a `DivergenceError`. Any other exception is a defect of the program, and keeps its
traceback.
"""

import contextlib
import difflib
import errno
import functools
import numbers
import os
import reprlib
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints


class InputError(ValueError):
    """An input of the user cannot be used as it is, such as a file, a value or a line of text.

    Example:
        >>> from flax_transformer import evaluate
        >>> try:
        ...     evaluate(["one line"], [])
        ... except InputError as error:
        ...     print(type(error).__name__)
        InputError
    """


class ConfigError(InputError):
    """A configuration has an unknown field, a value of the wrong type, or fields that contradict each other.

    Example:
        >>> from flax_transformer import TransformerConfig
        >>> try:
        ...     TransformerConfig(model_dim=10, num_heads=4)
        ... except ConfigError as error:
        ...     print(error)
        model.num_heads (4) must divide ...
    """


class RunFolderError(InputError):
    """A run folder lacks something, has a damaged file, or contains another run already.

    Example:
        >>> from flax_transformer import Translator
        >>> try:
        ...     Translator.load("no/such/run")
        ... except RunFolderError as error:
        ...     print(error)
        no/such/run is not a run folder: ...
    """


class DivergenceError(RuntimeError):
    """A training or a search met numbers that are not finite. The user has to change the recipe.

    Example:
        >>> from flax_transformer import NoTranslation
        >>> NoTranslation("A dog.", DivergenceError("the model's scores are not finite.")).reason
        DivergenceError("the model's scores are not finite.")
    """


class LostProcessError(RuntimeError):
    """Another process of the same command has ended, or cannot be reached."""


def lacks_memory(error: BaseException) -> bool:
    """Returns whether JAX found no memory. A program is checked to fit, but others may use the device, too."""
    return isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def explains_itself(error: BaseException) -> bool:
    """Returns whether a user can cause an error, and its message is enough. Any other is a defect of the program."""
    known = (InputError, DivergenceError, LostProcessError, MemoryError, OSError, KeyboardInterrupt)
    return isinstance(error, known) or lacks_memory(error)


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
    file = "" if error.filename is None else f"{shortened(os.fsdecode(error.filename), 300)}: "
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
        raise ConfigError(f"{name} must lie between 0 and 4294967295, got {shown(seed)}.")


# The largest number of float32, in which programs compute.
MOST_FLOAT = 3.4028234663852886e38


def check_fields(section: str, config: Any) -> None:
    """Checks the types of a dataclass's fields, and that its numbers are finite and fit 32 bits.

    A larger integer is a mistake in every field but a seed, and the arithmetic of later steps could not take it.

    Args:
        section: section of the configuration, for messages; empty for the configuration itself.
        config: the dataclass. Fields may be plain values, choices, tuples of these, or other dataclasses.

    Raises:
        ConfigError: a field has a value of another type, or a number that is not finite or too large.
    """
    hints = _field_types(type(config))
    for field, value in vars(config).items():
        name = f"{section}.{field}" if section else field
        check_type(name, value, hints[field])
        for number in value if isinstance(value, tuple | list) else (value,):
            if isinstance(number, numbers.Integral):
                if abs(int(number)) >= 2**31 and field != "seed":
                    raise ConfigError(f"{name} must lie between -2147483647 and 2147483647, got {shown(number)}.")
            elif isinstance(number, numbers.Real) and not abs(float(number)) <= MOST_FLOAT:
                raise ConfigError(f"{name} must be a finite number, got {number} (32 bits hold at most 3.4e38).")


_field_types = functools.cache(get_type_hints)


def check_type(name: str, value: Any, hint: Any) -> None:
    """Raises a `ConfigError` unless a value has a type. NumPy's numbers are numbers, and a list stands for a tuple.

    Args:
        name: name of the value, for messages.
        value: the value.
        hint: a class, a `Literal`, a tuple of one type, or a union of these.
    """
    if not _has_type(value, hint):
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        expected = f"one of {', '.join(map(str, choices))}" if choices else getattr(hint, "__name__", str(hint))
        raise ConfigError(f"{name}: expected {expected}, got {shown(value)} ({type(value).__name__}).")


def _has_type(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is tuple:
        return isinstance(value, tuple | list) and all(_has_type(each, arguments[0]) for each in value)
    if arguments:  # a union
        return any(_has_type(value, each) for each in arguments)
    if hint in (int, float):
        return isinstance(value, numbers.Integral if hint is int else numbers.Real) and not isinstance(value, bool)
    return isinstance(value, hint)
