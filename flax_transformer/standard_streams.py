"""Standard output and standard error of a process whose results are files."""

import contextlib
import io
import os
import sys
from collections.abc import Generator
from typing import Any


def escape_unknown_characters(stream: Any) -> None:
    """Makes a text stream escape the characters that its encoding lacks, such as letters in the locale "C"."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


class LossyStream:
    """Text stream that never raises an `OSError`: text that cannot be written is lost.

    The reader of a pipe may have gone, a terminal may be closed, or the disk of a file may be full. After the first
    such error the stream's descriptor leads to the null device, so that Python can flush the stream at its end.
    Characters that the encoding lacks are escaped.

    Args:
        stream: stream that takes the text.
    """

    def __init__(self, stream: Any):
        self._stream = stream
        escape_unknown_characters(stream)

    def write(self, text: str) -> int:
        """Writes text, and returns its length."""
        with self._losing():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes the stream."""
        with self._losing():
            self._stream.flush()

    @contextlib.contextmanager
    def _losing(self) -> Generator[None, None, None]:
        try:
            yield
        except OSError:
            with contextlib.suppress(OSError):  # a stream of a notebook has no descriptor
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lossy_standard_streams(output: bool = True) -> Generator[None, None, None]:
    """Makes the standard streams lossy, in a `with` block or in a function that it decorates.

    Args:
        output: whether standard output is lossy. Standard error is lossy in any case.
    """
    streams: dict[Any, Any] = {contextlib.redirect_stderr: sys.stderr}
    if output:
        streams[contextlib.redirect_stdout] = sys.stdout
    with contextlib.ExitStack() as redirected:
        for redirect, stream in streams.items():
            if stream is not None:  # a process may have been started without it
                redirected.enter_context(redirect(LossyStream(stream)))
        yield
