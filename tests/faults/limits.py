"""Limits on time and memory, which no input may break."""

import contextlib
import time
from collections.abc import Generator
from pathlib import Path

SECONDS = 1.0
MEBIBYTES = 200


@contextlib.contextmanager
def within_limits(seconds: float = SECONDS, mebibytes: float = MEBIBYTES) -> Generator[None, None, None]:
    """Fails if a `with` block takes more CPU time or more memory. Memory is measured on Linux alone.

    The time is that of this process, since other processes may keep the cores busy.
    """
    before, started = _peak_of_memory(), time.process_time()
    yield
    taken, grown = time.process_time() - started, _peak_of_memory(reset=False) - before
    assert taken <= seconds, f"{taken:.2f} s of CPU time"
    assert grown <= mebibytes, f"{grown:.0f} MiB of memory"


def _peak_of_memory(reset: bool = True) -> float:
    """Returns the largest resident memory of this process in MiB since the last reset."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        return 0.0
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
