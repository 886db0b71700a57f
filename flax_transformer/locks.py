"""Which process has a file for itself."""

from typing import IO, Any


def take_lock(file: IO[Any]) -> bool:
    """Returns whether this process alone has an open file from now on, until it closes it or ends.

    Where nothing can tell (Windows, some network file systems) it has.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
