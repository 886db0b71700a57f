"""Parallel plain text: line n of one file translates line n of the other."""

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from flax_transformer.errors import InputError


class ParallelText(NamedTuple):
    """Sentences and their translations, equally many."""

    source: list[str]
    target: list[str]


class Corpus(NamedTuple):
    """The three parts of a corpus; only `train` is ever learnt from, tokenizers included."""

    train: ParallelText
    validation: ParallelText
    test: ParallelText


@dataclass(frozen=True)
class ParallelTextConfig:
    """Where the text lies: UTF-8, one sentence a line, plain or compressed with gzip (a name ending in .gz).

    Attributes:
        folder: where the files lie that are not given with an absolute path; relative to the working directory.
        train_source, train_target: training text.
        validation_source, validation_target: text for choosing and watching.
        test_source, test_target: text for the final figures.
    """

    kind: ClassVar[str] = "parallel_text"

    folder: str = "."
    train_source: str = "train.source"
    train_target: str = "train.target"
    validation_source: str = "validation.source"
    validation_target: str = "validation.target"
    test_source: str = "test.source"
    test_target: str = "test.target"


def iterate_lines(path: Path) -> Iterator[str]:
    """Yields the lines of a text file, plain or .gz, without their line ends ("\\n" or "\\r\\n").

    Raises:
        InputError: the file is missing, is not what its name says, or holds a line that is not UTF-8.
    """
    if not path.is_file():
        raise InputError(f"no text file at {path} (looked in {path.parent.resolve()}). Check the path.")
    number = 0  # of the line being read, for the messages below
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for line in file:
                number += 1
                yield line.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}, line {number}: not valid UTF-8 ({error.reason} at byte {error.start} of the line). "
            "Convert the file, for example with iconv -t UTF-8, or mend the line."
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(
            f"{path}, after line {number}: not a whole gzip file ({error}). Fetch it again, or drop .gz from its name."
        ) from error


def read_parallel_text(source: Path, target: Path) -> ParallelText:
    """Returns the sentence pairs of two files.

    Raises:
        InputError: the files have different numbers of lines, or none; or as `iterate_lines`.
    """
    text = ParallelText(list(iterate_lines(source)), list(iterate_lines(target)))
    if len(text.source) != len(text.target):
        raise InputError(
            f"parallel files must have the same number of lines, but {source} has {len(text.source)} and {target} has "
            f"{len(text.target)}. Line n of one must translate line n of the other."
        )
    if not text.source:
        raise InputError(f"{source} and {target} are empty: at least one sentence pair is needed.")
    return text


def read_corpus(config: ParallelTextConfig) -> Corpus:
    """Returns the training, validation and test text that `config` names.

    Raises:
        InputError: as `read_parallel_text`.
    """
    folder = Path(config.folder)
    return Corpus(
        train=read_parallel_text(folder / config.train_source, folder / config.train_target),
        validation=read_parallel_text(folder / config.validation_source, folder / config.validation_target),
        test=read_parallel_text(folder / config.test_source, folder / config.test_target),
    )
