"""Hostile input: how many examples each reader gets, and what every reader promises.

`HOSTILE_EXAMPLES=20000 python -m pytest tests/faults` gives each reader so many examples, drawn anew in each call. The
test command gives few, and always the same.
"""

import os
import warnings
from collections.abc import Callable
from typing import Any

import hypothesis
from hypothesis import strategies as st

from flax_transformer.errors import DivergenceError, InputError
from tests.faults.limits import within_limits

EXAMPLES = os.environ.get("HOSTILE_EXAMPLES")
FEW_EXAMPLES = 100

# Decorator of a test whose arguments are hostile.
hostile = hypothesis.settings(
    max_examples=int(EXAMPLES or FEW_EXAMPLES),
    derandomize=EXAMPLES is None,
    database=None,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)


def succeeds_or_explains(reader: Callable[[], Any]) -> Any:
    """Success, or one of our errors, within a second and 200 MB: returns what the reader returns, or its error."""
    with within_limits(), warnings.catch_warnings(action="error"):
        try:
            return reader()
        except (InputError, DivergenceError) as error:
            message = str(error)
            assert 20 < len(message) < 2_000 and "\n" not in message, f"no paragraph: {message[:3_000]}"
            return error


@st.composite
def damaged(draw: st.DrawFn, contents: st.SearchStrategy[bytes]) -> bytes:
    """Bytes with a few flipped bits, cut short, or with a part in another place."""
    content = bytearray(draw(contents))
    for _ in range(draw(st.integers(0, 3))):
        start, end = sorted(draw(st.tuples(*[st.integers(0, len(content))] * 2)))
        match draw(st.integers(0, 3)):
            case 0 if start < len(content):
                content[start] ^= 1 << draw(st.integers(0, 7))
            case 1:
                del content[end:]
            case 2:
                content[start:start] = content[start:end][:10_000]
            case 3:
                content[start : start + 8] = draw(st.binary(max_size=16))
    return bytes(content)
