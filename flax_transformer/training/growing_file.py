"""A text file of a run that grows at its end: metrics.jsonl and train.log."""

import time

from flax_transformer.object_storage import AnyPath, on_object_storage, storage_errors
from flax_transformer.small_files import write_atomically

# A bucket takes one version of an object a second. Each version of a growing file is a whole object.
SECONDS_BETWEEN_UPLOADS = 10.0


class GrowingFile:
    """A text file that grows at its end.

    On a disk each text is in the file when `append` returns. Object storage appends nothing: there the whole file is
    written anew, at most every `SECONDS_BETWEEN_UPLOADS`, and at `flush` and `close`.

    Args:
        path: the file. What it contains is kept.

    Raises:
        OSError: the file cannot be written. The methods raise it, too.
    """

    def __init__(self, path: AnyPath):
        self._path = path
        self._file, self._content, self._owed = None, bytearray(), False
        if not on_object_storage(path):
            self._file = path.open("a", encoding="utf-8")
            return
        with storage_errors(path):
            if path.exists():
                self._content += path.read_bytes()
        self._owed = True  # the file exists from now on, as it does on a disk
        self.flush()

    def append(self, text: str) -> None:
        """Adds text at the end."""
        if self._file is not None:
            self._file.write(text)
            self._file.flush()
            return
        self._content += text.encode()
        self._owed = True
        if time.monotonic() - self._written >= SECONDS_BETWEEN_UPLOADS:
            self.flush()

    def flush(self) -> None:
        """Returns when all text is in the file."""
        if self._owed:
            write_atomically(self._path, bytes(self._content))
            self._written, self._owed = time.monotonic(), False

    def close(self) -> None:
        """Closes the file."""
        self.flush()
        if self._file is not None:
            self._file.close()
