"""An output file that has a temporary name until it is complete, and can be resumed until then."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flax_transformer.errors import InputError, shown
from flax_transformer.locks import take_lock
from flax_transformer.small_files import as_dataclass, parse_object, sealed, unsealed, write_atomically


@dataclass(frozen=True)
class Progress:
    """The progress of an output.

    Attributes:
        lines: number of complete lines.
        source: SHA-256 of their input lines.
        faulty: whether an input line was cut, or an output is missing or lacks a required phrase.
        settings: settings that determine the output.
    """

    lines: int
    source: str
    faulty: bool
    settings: dict[str, Any]


def digest_of(lines: list[str], digest: Any = None) -> Any:
    """Returns the digest of lines; with `digest`, that one is updated."""
    digest = hashlib.sha256() if digest is None else digest
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest


class StandardOutput:
    """Writes lines to standard output, which cannot be resumed."""

    def __init__(self, stream: Any):
        self.stream = stream
        self.progress = Progress(0, digest_of([]).hexdigest(), False, {})

    def __enter__(self) -> "StandardOutput":
        return self

    def __exit__(self, *_) -> None:
        pass

    def write(self, lines: list[str], source: str, faulty: bool) -> None:
        """Writes lines. The other arguments are not used."""
        self.stream.write("".join(f"{line}\n" for line in lines).encode())  # UTF-8 in every locale, like the input
        self.stream.flush()


class PartialOutput:
    """Writes lines to NAME.partial, and the progress to NAME.partial.json.

    Use it in a `with` statement. If that ends without an error, NAME.partial becomes NAME. After an error the output
    can be resumed after the last complete `write`, with the same settings and the same source.

    Args:
        path: the file NAME.
        settings: settings that determine the output, as JSON values.
        resume: whether to resume an incomplete output.

    Raises:
        InputError: the file exists already, or an incomplete one exists and `resume` is not set. Or other settings made
            it, its record cannot be read, or another process is writing it.
    """

    def __init__(self, path: Path, settings: dict[str, Any], resume: bool):
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
        if not path.parent.is_dir():
            raise InputError(f"--output {path}: there is no folder {path.parent}. Make it first.")
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

    def _recorded(self) -> Progress:
        """Returns the progress that is recorded."""
        nothing = Progress(0, digest_of([]).hexdigest(), False, self._settings)
        if not (self._record.exists() and self._partial.exists() and self._partial.stat().st_size):
            return nothing
        try:
            progress = as_dataclass(Progress, unsealed(parse_object(self._record.read_bytes())))
            if progress.lines < 0:
                raise ValueError(f"it counts {progress.lines} lines")
            return progress
        except ValueError as error:
            raise InputError(
                f"--resume: {self._record} cannot be read ({error}), so the progress of {self._partial} is not known. "
                "Remove both to begin anew."
            ) from error

    def __enter__(self) -> "PartialOutput":
        self._file = self._partial.open("ab+")
        try:
            locked = take_lock(self._file)
            if not locked or self._moved():
                if locked and os.fstat(self._file.fileno()).st_size == 0:
                    self._partial.unlink(missing_ok=True)  # `open` has just created it
                raise InputError(
                    f"another process is writing {self._partial}. Wait for it, or choose another --output."
                )
            self._file.seek(0)
            if any(not self._file.readline().endswith(b"\n") for _ in range(self.progress.lines)):
                raise InputError(
                    f"--resume: {self._partial} has fewer lines than the {self.progress.lines:,} that were written. It "
                    "has been changed; remove it to begin anew."
                )
        except InputError:
            self._file.close()
            raise
        self._file.truncate(self._file.tell())  # removes lines of an incomplete `write`
        return self

    def _moved(self) -> bool:
        """Returns whether another process has written the output since its progress was read."""
        if self.path.exists() or self._recorded() != self.progress:
            return True
        return not (self._partial.exists() and os.path.samestat(os.fstat(self._file.fileno()), self._partial.stat()))

    def __exit__(self, kind: Any, *_) -> None:
        if kind is None:
            os.replace(self._partial, self.path)
        elif self.progress.lines == 0:  # there is nothing to resume
            self._partial.unlink()
        if kind is None or self.progress.lines == 0:
            self._record.unlink(missing_ok=True)
        self._file.close()  # last, since this releases the lock

    def write(self, lines: list[str], source: str, faulty: bool) -> None:
        """Writes lines, and records that they are complete.

        Args:
            lines: lines without line ends.
            source: SHA-256 of all input lines so far.
            faulty: see `Progress`, for these lines.
        """
        before = self.progress
        self._file.write("".join(f"{line}\n" for line in lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())  # before the record, which may not say more than there is
        self.progress = Progress(before.lines + len(lines), source, before.faulty or faulty, before.settings)
        write_atomically(self._record, json.dumps(sealed(asdict(self.progress))))
