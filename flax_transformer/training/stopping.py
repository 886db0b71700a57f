"""Early ends of a training: early stopping, and signals."""

import contextlib
import math
import signal
import threading
from collections.abc import Generator
from typing import Any


class Patience:
    """Patience of early stopping, which counts evaluations without a new best.

    Args:
        limit: number of evaluations in a row without a new best that exhausts the patience; 0 is no limit.
        history: qualities of earlier evaluations if a run is resumed.
    """

    def __init__(self, limit: int, history: list[float]):
        self.limit = limit
        self.best = -math.inf
        self.since_best = 0
        for quality in history:
            self.note(quality)

    def note(self, quality: float) -> None:
        """Counts one more evaluation. A higher quality is better."""
        better = quality > self.best
        self.since_best = 0 if better else self.since_best + 1
        self.best = max(self.best, quality)

    @property
    def exhausted(self) -> bool:
        """Whether the training should stop."""
        return 0 < self.limit <= self.since_best


class _Stopped(BaseException):
    """Exception that ends `StopRequest.interrupting`. It is no `Exception`, so no handler of errors catches it."""


class StopRequest:
    """Context that turns SIGTERM and SIGINT into a flag. A second signal acts as usual.

    Python delivers signals to the main thread alone. In other threads this context does nothing.
    """

    def __init__(self):
        self.signal: int | None = None
        self._interrupts = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def interrupting(self) -> Generator[None, None, None]:
        """Lets a signal interrupt a `with` block, which must tolerate that."""
        self._interrupts = True
        try:
            yield
        except _Stopped:
            pass
        finally:
            self._interrupts = False

    def _note(self, number: int, _frame: Any) -> None:
        self.signal = number
        for each, handler in self._previous.items():
            signal.signal(each, handler)
        if self._interrupts:
            raise _Stopped
