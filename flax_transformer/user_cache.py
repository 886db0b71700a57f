"""The folder in which this project keeps what can be made again: compiled programs, tokenizers, tokenised text."""

import os
from pathlib import Path


def user_cache(name: str) -> Path:
    """Returns the user's cache folder for a kind of thing, $XDG_CACHE_HOME/flax_transformer/NAME; it may not exist."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "flax_transformer" / name
