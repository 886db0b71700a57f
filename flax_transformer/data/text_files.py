"""Text files: lines of UTF-8, plain or compressed, in files, pipes and standard input.

The first bytes of a file say how it is compressed. Its name does not matter.
"""

import codecs
import collections
import importlib
import io
import re
import select
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from flax_transformer.errors import InputError

T = TypeVar("T")

# Some programs write it at the start of a UTF-8 file. It is not part of the text.
BYTE_ORDER_MARK = "\ufeff"

# The path that stands for standard input and standard output.
STANDARD_STREAM = Path("-")

# Of a longer text only the beginning is used. No model takes a sentence of this length.
MAX_CHARACTERS = 1_000_000

# A longer text keeps one character more, so that a reader of the line knows. A character has at most four bytes.
MAX_LINE_BYTES = 4 * (MAX_CHARACTERS + 1)

# Size of a block that is read.
BLOCK_BYTES = 1 << 16

# Characters of a chunk of lines, so that its memory is limited if its lines are long.
CHARACTERS_AT_ONCE = 4 * MAX_CHARACTERS

# A chunk waits for this time for more lines, so that a fast writer fills it.
SECONDS_FOR_MORE = 0.05


@dataclass(frozen=True)
class Compression:
    """A kind of compression in Python's standard library. Compressed texts may follow one another in a file.

    Attributes:
        name: name of the format.
        suffix: end of the name of a compressed file.
        beginning: pattern of the first bytes.
        module: module of the library. A Python may lack it.
    """

    name: str
    suffix: str
    beginning: bytes
    module: str

    @property
    def _library(self) -> Any:
        try:
            return importlib.import_module(self.module)
        except ImportError as error:
            raise InputError(
                f"{self.name} cannot be used, since this Python was built without the module {self.module}. Use plain "
                "text or gzip."
            ) from error

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """Exceptions that mean damaged data."""
        return (EOFError, zlib.error, OSError, getattr(self._library, "LZMAError", EOFError))

    def open(self, stream: Any) -> Any:
        """Returns the decompressed stream."""
        return self._library.open(stream, "rb")

    def compress(self, data: bytes) -> bytes:
        """Returns compressed data. Equal data give equal bytes."""
        return self._library.compress(data, mtime=0) if self.module == "gzip" else self._library.compress(data)


