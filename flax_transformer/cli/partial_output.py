"""Outputs of lines: streams, and files that have a temporary name until they are complete.

A file whose name ends in .gz, .bz2 or .xz is compressed.
"""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flax_transformer.data.text_files import STANDARD_STREAM, compression_of
from flax_transformer.errors import InputError, shown, writing
from flax_transformer.locks import take_lock
from flax_transformer.small_files import as_dataclass, parse_object, sealed, unsealed, write_atomically


@dataclass(frozen=True)
class OutputProgress:
    """The progress of an output.

    Attributes:
        lines: number of complete lines.
        translated: number of these lines that have a translation with a token.
        size: number of bytes of the file with these lines.
        source: SHA-256 of their input lines.
        faulty: whether an input line was cut, or an output is missing or lacks a required phrase.
        settings: settings that determine the output.
    """

    lines: int
    translated: int
    size: int
    source: str
    faulty: bool
    settings: dict[str, Any]


def digest_of(lines: list[str], digest: Any = None) -> Any:
    """Returns the digest of lines; with `digest`, that one is updated."""
    digest = hashlib.sha256() if digest is None else digest
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest


NOTHING = OutputProgress(0, 0, 0, digest_of([]).hexdigest(), False, {})


def is_stream(path: Path) -> bool:
    """Returns whether a path is no file that can be made or replaced, but "-", a pipe, or a device."""
    if path == STANDARD_STREAM or path.parent in (Path("/dev"), Path("/dev/fd")):
        return True
    return path.exists() and not (path.is_file() or path.is_dir())


def encoded(path: Path | None) -> Callable[[list[str]], bytes]:
    """Returns a function from lines to the bytes that a file of this name holds; a stream has the name None."""
    compression = None if path is None else compression_of(path)

    def encode(lines: list[str]) -> bytes:
        data = "".join(f"{line}\n" for line in lines).encode()  # UTF-8 in every locale, like the input
        return data if compression is None else compression.compress(data)

    return encode


class StreamOutput:
    """Writes lines to standard output, a pipe or a device. It cannot be resumed.

    Args:
        path: path of the stream; "-" is standard output.
    """

    def __init__(self, path: Path = STANDARD_STREAM):
        self.progress = NOTHING
        self._path = path
        self._encode = encoded(None)

    def __enter__(self) -> "StreamOutput":
        self._stream = sys.stdout.buffer if self._path == STANDARD_STREAM else self._path.open("ab")
        return self

    def __exit__(self, *_) -> None:
        if self._path != STANDARD_STREAM:
            with writing(self._path):
                self._stream.close()

    def write(self, lines: list[str], source: str, faulty: bool, translated: int) -> None:
        """Writes lines. The other arguments are not used."""
        with writing(self._path):
            self._stream.write(self._encode(lines))
            self._stream.flush()


@contextlib.contextmanager
def output_of_lines(path: Path, inputs: Sequence[Path]) -> Generator[Callable[[list[str]], Any], None, None]:
    """Opens an output, and gives a function that writes all of its lines.

    A file is replaced at the end of the `with` block. After an error it is as before. A symbolic link stays one.

    Args:
        path: a file or a stream.
        inputs: files that must not be replaced.

    Raises:
        InputError: the path cannot be an output, or it is an input. Nothing has been done then.
        OSError: the folder cannot be written.
    """
    for each in inputs:
        if path.is_file() and each.is_file() and path.samefile(each):
            raise InputError(f"--output {path} is the file {each} that is read, too. Choose another name.")
    if is_stream(path):
        with StreamOutput(path) as stream:
            yield lambda lines: stream.write(lines, "", False, 0)
        return
    encode, path = check_file(path), Path(os.path.realpath(path))
    new = path.with_name(f"{path.name}.unfinished")
    try:
        with writing(path), new.open("wb") as file:
            yield lambda lines: file.write(encode(lines))
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def check_file(path: Path) -> Callable[[list[str]], bytes]:
    """Checks the path of an output file, and returns the function of `encoded`.

    Raises:
        InputError: there is no folder for the file, the path is a folder, or the name asks for an unknown compression.
    """
    if path.is_dir():
        raise InputError(f"--output {path} is a folder. Name a file.")
    if not path.parent.is_dir():
        raise InputError(f"--output {path}: there is no folder {path.parent}. Make it first.")
    return encoded(path)


