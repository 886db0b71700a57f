"""The platforms that a program can be traced for; a CPU runs the forms of all of them."""

import contextlib
from typing import Any

import pytest

from flax_transformer import backend

PLATFORMS = pytest.mark.parametrize("platform", [None, "cpu", "gpu"])


def tracing_for(platform: backend.Platform | None) -> contextlib.AbstractContextManager[Any]:
    """Makes what is traced inside be that of a platform; None is the reference."""
    return contextlib.nullcontext() if platform is None else backend.tracing_for(platform)
