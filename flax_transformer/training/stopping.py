"""Early ends of a training: early stopping, and signals."""

import math
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flax_transformer.parallel import processes
from flax_transformer.parallel.mesh import all_devices_sharding, replicated_sharding
from flax_transformer.parallel.placement import put, spans_processes

# Signals that ask a training to stop. Windows has no SIGHUP.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))

# Time after a signal in which further signals belong to the same request. `timeout` sends SIGTERM twice, to a process
# and to its group. A terminal that closes sends SIGHUP, and so does its shell.
SECONDS_OF_COPIES = 0.25

# Votes on a stop that several processes make together are so many steps apart.
STEPS_BETWEEN_VOTES = 4

Result = TypeVar("Result")


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


class StopVote:
    """The vote of all processes on whether to stop. All stop after the same step, whichever of them got a signal.

    The devices find the result. It is read at the next vote, so that no process waits for the devices.

    Args:
        mesh: devices of all processes.
    """

    def __init__(self, mesh: Mesh):
        self._shared = spans_processes(mesh)
        self._sharding = all_devices_sharding(mesh)
        self._highest = jax.jit(jnp.max, out_shardings=replicated_sharding(mesh))
        self._voted: jax.Array | None = None
        self._signal: int | None = None

    def result(self, step: int, signal: int | None) -> int | None:
        """Returns the signal that stops the training after `step`, or None.

        Args:
            step: number of the newest update. All processes call for each step.
            signal: signal that this process got, or None.
        """
        if not self._shared:
            return signal
        if step % STEPS_BETWEEN_VOTES == 0:
            if self._voted is not None:
                self._signal = int(self._voted) or None
            self._voted = self._highest(put(np.full(self._sharding.mesh.size, signal or 0, np.int32), self._sharding))
        return self._signal

    def last_result(self, signal: int | None) -> int | None:
        """Returns the signal of any process, after the last step. All processes call it once."""
        if not self._shared:
            return signal
        return max(filter(None, processes.exchange(signal)), default=None)


class _Stopped(BaseException):
    """Exception that ends `StopRequest.interruptible`. It is no `Exception`, so no handler of errors catches it."""


class StopRequest:
    """Context that turns SIGTERM, SIGINT and SIGHUP into a flag. A second signal acts as usual.

    A signal that the process ignores stays ignored; `nohup` has SIGHUP ignored. Python delivers signals to the main
    thread alone. In other threads this context does nothing.
    """

    def __init__(self):
        self.signal: int | None = None
        self._interrupts = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def interruptible(self, function: Callable[..., Result], *arguments: Any) -> Result | None:
        """Returns the result of a function, or None if a signal came before its end. It must tolerate an early end.

        Several processes work together until its end.
        """
        if processes.joined():  # one process alone must not leave a computation of all
            return function(*arguments)
        if self.signal is not None:
            return None
        try:  # a signal may raise at every call in this block, the last one included
            self._interrupts = True
            return function(*arguments)
        except _Stopped:
            return None
        finally:
            self._interrupts = False

    def _note(self, number: int, _frame: Any) -> None:
        if self.signal is not None:  # a copy, which came while the first one is handled
            return
        self.signal = number
        time.sleep(SECONDS_OF_COPIES)
        for each, handler in self._previous.items():
            signal.signal(each, handler)
        if self._interrupts:
            raise _Stopped
