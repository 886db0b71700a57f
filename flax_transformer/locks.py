"""Locks on files, between processes."""

from typing import IO, Any


def take_lock(file: IO[Any]) -> bool | None:
    """Returns whether this process gets the lock of an open file, which it keeps until it closes the file or ends.

    Windows and some network file systems have no such locks. There the function always returns None.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
