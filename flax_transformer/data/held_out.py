"""Validation and test text that is taken out of training text.

The choice follows from the hashes of the sources alone. So it is the same on every machine and in every order of the
lines, and most of it stays when lines are added. Training text gets no pair whose source is held out.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax_transformer.data.text_survey import TextSurvey, is_clean, source_key
from flax_transformer.errors import InputError, writing

# Share of the different clean pairs that is held out for each part, and the limits of its number of pairs. Multi30k has
# parts of about a thousand pairs, and WMT of up to three thousand.
SHARE = 0.05
LEAST_PAIRS = 100
MOST_PAIRS = 2_000

# Both parts together may take this share of the pairs.
MOST_SHARE = 0.25

PARTS = ("train", "validation", "test")
SIDES = ("source", "target")


@dataclass(frozen=True)
class Split:
    """Sources that are not trained on.

    Attributes:
        validation, test: keys of the sources of each part, one for each of its pairs; see `source_key`.
        given: keys of the sources of validation and test text that has files of its own.
    """

    validation: frozenset[int] = frozenset()
    test: frozenset[int] = frozenset()
    given: frozenset[int] = frozenset()


@dataclass(frozen=True)
class SplitSizes:
    """Numbers of pairs of a split.

    Attributes:
        train, validation, test: number of pairs that were written to each part.
        left_out: number of other pairs whose source is held out. They are in no part.
    """

    train: int
    validation: int
    test: int
    left_out: int

    def num_distinct(self, found: int) -> int:
        """Returns the number of different training pairs, if the whole text has `found` different pairs.

        Pairs that are left out mostly repeat those that are held out. So they are not subtracted a second time, and the
        number is an upper bound.
        """
        return max(min(found - self.validation - self.test, self.train), 1)


def choose_split(
    survey: TextSurvey, parts: Collection[str], number: int | None = None, given: frozenset[int] = frozenset()
) -> Split:
    """Returns the sources to hold out: those with the smallest hashes.

    Args:
        survey: survey of the training text.
        parts: parts to choose, of "validation" and "test".
        number: number of pairs of each part; None for a share of the text.
        given: see `Split`.

    Raises:
        InputError: the text is too small.
    """
    values = survey.clean_sources.values.tolist()
    keys = [key for key in values if key not in given]
    found = round(survey.clean_sources.num_distinct * len(keys) / max(len(values), 1))
    size = min(max(LEAST_PAIRS, round(SHARE * found)), MOST_PAIRS) if number is None else number
    if not parts:
        return Split(given=given)
    if size < 1 or size * len(parts) > min(MOST_SHARE * found, len(keys)):
        least = -(-size * len(parts) // MOST_SHARE)
        besides = " besides those of the text that is named" if given else ""
        raise InputError(
            f"the training text is too small to take {' and '.join(sorted(parts))} text from it: {size} pairs for each "
            f"need {least:,.0f} different clean pairs, and there are {found:,}{besides}. Give more text, take fewer "
            "pairs by --held-out NUMBER (at least 1), or name own text by --validation and --test."
        )
    chosen = {part: frozenset(keys[i * size : (i + 1) * size]) for i, part in enumerate(sorted(parts))}
    return Split(**chosen, given=given)


def given_keys(texts: Iterable[Iterable[tuple[str, str]]]) -> frozenset[int]:
    """Returns the keys of the sources of texts."""
    return frozenset(source_key(source) for text in texts for source, _ in text)


def write_split(pairs: Iterable[tuple[str, str]], split: Split, folder: Path) -> SplitSizes:
    """Writes the parts of a text, as files such as train.source and test.target, and returns their sizes.

    Args:
        pairs: the text that the survey was made of.
        split: result of `choose_split`. A part without sources gets no file.
        folder: an empty folder.
    """
    sizes = dict.fromkeys((*PARTS, "left_out"), 0)
    part_of = dict.fromkeys(split.given, "left_out") | {key: part for part in PARTS[1:] for key in getattr(split, part)}
    taken: set[int] = set()
    with contextlib.ExitStack() as files:
        parts = [part for part in PARTS if part == "train" or getattr(split, part)]
        write = {part: _writer(files, folder, part) for part in parts}
        for source, target in pairs:
            key = source_key(source)
            part = part_of.get(key, "train")
            if part in PARTS[1:]:
                if key in taken or not is_clean(source, target):
                    part = "left_out"
                else:
                    taken.add(key)
            sizes[part] += 1
            if part in write:
                write[part](source, target)
    return SplitSizes(**sizes)


def _writer(files: contextlib.ExitStack, folder: Path, part: str) -> Callable[[str, str], Any]:
    """Returns a function that appends a pair to the files of a part."""
    opened = []
    for side in SIDES:
        path = folder / f"{part}.{side}"
        files.enter_context(writing(path))
        opened.append(files.enter_context(path.open("w", encoding="utf-8", newline="\n")))

    def write(source: str, target: str) -> None:
        for file, line in zip(opened, (source, target), strict=True):
            file.write(f"{line}\n")

    return write


@contextlib.contextmanager
def new_folder(folder: Path, replace: bool = False) -> Generator[Path, None, None]:
    """Gives an empty folder, which gets its name at the end of the `with` block. After an error it is removed.

    Args:
        folder: the name.
        replace: whether a folder of this name is replaced.

    Raises:
        InputError: there is something of this name, and `replace` is not set.
    """
    check_new(folder, replace)
    with writing(folder):
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.unfinished-", dir=folder.parent))
    try:
        partial.chmod(0o777 & ~_umask())
        yield partial
        if replace and folder.exists():
            old = partial.with_name(f"{partial.name}.old")
            folder.rename(old)
            partial.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
        else:
            check_new(folder, replace)
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new(path: Path, replace: bool) -> None:
    """Raises an `InputError` if something has this path, unless it may be replaced."""
    if path.exists() and not replace:
        raise InputError(f"{path} is there already. Choose another --output, or replace it by --replace.")


def _umask() -> int:
    """Returns the permissions that new files of this process lack."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
