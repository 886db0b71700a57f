"""A disk that can be filled: a small tmpfs where root may mount one, else a limit on the size of files."""

import contextlib
import os
import resource
import subprocess
from collections.abc import Generator
from pathlib import Path

MEBIBYTES = 4


class FullDisk:
    """A folder whose disk can be filled, and emptied again.

    With a tmpfs, writing then fails with ENOSPC. Without one, every file of this process is limited, and writing fails
    with EFBIG. Use `capsys` in a test, so that pytest keeps its output in memory.

    Args:
        folder: the folder.
        mounted: whether it is a file system of its own.
    """

    def __init__(self, folder: Path, mounted: bool):
        self.folder = folder
        self._ballast = folder / "ballast" if mounted else None
        self._limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self) -> None:
        """Leaves no room for anything."""
        if self._ballast is None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1, self._limits[1]))
            return
        with self._ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 12))

    def empty(self) -> None:
        """Makes room again."""
        if self._ballast is None:
            resource.setrlimit(resource.RLIMIT_FSIZE, self._limits)
        else:
            self._ballast.unlink(missing_ok=True)


@contextlib.contextmanager
def small_disk(folder: Path) -> Generator[FullDisk, None, None]:
    """Yields a disk at `folder`, which is made."""
    folder.mkdir()
    size = ["-t", "tmpfs", "-o", f"size={MEBIBYTES}m", "tmpfs"]
    mounted = (
        os.geteuid() == 0
        and subprocess.run(["mount", *size, str(folder)], capture_output=True, check=False).returncode == 0
    )
    disk = FullDisk(folder, mounted)
    try:
        yield disk
    finally:
        disk.empty()
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
