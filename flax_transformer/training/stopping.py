"""What ends a training before its last step: evaluations that no longer improve, or a signal."""

import contextlib
import math
import signal
import threading
from collections.abc import Generator
from typing import Any


class Patience:
    """Says when evaluations have not become better for too long.

    Args:
        limit: evaluations in a row without a new best; 0 is for ever.
        history: qualities of earlier evaluations, when a run goes on.
    """

    def __init__(self, limit: int, history: list[float]):
        self.limit = limit
        self.best = -math.inf
        self.since_best = 0
        for quality in history:
            self.note(quality)

    def note(self, quality: float) -> None:
        """Takes over one more evaluation; the higher the better."""
        better = quality > self.best
        self.since_best = 0 if better else self.since_best + 1
        self.best = max(self.best, quality)

    @property
    def exhausted(self) -> bool:
        """Whether it is time to stop."""
        return 0 < self.limit <= self.since_best


class _Stopped(BaseException):
    """What `StopRequest.interrupting` ends by: no error, so that nothing on the way takes it for one."""


class StopRequest:
    """Turns SIGTERM and SIGINT into a flag while it is entered; a second signal acts as usual.

    Python delivers signals to the main thread alone; in any other this does nothing.
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
        """Ends what is done inside it at the signal; it must be something that can be left half done."""
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
