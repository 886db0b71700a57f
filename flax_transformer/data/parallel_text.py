"""Parallel text: sentence n of one side translates sentence n of the other."""

import dataclasses
import functools
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

from flax_transformer.errors import ConfigError, InputError, check_finite, shown


@runtime_checkable
class TextPart(Protocol):
    """One of the corpora of the training text. It can be read repeatedly and need not fit in memory."""

    @property
    def name(self) -> str:
        """The name in messages."""
        ...

    @property
    def weight(self) -> float:
        """Number of times that an epoch contains the pairs.

        Its fraction selects other pairs in each epoch, until all have been selected.
        """
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the content."""
        ...

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Yields the sentence pairs in order."""
        ...


class ParallelText(NamedTuple):
    """Sentences and their translations in memory, in lists of the same length; satisfies `TextPart`."""

    source: list[str]
    target: list[str]
    name: str = "text"
    weight: float = 1.0

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the content."""
        digest = hashlib.sha256()
        for pair in self.pairs():
            digest.update("\n".join((*pair, "")).encode())
        return digest.hexdigest()

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Yields the sentence pairs in order."""
        return zip(self.source, self.target, strict=True)


class Corpus(NamedTuple):
    """The three parts of a corpus. Models and tokenizers learn from `train` alone."""

    train: tuple[TextPart, ...]
    validation: ParallelText
    test: ParallelText


@dataclass(frozen=True)
class ParallelTextConfig:
    """Settings of parallel text: files in UTF-8.

    Each line of a text file is a sentence; the other side is another file. Each line of a .tsv file is a pair, in
    columns. Each line of a .jsonl file is a JSON object with both sides of a pair, where line breaks become spaces.
    A .tsv or .jsonl file is named on both sides. The name of a file that gzip has compressed ends in .gz, too.

    Attributes:
        folder: folder of the files, relative to the working directory. A file with an absolute path does not need it.
        train_source: files of training text, source side.
        train_target: files of training text, target side, in the same order.
        train_weights: weight of each training file; 1 for all if left out. A file of weight 2 occurs twice in an epoch.
            Weight 0.25 adds another quarter of the file to each epoch, so four epochs contain it once.
        validation_source: file of validation text, source side.
        validation_target: file of validation text, target side.
        test_source: file of test text, source side.
        test_target: file of test text, target side.
        source_column: column of the source side in .tsv files, counted from 1.
        target_column: column of the target side in .tsv files, counted from 1.
        source_key: key of the source side in .jsonl files.
        target_key: key of the target side in .jsonl files.
    """

    kind: ClassVar[str] = "parallel_text"

    folder: str = "."
    train_source: tuple[str, ...] = ("train.source",)
    train_target: tuple[str, ...] = ("train.target",)
    train_weights: tuple[float, ...] = ()
    validation_source: str = "validation.source"
    validation_target: str = "validation.target"
    test_source: str = "test.source"
    test_target: str = "test.target"
    source_column: int = 1
    target_column: int = 2
    source_key: str = "source"
    target_key: str = "target"

    def __post_init__(self):
        check_finite("data", self)
        num = len(self.train_source)
        if not num or len(self.train_target) != num or len(self.train_weights) not in (0, num):
            raise ConfigError(
                "data.train_source and data.train_target must name equally many files, at least one, and "
                f"data.train_weights one weight for each or none; got {num}, {len(self.train_target)} and "
                f"{len(self.train_weights)}."
            )
        for weight in self.train_weights:
            if not 0 < weight <= 1000:
                raise ConfigError(f"data.train_weights must be above 0 and at most 1000, got {weight}.")
        for name in ("source_column", "target_column"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name} must be at least 1, got {getattr(self, name)}.")

    def without_places(self) -> "ParallelTextConfig":
        """Returns these settings without the folder and the names of the files."""
        names = {f"{part}_{side}": "" for part in ("validation", "test") for side in ("source", "target")}
        nameless = ("",) * len(self.train_source)
        return dataclasses.replace(self, folder="", train_source=nameless, train_target=nameless, **names)


# Some programs write it at the start of a UTF-8 file. It is not part of the text.
BYTE_ORDER_MARK = "\ufeff"


def iterate_lines(path: Path) -> Iterator[str]:
    """Yields the lines of a text file, plain or .gz, without their line ends ("\\n" or "\\r\\n").

    Raises:
        InputError: the file is missing, is not a gzip file although its name ends in .gz, or is not UTF-8.
    """
    if not path.is_file():
        raise InputError(f"no text file at {path} (looked in {path.parent.resolve()}). Check the path.")
    number = 0  # number of the line being read
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for line in file:
                number += 1
                text = line.decode("utf-8").removesuffix("\n").removesuffix("\r")
                yield text.removeprefix(BYTE_ORDER_MARK) if number == 1 else text
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}, line {number}: not valid UTF-8 ({error.reason} at byte {error.start} of the line). "
            "Convert the file, for example with iconv -t UTF-8, or mend the line."
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(
            f"{path}, after line {number}: not a whole gzip file ({error}). Fetch it again, or drop .gz from its name."
        ) from error


