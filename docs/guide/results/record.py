"""The file of a result: what was measured, with its date, machine, versions, command and seeds."""

import datetime
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
PACKAGES = ("jax", "flax", "optax", "numpy")


def text(record: dict[str, Any]) -> str:
    """Returns a record as JSON with one line for each entry of its results."""
    head = json.dumps({key: value for key, value in record.items() if key != "results"}, indent=1)
    rows = ",\n  ".join(json.dumps(entry) for entry in record["results"])
    return head.removesuffix("\n}") + f',\n "results": [\n  {rows}\n ]\n}}\n'


def write_result(name: str, seeds: list[int], results: Any, note: str) -> None:
    """Writes `name`.json beside this file.

    Args:
        name: name of the result, which is that of the script.
        seeds: seeds of the trainings.
        results: what was measured, as JSON.
        note: what the entries of `results` are, with their units.
    """
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, {platform.system()}",
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
        "command": f"PYTHONPATH=docs/guide python docs/guide/results/{name}.py",
        "seeds": seeds,
        "note": note,
        "results": results,
    }
    file = FOLDER / f"{name}.json"
    partial = file.with_suffix(".partial")
    partial.write_text(text(record), encoding="utf-8")
    partial.replace(file)
    print(f"wrote {file}", file=sys.stderr)
