"""Strategies for hostile files, and the property that every reader must have.

The environment variable FUZZ multiplies the number of examples, and makes them others in each run:

    FUZZ=100 python -m pytest -n 2 tests/faults/test_hostile_files.py
"""

import json
import os
from collections.abc import Callable
from typing import TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from flax_transformer.errors import InputError
from tests.faults.limits import within_limits

Result = TypeVar("Result")

FUZZ = int(os.environ.get("FUZZ", "0"))


def examples(num: int) -> settings:
    """Settings for a number of examples: always the same ones, unless FUZZ is set."""
    return settings(
        max_examples=num * max(FUZZ, 1),
        deadline=None,
        derandomize=not FUZZ,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def answer(call: Callable[[], Result]) -> Result | None:
    """Returns the result of a call, or None after one of our errors, within a second and 200 MB."""
    with within_limits():
        try:
            return call()
        except InputError as error:
            assert len(str(error)) < 2000, f"a message of {len(str(error))} characters"
            return None


# Contents that have nothing to do with any format.
NONSENSE = [
    b"", b"\0" * 100, b"\xff\xfe", b"\xff", b"5", b"null", b"{}", b"[]", b"[" * 5000, b"{" * 5000, b'{"a":' * 3000,
    b"1" * 5000, b"-1e999", b"NaN", b"\xef\xbb\xbf{}", "\u2028\u0085\x1c".encode(), b"\n" * 3000, b"a: &a [*a, *a]",
    b"%YAML 9\n---", b"!!python/object/apply:os.system [ls]", b"PK\x03\x04", b"\x1f\x8b\x08", b'"\\ud800"', b"<?xml?>",
]  # fmt: skip

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """What a disk, a power loss or an editor makes of a file."""
    places = st.integers(0, max(len(content) - 1, 0))

    def flip(bits: list[tuple[int, int]]) -> bytes:
        changed = bytearray(content)
        for place, bit in bits:
            changed[place] ^= 1 << bit
        return bytes(changed)

    flips = st.lists(st.tuples(places, st.integers(0, 7)), min_size=1, max_size=4).map(flip)
    cuts = places.map(lambda end: content[:end])
    zeros = places.map(lambda end: content[:end] + bytes(len(content) - end))
    parts = st.tuples(places, places, places).map(lambda p: content[: p[0]] + content[min(p[1:]) : max(p[1:])])
    inserts = st.tuples(places, st.sampled_from(NONSENSE)).map(lambda p: content[: p[0]] + p[1] + content[p[0] :])
    changes = [flips, cuts, zeros, parts, inserts] if content else []
    return st.one_of(*changes, st.sampled_from(NONSENSE), st.binary(max_size=60))


def damaged_object(values: dict) -> st.SearchStrategy[bytes]:
    """What a stranger makes of a file with a JSON object: other types, other entries."""
    names = st.sampled_from(sorted(values))
    changed = st.tuples(names, JSON).map(lambda change: values | {change[0]: change[1]})
    lacking = names.map(lambda name: {n: v for n, v in values.items() if n != name})
    return st.one_of(changed, lacking, JSON).map(lambda found: json.dumps(found).encode())


# Words of YAML and of configurations.
YAML = [
    "run", "model", "training", "decoding", "optimizer", "data", "kind", "steps", "num_heads", "max_length_offset",
    "suppress_tokens", "train_source", "epsilon", "transformer", "parallel_text", ": ", ": ", ": ", "\n", "\n  ",
    "\n- ", "- ", "[", "]", "{", "}", ", ", "&a ", "*a", "<<: ", "? ", "| \n", ">-\n", '"', "'", "# ", "---\n",
    "...\n", "!!int ", "!!float ", "!!bool ", "!!null ", "!!timestamp ", "!!binary ", "!!set ", "!!omap ", "!!pairs ",
    "!!map ", "!!seq ", "!!str ", "!a!b ", "%TAG ! x\n", "=", "0x", "1e9", "-1", "0", "12", "1" * 400,
    "0x" + "f" * 5000, ".inf", ".nan", "~", "true", "2026-13-45", "1:30:5", "1_0", "\0", "\t", "\u20ac",
    '"\\ud800"', '"\\0"', "x" * 3000,
]  # fmt: skip
YAML_TEXTS = st.lists(st.sampled_from(YAML), max_size=25).map(lambda words: "".join(words).encode())
