"""Paths of run folders, which lie on a disk or on object storage (`gs://BUCKET/FOLDER`).

Object storage keeps whole objects by their names. A folder is the beginning of a name, and exists as long as an object
does. Nothing can be appended to, locked, or renamed at once. `etils.epath` reads and writes there, through gcsfs.
"""

import contextlib
import errno
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

from etils import epath

from flax_transformer.errors import ConfigError, InputError, shown

# Paths of `etils.epath` have the methods of `pathlib`, without being a class of it.
if TYPE_CHECKING:
    AnyPath = Path
else:
    AnyPath = Path | epath.Path

SCHEME = "gs"
# Others that `etils.epath` knows. Orbax writes arrays to none of them.
OTHER_SCHEMES = ("s3", "az", "hf", "http", "https", "file")


def any_path(path: AnyPath | str) -> AnyPath:
    """Returns a path on object storage for an address, and a path of the disk for all else.

    `pathlib` makes one slash of the two in an address, which is understood here, too.

    Raises:
        ConfigError: an address of storage that is not supported, or the package gcsfs is missing.
    """
    if isinstance(path, epath.Path) and on_object_storage(path):
        return path
    scheme, colon, rest = str(path).partition(":/")
    if not colon or scheme not in (SCHEME, *OTHER_SCHEMES):
        return Path(path)
    rest = rest.strip("/")
    if scheme != SCHEME or "/" not in rest:
        raise ConfigError(
            f"expected a folder of the disk or {SCHEME}://BUCKET/FOLDER, got {shown(f'{scheme}://{rest}')}. Checkpoints"
            " can be written to no other storage."
        )
    _prepare()
    return epath.Path(f"{SCHEME}://{rest}")  # type: ignore[bad-return]  # it only has the methods of `Path`


def on_object_storage(path: AnyPath) -> bool:
    """Returns whether a path lies on object storage."""
    return isinstance(path, epath.Path) and str(path).startswith(f"{SCHEME}://")


def resolved(path: AnyPath) -> AnyPath:
    """Returns an absolute path. An address is one already, and `etils.epath` would put the working folder before it."""
    return path if on_object_storage(path) else path.resolve()


def _prepare() -> None:
    """Checks that there is a library for object storage, and keeps it from caching lists of names.

    TensorStore and other processes write objects that a cached list would lack.

    Raises:
        ConfigError: the library is missing.
    """
    try:
        import fsspec.config
        import gcsfs  # noqa: F401  # fsspec finds it by itself
    except ImportError as error:
        raise ConfigError(
            f"a run folder on {SCHEME}:// needs the package gcsfs: pip install gcsfs. It finds the credentials "
            "of this machine."
        ) from error
    for name in ("gcs", "gs"):
        fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)


@contextlib.contextmanager
def storage_errors(path: AnyPath) -> Generator[None, None, None]:
    """Makes an error of object storage, of any class, an `OSError` inside a `with` block. The disk has no other class.

    Raises:
        OSError: the storage cannot be reached, or refuses.
    """
    try:
        yield
    # The clause is this wide because gcsfs has no common class of errors, and neither have the libraries below it.
    except Exception as error:
        if isinstance(error, OSError | MemoryError | InputError) or not on_object_storage(path):
            raise
        raise OSError(errno.ENETUNREACH, f"{type(error).__name__}: {error}", str(path)) from error