COMPRESSIONS = (
    Compression("gzip", ".gz", rb"\x1f\x8b", "gzip"),
    Compression("bzip2", ".bz2", rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", "bz2"),
    Compression("xz", ".xz", rb"\xfd7zXZ\x00", "lzma"),
)

# Formats that are recognised but not read, with the first bytes and a program that unpacks them.
UNREADABLE = (
    ("Zstandard", ".zst", rb"\x28\xb5\x2f\xfd", "zstd -d"),
    ("LZ4", ".lz4", rb"\x04\x22\x4d\x18", "lz4 -d"),
    ("ZIP", ".zip", rb"PK\x03\x04", "unzip"),
)


def compression_of(path: Path) -> Compression | None:
    """Returns the compression that the name of a file asks for; None for plain text.

    Raises:
        InputError: a kind of compression that this program cannot write.
    """
    suffix = path.suffix.lower()
    for name, unreadable, _, _ in UNREADABLE:
        if suffix == unreadable:
            raise InputError(
                f"{path}: {name} files cannot be written. Choose a name that ends in .gz, .bz2 or .xz, or plain text."
            )
    return next((each for each in COMPRESSIONS if suffix == each.suffix), None)


def text_suffix(path: Path) -> str:
    """Returns the suffix of a text file in lower case, without that of its compression."""
    name = path.name.lower()
    for each in COMPRESSIONS:
        name = name.removesuffix(each.suffix)
    return Path(name).suffix


def open_bytes(path: Path) -> Any:
    """Returns the bytes of a file, a pipe, a device or standard input, as a buffered stream.

    Raises:
        InputError: there is no such file, or it is a folder.
    """
    if path == STANDARD_STREAM:
        stream: Any = sys.stdin.buffer
        return stream if hasattr(stream, "peek") else io.BufferedReader(stream)
    try:
        return path.open("rb")
    except IsADirectoryError as error:
        raise InputError(f"{path} is a folder, and a text file is needed. Name a file in it.") from error
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: a path with a null character
        raise InputError(
            f"there is no text file at {path} (looked in {path.parent.absolute()}). Check the path."
        ) from error


class LineReader:
    """The lines of a text, one after the other, without their line ends ("\\n" or "\\r\\n").

    It is an iterator and a context manager. A line of more than `MAX_CHARACTERS` keeps only one character more.

    Args:
        path: a file, a pipe or a device; "-" is standard input.

    Attributes:
        name: name of the text in messages.
        number: number of lines so far.

    Raises:
        InputError: there is no such file. While lines are read: the file is damaged, has an unknown compression, or is
            not UTF-8.
    """

    def __init__(self, path: Path):
        self.name = "standard input" if path == STANDARD_STREAM else str(path)
        self.number = 0
        self._path = path
        self._bytes = open_bytes(path)
        self._compression: Compression | None = None
        self._stream: Any = None  # opened when the first line is needed, since that may wait for a writer
        self._complete: collections.deque[bytes] = collections.deque()
        self._begun = bytearray()  # beginning of a line whose end has not been read
        self._ended = False

    def __enter__(self) -> "LineReader":
        return self

    def __exit__(self, *_) -> None:
        if self._path != STANDARD_STREAM:
            self._bytes.close()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while not self._complete:
            if self._ended:
                raise StopIteration
            self._read()
        line = self._complete.popleft()
        self.number += 1
        try:
            text, _ = codecs.utf_8_decode(line, "strict", len(line) < MAX_LINE_BYTES)
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self.name}, line {self.number}: not valid UTF-8 ({error.reason} at byte {error.start} of the line). "
                "Convert the file, for example with iconv -t UTF-8, or mend the line."
            ) from error
        text = text.removesuffix("\r")[: MAX_CHARACTERS + 1]
        return text.removeprefix(BYTE_ORDER_MARK) if self.number == 1 else text

    def next_has_arrived(self, deadline: float) -> bool:
        """Returns whether the next line, or the end, can be read without waiting for a program that writes it.

        The answer is always True for compressed text, and on systems that cannot say this of a pipe.

        Args:
            deadline: time of `time.monotonic` until which the method waits.
        """
        while not (self._complete or self._ended or self._compression):
            try:
                arrived, _, _ = select.select([self._bytes], [], [], max(0.0, deadline - time.monotonic()))
            except (OSError, ValueError):  # no file of the system, or Windows
                return True
            if not arrived:
                return False
            self._read()
        return True

    def _read(self) -> None:
        """Reads the next block, whatever its size is.

        Raises:
            InputError: the file is damaged, or its compression is unknown.
        """
        if self._stream is None:
            self._stream = self._decompressed()
        errors = (OSError,) if self._compression is None else self._compression.errors
        try:
            block = self._stream.read1(BLOCK_BYTES)
        except errors as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise InputError(f"{self.name} cannot be read: {error.strerror}.") from error
            kind = "text" if self._compression is None else self._compression.name
            raise InputError(
                f"{self.name}, after line {self.number}: not a whole {kind} file ({error}). Get the file again."
            ) from error
        rest, *lines = block.split(b"\n")
        self._begun += rest
        del self._begun[MAX_LINE_BYTES:]
        self._ended = not block
        if lines or self._ended and self._begun:  # the last line of a file may have no line end
            self._complete.append(bytes(self._begun))
            self._complete.extend(lines[:-1])
            self._begun = bytearray(lines[-1] if lines else b"")

    def _decompressed(self) -> Any:
        """Returns the stream of text.

        Raises:
            InputError: the file has a compression that is not read, or lacks the one that its name promises.
        """
        beginning = self._bytes.peek(16)
        for each in COMPRESSIONS:
            if re.match(each.beginning, beginning):
                self._compression = each
                return each.open(self._bytes)
        for name, _, pattern, program in UNREADABLE:
            if re.match(pattern, beginning):
                raise InputError(
                    f"{self.name} is compressed by {name}, which is not read here. Unpack it first, for example with "
                    f"{program}."
                )
        promised = next((each for each in COMPRESSIONS if self._path.suffix.lower() == each.suffix), None)
        if promised is not None and beginning:
            raise InputError(
                f"{self.name}: not a whole {promised.name} file, but its name ends in {self._path.suffix}. Get the "
                "file again, or remove the suffix if it is plain text."
            )
        return self._bytes


def iterate_lines(path: Path) -> Iterator[str]:
    """Yields the lines of a text. It raises the errors of `LineReader`."""
    with LineReader(path) as lines:
        yield from lines


def chunks_of(
    items: Iterator[T], most: int, size: Callable[[T], int], has_arrived: Callable[[float], bool]
) -> Iterator[list[T]]:
    """Yields all items in lists. A list ends early if the next item has not arrived yet, or if its items are large.

    An error of the iterator is raised after the items before it.

    Args:
        items: the items, such as lines.
        most: most items of a list.
        size: returns the number of characters of an item.
        has_arrived: see `LineReader.next_has_arrived`.
    """
    for first in items:
        chunk, characters, error = [first], size(first), None
        deadline = time.monotonic() + SECONDS_FOR_MORE
        try:
            while len(chunk) < most and characters < CHARACTERS_AT_ONCE and has_arrived(deadline):
                chunk.append(next(items))
                characters += size(chunk[-1])
        except StopIteration:
            pass
        except InputError as bad_item:
            error = bad_item
        yield chunk
        if error is not None:
            raise error
