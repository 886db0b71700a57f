"""The user's cache folder, for what can be made again: compiled programs, tokenizers and tokenised text.

Nothing needs it. Without a folder that can be written, the cache lasts as long as the process.
"""

import atexit
import functools
import os
import shutil
import sys
import tempfile
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
