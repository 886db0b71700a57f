"""The user's cache folder, for what can be made again: compiled programs, tokenizers and tokenised text."""

import os
from pathlib import Path

from flax_transformer.errors import InputError


def user_cache(name: str) -> Path:
    """Returns the folder $XDG_CACHE_HOME/flax_transformer/NAME, and makes it if it is missing.

    Raises:
        InputError: the folder cannot be made.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flax_transformer" / name
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        raise InputError(
            f"there is no folder to keep compiled programs and tokenised text in: {error}. Set XDG_CACHE_HOME to one "
            "that can be written."
        ) from error
    return folder
