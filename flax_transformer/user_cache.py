"""The user's cache folder, for what can be made again: compiled programs, tokenizers and tokenised text.

Nothing needs it. Without a folder that can be written, the cache lasts as long as the process.
"""

import atexit
import contextlib
import functools
import os
import shutil
import sys
import tempfile
import zlib
from pathlib import Path


def writable_cache(name: str) -> Path | None:
    """Returns the folder $XDG_CACHE_HOME/flax_transformer/NAME, made if it is missing; None if it cannot be written."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flax_transformer" / name
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


def user_cache(name: str) -> Path:
    """Returns the folder of `writable_cache`, or a temporary one until the process ends."""
    folder = writable_cache(name)
    if folder is None:
        folder = _temporary_cache() / name
        folder.mkdir(exist_ok=True)
    return folder


# First bytes of an entry that JAX has compressed by Zstandard. Where that library is missing it takes zlib.
ZSTANDARD = b"\x28\xb5\x2f\xfd"

# Empty file in the folder of compiled programs. Entries that are older than this file have been checked.
CHECKED = "checked"


def remove_damaged_programs(folder: Path) -> None:
    """Removes the compiled programs that a kill or a full disk has cut short.

    JAX never replaces an entry of its cache. It would warn of such an entry and compile again, at each start. Only
    entries that are new since the last call are read.
    """
    checked, entries, since = folder / CHECKED, [], 0.0
    with contextlib.suppress(OSError):
        since = checked.stat().st_mtime if checked.exists() else 0.0
        checked.touch()  # first, so that the next call reads what other processes write from now on
        entries = [*folder.glob("*-cache")]
    for entry in entries:
        with contextlib.suppress(OSError):  # other processes remove entries, too
            if entry.stat().st_mtime >= since and not _is_whole(entry.read_bytes()):
                entry.unlink(missing_ok=True)


def _is_whole(program: bytes) -> bool:
    """Returns whether a compressed program can be unpacked; True if the library for that is missing."""
    if program.startswith(ZSTANDARD):
        try:
            import zstandard  # type: ignore[missing-import]  # JAX uses it where it is installed
        except ImportError:
            return True
        try:
            zstandard.ZstdDecompressor().decompress(program)
        except zstandard.ZstdError:
            return False
        return True
    try:
        zlib.decompress(program)
    except zlib.error:
        return False
    return True


@functools.cache
def _temporary_cache() -> Path:
    """Returns the cache folder of this process, which is removed at its end."""
    folder = Path(tempfile.mkdtemp(prefix="flax_transformer_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    print(
        "warning: there is no cache folder that can be written, so tokenizers and tokenised text are made anew in each "
        f"process, in {folder}. Set XDG_CACHE_HOME to keep them.",
        file=sys.stderr,
    )
    return folder
