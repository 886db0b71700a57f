"""The file metrics.jsonl of a run, with a JSON object for each progress line and each evaluation."""

import math
from collections.abc import Iterator
from typing import Any

from flax_transformer.errors import RunFolderError, shown
from flax_transformer.object_storage import AnyPath
from flax_transformer.small_files import parse_object

_ADVICE = "Mend or remove that line, or put the file back from a copy."


class MetricsRecord(dict[str, Any]):
    """The figures of a record by their names. To ask for one that it lacks is an error with the record's place.

    Args:
        values: the figures, with NaN for JSON's null.
        place: file and line.
    """

    def __init__(self, values: dict[str, Any], place: str):
        super().__init__(values)
        self.place = place

    def __missing__(self, name: str) -> Any:
        raise RunFolderError(f"{self.place}: this record of kind {shown(self['kind'])} has no '{name}'. {_ADVICE}")


def read_metrics(path: AnyPath) -> list[dict[str, Any]]:
    """Returns the records of a metrics.jsonl; raises as `records_and_lines` does."""
    return [record for record, _ in records_and_lines(path)]


def records_and_lines(path: AnyPath) -> Iterator[tuple[MetricsRecord, str]]:
    """Yields each record and its line. A last line that a kill or a power loss cut short is left out.

    Raises:
        RunFolderError: a line is no record.
    """
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            yield MetricsRecord(_figures(line), place), line.decode()
        except ValueError as error:
            if number == len(lines):  # it has no line end
                return
            raise RunFolderError(
                f"{place}: expected a JSON object with the kind, the step and the figures of a record, but {error}. "
                f"{_ADVICE}"
            ) from error


def _figures(line: bytes) -> dict[str, Any]:
    """Returns the figures of a line; raises a `ValueError` if it is no record."""
    values = parse_object(line)
    if not isinstance(values.get("kind"), str):
        raise ValueError(f"its kind is {shown(values.get('kind'))}")
    if type(values.get("step")) is not int:
        raise ValueError(f"its step is {shown(values.get('step'))}")
    for name, value in values.items():
        if name != "kind" and not _is_figure(value):
            raise ValueError(f"{shown(name)} is {shown(value)}")
    return {name: math.nan if value is None else value for name, value in values.items()}


def _is_figure(value: Any) -> bool:
    """Returns whether a JSON value is a number that is finite and fits 64 bits, or null."""
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or (type(value) is int and abs(value) < 2**63)
