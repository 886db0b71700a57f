"""Parallel text: sentence n of one side translates sentence n of the other."""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

from flax_transformer.data.text_files import STANDARD_STREAM, LineReader, text_suffix
from flax_transformer.errors import ConfigError, InputError, check_fields, shown


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
    """Sentences and their translations in memory, in lists of the same length; satisfies `TextPart`.

    Example:
        >>> text = ParallelText(["one", "two"], ["eins", "zwei"], name="numbers")
        >>> list(text.pairs())
        [('one', 'eins'), ('two', 'zwei')]
    """

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
    """The three parts of a corpus. Models and tokenizers learn from `train` alone.

    Example:
        >>> text = ParallelText(["one", "two"], ["eins", "zwei"])
        >>> corpus = Corpus(train=(text,), validation=text, test=text)
        >>> list(corpus.train[0].pairs())
        [('one', 'eins'), ('two', 'zwei')]
    """

    train: tuple[TextPart, ...]
    validation: ParallelText
    test: ParallelText


@dataclass(frozen=True)
class ParallelTextConfig:
    """Settings of parallel text: files in UTF-8.

    Each line of a text file is a sentence; the other side is another file. Each line of a .tsv file is a pair, in
    columns. Each line of a .jsonl file is a JSON object with both sides of a pair, where line breaks become spaces.
    A .tsv or .jsonl file is named on both sides. Files that gzip, bzip2 or xz have compressed are recognised by their
    content.

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

    Raises:
        ConfigError: a value is out of range, or fields contradict each other.

    Example:
        >>> config = ParallelTextConfig(folder="data/multi30k", train_source=("train.en",), train_target=("train.de",))
        >>> config.kind, config.train_source
        ('parallel_text', ('train.en',))
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
        check_fields("data", self)
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


class SentenceReader(LineReader):
    """The sentences of one side of a file. The name of the file gives its format, see `ParallelTextConfig`.

    Args:
        path: see `LineReader`.
        column: column of the sentences in a .tsv file, counted from 1.
        key: key of the sentences in a .jsonl file.

    Raises:
        InputError: a line lacks the column or the key; see also `LineReader`.
    """

    def __init__(self, path: Path, column: int, key: str):
        super().__init__(path)
        self._column, self._key = column, key
        self._read_sentence = {".tsv": self._of_columns, ".jsonl": self._of_object}.get(text_suffix(path), str)

    def __next__(self) -> str:
        return self._read_sentence(super().__next__())

    def _of_columns(self, line: str) -> str:
        columns = line.split("\t")
        if len(columns) < self._column:
            raise InputError(
                f"{self.name}, line {self.number}: expected at least {self._column} columns with tabs between them, "
                f"found {len(columns)}. Mend the line, or set data.source_column and data.target_column."
            )
        return columns[self._column - 1]

    def _of_object(self, line: str) -> str:
        try:
            sentence = json.loads(line)[self._key]
            sentence.encode()  # fails for lone surrogates, which JSON may contain
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            sentence = None
        if not isinstance(sentence, str):
            raise InputError(
                f"{self.name}, line {self.number}: expected a JSON object with a text under the key "
                f"{shown(self._key)}. Mend the line, or set data.source_key and data.target_key."
            )
        return " ".join(sentence.splitlines())


class PairReader:
    """The sentence pairs of two files, or of one, in order. It is an iterator and a context manager.

    Raises:
        InputError: the two sides have different numbers of sentences, or none; see also `SentenceReader`.
    """

    def __init__(self, files: "ParallelFiles"):
        config = files.config
        self.number = 0
        self._files = files
        self._source = SentenceReader(files.source, config.source_column, config.source_key)
        self._target = SentenceReader(files.target, config.target_column, config.target_key)

    def __enter__(self) -> "PairReader":
        return self

    def __exit__(self, *_) -> None:
        self._source.__exit__()
        self._target.__exit__()

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return self

    def __next__(self) -> tuple[str, str]:
        source, target = next(self._source, None), next(self._target, None)
        if source is None or target is None:
            self._check_numbers()
            raise StopIteration
        self.number += 1
        return source, target

    def next_has_arrived(self, deadline: float) -> bool:
        """Returns whether both sides have their next line; see `LineReader.next_has_arrived`."""
        return self._source.next_has_arrived(deadline) and self._target.next_has_arrived(deadline)

    def _check_numbers(self) -> None:
        """Reads the side that is left. Raises an `InputError` for different numbers of sentences, or for none."""
        for _ in itertools.chain(self._source, self._target):
            pass
        counts = self._source.number, self._target.number
        if counts[0] != counts[1]:
            raise InputError(
                f"parallel files must have the same number of lines, but {self._files.source} has {counts[0]} and "
                f"{self._files.target} has {counts[1]}. Line n of one must translate line n of the other."
            )
        if not self.number:
            raise InputError(f"{self._files.name}: no line; at least one sentence pair is needed.")


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
        suffixes = [[suffix.lower() for suffix in path.suffixes] for path in (self.source, self.target)]
        digest = hashlib.sha256(repr((*suffixes, how)).encode())
        self.check(repeatedly=True)
        for path in (self.source, self.target):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def check(self, repeatedly: bool = False) -> None:
        """Checks what can be seen of the files without reading their lines.

        Args:
            repeatedly: whether the files are read more than once, which a pipe cannot be.

        Raises:
            InputError: there is no such file, a file cannot be read repeatedly, or both sides would be the same text.
        """
        config, paths = self.config, (self.source, self.target)
        for path in paths:
            if path != STANDARD_STREAM and (not path.exists() or path.is_dir()):
                LineReader(path)  # raises an error that says why
        same = self.source == self.target or (
            STANDARD_STREAM not in paths and os.path.samefile(self.source, self.target)
        )
        for path in paths:
            if (repeatedly or same) and not path.is_file():
                raise InputError(f"{path} is a pipe or a device, and it is read twice. Write its text to a file first.")
        if not same:
            return
        sides = {
            ".tsv": ("column", config.source_column, config.target_column),
            ".jsonl": ("key", config.source_key, config.target_key),
        }
        if (suffix := text_suffix(self.source)) not in sides:
            raise InputError(
                f"{self.source} is named for both sides, so each line would be its own translation. Name two files, or "
                "a .tsv or .jsonl file, which has both sides."
            )
        name, source, target = sides[suffix]
        if source == target:
            raise InputError(
                f"{self.source}: source and target are both {name} {shown(source)}, so each line would be its own "
                f"translation. Set data.source_{name} and data.target_{name}."
            )

    def open(self) -> PairReader:
        """Returns the reader of the pairs. It raises the errors of `check`."""
        self.check()
        return PairReader(self)

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Yields the sentence pairs in order.

        Raises:
            InputError: see `check` and `PairReader`.
        """
        with self.open() as pairs:
            yield from pairs

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
    for files in train:
        files.check(repeatedly=True)
    return Corpus(
        train=train,
        validation=part(config.validation_source, config.validation_target).read(),
        test=part(config.test_source, config.test_target).read(),
    )