def iterate_sentences(path: Path, column: int, key: str) -> Iterator[str]:
    """Yields the sentences of one side of a file. The name of the file gives its format, see `ParallelTextConfig`.

    Raises:
        InputError: a line lacks the column or the key; see also `iterate_lines`.
    """
    suffix = Path(path.name.removesuffix(".gz")).suffix
    lines = iterate_lines(path)
    if suffix == ".tsv":
        for number, line in enumerate(lines, start=1):
            columns = line.split("\t")
            if len(columns) < column:
                raise InputError(
                    f"{path}, line {number}: expected at least {column} columns with tabs between them, found "
                    f"{len(columns)}. Mend the line, or set data.source_column and data.target_column."
                )
            yield columns[column - 1]
    elif suffix == ".jsonl":
        for number, line in enumerate(lines, start=1):
            try:
                sentence = json.loads(line)[key]
                sentence.encode()  # fails for lone surrogates, which JSON may contain
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                sentence = None
            if not isinstance(sentence, str):
                raise InputError(
                    f"{path}, line {number}: expected a JSON object with a text under the key {shown(key)}. Mend the "
                    "line, or set data.source_key and data.target_key."
                )
            yield " ".join(sentence.splitlines())
    else:
        yield from lines


@dataclass(frozen=True)
class ParallelFiles:
    """Sentence pairs in two files, or in one; satisfies `TextPart`.

    Attributes:
        source, target: paths of the files.
        config: names of the columns and keys.
        weight: see `TextPart`.
    """

    source: Path
    target: Path
    config: ParallelTextConfig
    weight: float = 1.0

    @property
    def name(self) -> str:
        """The name in messages."""
        return str(self.source) if self.source == self.target else f"{self.source} and {self.target}"

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the files and of the settings that say how to read them. It is computed once."""
        config = self.config
        how = ("no byte order mark", config.source_column, config.target_column, config.source_key, config.target_key)
        digest = hashlib.sha256(repr((self.source.suffixes, self.target.suffixes, how)).encode())
        for path in (self.source, self.target):
            if not path.is_file():
                next(iterate_lines(path))  # raises an error that says why
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Yields the sentence pairs in order.

        Raises:
            InputError: the two sides have different numbers of sentences, or none; see also `iterate_sentences`.
        """
        config = self.config
        sides = (
            iterate_sentences(self.source, config.source_column, config.source_key),
            iterate_sentences(self.target, config.target_column, config.target_key),
        )
        number = 0
        while True:
            pair = [next(side, None) for side in sides]
            if pair[0] is None or pair[1] is None:
                break
            number += 1
            yield pair[0], pair[1]
        counts = [
            number + (sentence is not None) + sum(1 for _ in side) for side, sentence in zip(sides, pair, strict=True)
        ]
        if counts[0] != counts[1]:
            raise InputError(
                f"parallel files must have the same number of lines, but {self.source} has {counts[0]} and "
                f"{self.target} has {counts[1]}. Line n of one must translate line n of the other."
            )
        if not number:
            raise InputError(f"{self.name}: no line; at least one sentence pair is needed.")

    def read(self) -> ParallelText:
        """Returns all pairs in memory. It raises the errors of `pairs`."""
        pairs = list(self.pairs())
        return ParallelText([source for source, _ in pairs], [target for _, target in pairs], self.name)


def read_parallel_text(source: Path, target: Path, config: ParallelTextConfig | None = None) -> ParallelText:
    """Returns the sentence pairs of two files, or of one .tsv or .jsonl file that is given twice.

    Args:
        source, target: paths of the files.
        config: names of the columns and keys; None means the defaults.

    Raises:
        InputError: see `ParallelFiles.pairs`.
    """
    return ParallelFiles(source, target, config or ParallelTextConfig()).read()


def read_corpus(config: ParallelTextConfig) -> Corpus:
    """Returns the corpus that `config` names. Training text is not read yet; validation and test text is.

    Raises:
        InputError: a file is missing; see also `ParallelFiles.pairs`.
    """
    folder = Path(config.folder)

    def part(source: str, target: str, weight: float = 1.0) -> ParallelFiles:
        return ParallelFiles(folder / source, folder / target, config, weight)

    weights = config.train_weights or (1.0,) * len(config.train_source)
    train = tuple(part(*each) for each in zip(config.train_source, config.train_target, weights, strict=True))
    for path in (path for files in train for path in (files.source, files.target) if not path.is_file()):
        next(iterate_lines(path))  # raises an error that says why
    return Corpus(
        train=train,
        validation=part(config.validation_source, config.validation_target).read(),
        test=part(config.test_source, config.test_target).read(),
    )
