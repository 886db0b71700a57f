"""Damage to files, as disks, power losses and strangers do it."""

import shutil
from pathlib import Path


def flip_bit(file: Path, bit: int) -> None:
    """Flips one bit of a file; its number counts modulo the bits of the file. An empty file stays empty."""
    content = bytearray(file.read_bytes())
    if content:
        place = bit % (8 * len(content))
        content[place // 8] ^= 1 << place % 8
        file.write_bytes(content)


def cut(file: Path, share: float) -> None:
    """Cuts a file short; `share` of it stays."""
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])


def empty(file: Path) -> None:
    """Empties a file, as a power loss can do with one that was written shortly before."""
    file.write_bytes(b"")


def zero(file: Path, share: float) -> None:
    """Puts zeros in the place of a file's end, as a power loss can do; `share` of it stays."""
    content = file.read_bytes()
    kept = int(share * len(content))
    file.write_bytes(content[:kept] + bytes(len(content) - kept))


def remove(path: Path) -> None:
    """Removes a file, or a folder with all that it contains."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def replace(file: Path, content: bytes) -> None:
    """Replaces the content of a file."""
    file.write_bytes(content)


def files_of(folder: Path) -> list[Path]:
    """Returns all files below a folder, in a fixed order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())
