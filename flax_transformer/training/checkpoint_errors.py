"""Errors of checkpoints: what Orbax raises, in words that say what to do."""

import contextlib
import errno
from collections.abc import Generator

import jax

from flax_transformer.errors import RunFolderError
from flax_transformer.object_storage import AnyPath


class DamagedCheckpointError(RunFolderError):
    """A file of a checkpoint is missing, or its content is not what was saved.

    Args:
        what: a sentence that names the checkpoint and the damage.
    """

    def __init__(self, what: str):
        self.what = what
        super().__init__(
            f"{what} Fetch it again, or delete that folder to go on from the checkpoint before it; a training does so "
            "by itself with --resume."
        )


def _is_damage(error: Exception) -> bool:
    """Returns whether files are damaged or missing. Otherwise they may be read another time, such as by their owner."""
    if isinstance(error, OSError):
        return error.errno in (None, errno.ENOENT, errno.EIO, errno.EISDIR, errno.ENOTDIR)
    passing = ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED")  # of TensorStore
    return not any(code in str(error) for code in passing)


def _in_short(error: Exception) -> str:
    """Returns the kind of an error and the beginning of its text; texts of Orbax can be long."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'...' if len(text) > 200 else ''}"


@contextlib.contextmanager
def reading(checkpoint: AnyPath) -> Generator[None, None, None]:
    """Turns an error of Orbax while it reads, of any class, into a `RunFolderError`.

    Args:
        checkpoint: folder of the checkpoint.

    Raises:
        DamagedCheckpointError: files are damaged or missing.
        RunFolderError: they cannot be read for another reason.
    """
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):  # no fault of the files
        raise
    # The clause is this wide because Orbax has no common class of errors. Damaged files gave ValueError, OSError,
    # AttributeError, JSONDecodeError and plain Exception. The message shows the error, which is also chained.
    except Exception as error:
        what = f"the checkpoint {checkpoint} cannot be read: {_in_short(error)}."
        if _is_damage(error):
            raise DamagedCheckpointError(f"{what} A file of it is missing or damaged.") from error
        raise RunFolderError(f"{what} Mend the cause, and try again.") from error


@contextlib.contextmanager
def writing(folder: AnyPath) -> Generator[None, None, None]:
    """Turns an error of Orbax while it writes, or wrote in the background, into a `RunFolderError`.

    Args:
        folder: folder of the checkpoints.

    Raises:
        RunFolderError: a checkpoint could not be written.
    """
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):  # no fault of the disk
        raise
    # The clause is this wide because each storage of Orbax (disk, buckets) has errors of its own, without a common
    # class. The message shows the error, which is also chained.
    except Exception as error:
        raise RunFolderError(
            f"a checkpoint could not be written to {folder}: {_in_short(error)}. Those before it are whole. "
            "Make room, or mend the file system, and go on by --resume."
        ) from error
