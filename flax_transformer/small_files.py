"""Small files that the package writes and reads again: whole or not at all, and with a checksum of themselves."""

import hashlib
import json
import os
import shutil
from typing import Any, TypeVar, get_origin, get_type_hints

from etils import epath

from flax_transformer.errors import shown
from flax_transformer.object_storage import AnyPath, on_object_storage, storage_errors

Fields = TypeVar("Fields")

# Key of an object's own checksum.
SEAL = "sha256"


def write_atomically(path: AnyPath, content: str | bytes) -> None:
    """Writes a file. After a kill or a power loss the file has its old content or the new one.

    Object storage replaces an object as a whole by itself.
    """
    data = content.encode() if isinstance(content, str) else content
    if on_object_storage(path):
        with storage_errors(path):
            path.write_bytes(data)
        return
    new = path.with_name(f"{path.name}.new")
    with new.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def remove_folder(path: AnyPath) -> None:
    """Removes a folder, if there is one. On a disk it leaves what cannot be removed."""
    if on_object_storage(path):
        with storage_errors(path):
            epath.Path(path).rmtree(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def parse_object(text: bytes | str) -> dict[str, Any]:
    """Returns the JSON object that a text is.

    Raises:
        ValueError: the text is not UTF-8, not JSON, or no object. No other error comes from a hostile text.
    """
    try:
        values = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, got {shown(values)}")
    return values


def as_dataclass(cls: type[Fields], values: Any) -> Fields:
    """Returns a dataclass of plain fields from a JSON object with an entry for each field.

    Raises:
        ValueError: no object, an entry that is missing or not known, or a value of another type.
    """
    hints = get_type_hints(cls)
    if not isinstance(values, dict) or values.keys() != hints.keys():
        raise ValueError(f"expected the entries {', '.join(hints)}, got {shown(values)}")
    for name, hint in hints.items():
        kind, value = get_origin(hint) or hint, values[name]
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, (int, float) if kind is float else kind):
            raise ValueError(f"{name} cannot be {shown(value)}")
    return cls(**values)


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """Returns a JSON object with a checksum of itself."""
    return values | {SEAL: _checksum(values)}


def unsealed(values: dict[str, Any], optional: bool = False) -> dict[str, Any]:
    """Returns a JSON object without its checksum.

    Args:
        values: the object.
        optional: whether the object may have no checksum, as those of an earlier version.

    Raises:
        ValueError: the object has changed since `sealed` made it.
    """
    plain = {name: value for name, value in values.items() if name != SEAL}
    if not (optional and SEAL not in values) and values.get(SEAL) != _checksum(plain):
        raise ValueError("it does not have the checksum that it was written with")
    return plain


def _checksum(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