class PartialOutput:
    """Writes lines to NAME.partial, and the progress to NAME.partial.json.

    Use it in a `with` statement. If that ends without an error, NAME.partial becomes NAME. After an error the output
    can be resumed after the last complete `write`, with the same settings and the same source. An output in which no
    line is translated begins anew.

    Args:
        path: the file NAME.
        settings: settings that determine the output, as JSON values.
        resume: whether to resume an incomplete output.

    Raises:
        InputError: the file exists already, or an incomplete one exists and `resume` is not set. Or other settings made
            it, its record cannot be read, or another process is writing it.
    """

    def __init__(self, path: Path, settings: dict[str, Any], resume: bool):
        self._encode = check_file(path)
        self.path = path
        self._partial = path.with_name(path.name + ".partial")
        self._record = path.with_name(path.name + ".partial.json")
        if path.exists():
            raise InputError(f"--output {path} is there already. Choose another name, or remove it.")
        if self._partial.exists() and not resume:
            raise InputError(
                f"{self._partial} is there from a translation that was interrupted. Go on with it by --resume, or "
                "remove it."
            )
        self._settings = json.loads(json.dumps(settings))
        self.progress = self._recorded()
        changed = [name for name, value in self._settings.items() if self.progress.settings.get(name) != value]
        if changed:
            name = changed[0]
            raise InputError(
                f"--resume: {self._partial} was made with other settings: {name} was "
                f"{shown(self.progress.settings.get(name))} and is {shown(self._settings[name])}. Use the same, or "
                "remove the file to begin anew."
            )

    def _recorded(self) -> OutputProgress:
        """Returns the progress that is recorded."""
        nothing = replace(NOTHING, settings=self._settings)
        if not (self._record.exists() and self._partial.exists() and self._partial.stat().st_size):
            return nothing
        try:
            record = unsealed(parse_object(self._record.read_bytes()))
            # An early version did not count the translations, and wrote no record without one.
            progress = as_dataclass(OutputProgress, {"translated": record.get("lines")} | record)
            if not 0 <= progress.translated <= progress.lines or progress.size < 0:
                raise ValueError(
                    f"it counts {progress.lines} lines, {progress.translated} translations and {progress.size} bytes"
                )
            return progress if progress.translated else nothing
        except ValueError as error:
            raise InputError(
                f"--resume: {self._record} cannot be read ({error}), so the progress of {self._partial} is not known. "
                "Remove both to begin anew."
            ) from error

    def __enter__(self) -> "PartialOutput":
        self._file = self._partial.open("ab+")
        try:
            locked = take_lock(self._file) is not False
            if not locked or self._moved():
                if locked and os.fstat(self._file.fileno()).st_size == 0:
                    self._partial.unlink(missing_ok=True)  # `open` has just created it
                raise InputError(
                    f"another process is writing {self._partial}. Wait for it, or choose another --output."
                )
            if os.fstat(self._file.fileno()).st_size < self.progress.size:
                raise InputError(
                    f"--resume: {self._partial} has fewer lines than the {self.progress.lines:,} that were written. It "
                    "has been changed; remove it to begin anew."
                )
        except InputError:
            self._file.close()
            raise
        self._file.truncate(self.progress.size)  # removes lines of an incomplete `write`
        return self

    def _moved(self) -> bool:
        """Returns whether another process has written the output since its progress was read."""
        if self.path.exists() or self._recorded() != self.progress:
            return True
        return not (self._partial.exists() and os.path.samestat(os.fstat(self._file.fileno()), self._partial.stat()))

    def __exit__(self, kind: Any, *_) -> None:
        if kind is None:
            os.replace(self._partial, self.path)
        elif self.progress.translated == 0:  # there is nothing to resume
            self._partial.unlink()
        if kind is None or self.progress.translated == 0:
            self._record.unlink(missing_ok=True)
        self._file.close()  # last, since this releases the lock

    def write(self, lines: list[str], source: str, faulty: bool, translated: int) -> None:
        """Writes lines, and records that they are complete.

        Args:
            lines: lines without line ends.
            source: SHA-256 of all input lines so far.
            faulty, translated: see `OutputProgress`, for these lines.
        """
        before, data = self.progress, self._encode(lines)
        with writing(self._partial):
            self._file.write(data)
            self._file.flush()
            os.fsync(self._file.fileno())  # before the record, which may not say more than there is
            self.progress = OutputProgress(
                lines=before.lines + len(lines),
                translated=before.translated + translated,
                size=before.size + len(data),
                source=source,
                faulty=before.faulty or faulty,
                settings=before.settings,
            )
            write_atomically(self._record, json.dumps(sealed(asdict(self.progress))))
