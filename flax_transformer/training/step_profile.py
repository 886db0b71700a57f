"""A profile of some training steps, in the files that TensorBoard's profile plugin (xprof) reads."""

import contextlib
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax

from flax_transformer.object_storage import AnyPath, on_object_storage
from flax_transformer.small_files import write_atomically

# Name of the annotation of each step.
STEP_NAME = "train"


class StepProfile:
    """Records what host and devices do in some steps that follow one another.

    Use it in a `with` statement, so that a training that ends early ends its profile, too.

    Args:
        folder: folder of event files. The profile goes to plugins/profile/TIME in it. None records nothing.
        num_steps: number of steps; 0 records nothing.
        after: number of the step after which the profile begins.

    Attributes:
        last: number of the last step to record; 0 if nothing is recorded.
    """

    def __init__(self, folder: AnyPath | None, num_steps: int, after: int = 0):
        self._folder = folder
        self._first = after + 1
        self.last = after + num_steps if folder is not None and num_steps else 0
        self._running = contextlib.ExitStack()
        self._recording = False

    def __enter__(self) -> "StepProfile":
        return self

    def __exit__(self, *_) -> None:
        self._stop()

    @contextlib.contextmanager
    def step(self, number: int) -> Generator[None, None, None]:
        """Names the work in a `with` block as the step of this number, counted from 1, if the step is recorded."""
        if number == self._first <= self.last:
            self._start()
        if not self._recording:
            yield
            return
        with jax.profiler.StepTraceAnnotation(STEP_NAME, step_num=number):
            yield

    @property
    def steps_asked_for(self) -> str:
        """The numbers of the steps, in words."""
        return f"steps {self._first} to {self.last}"

    def end_step(self, number: int, results: Any) -> float:
        """Ends the profile if this was its last step, and returns the seconds that this took.

        Args:
            number: number of the step.
            results: arrays of the step, which the devices may still compute.
        """
        if not (self._recording and number == self.last):
            return 0.0
        jax.block_until_ready(results)
        clock = time.monotonic()
        self._stop()
        return time.monotonic() - clock

    def _start(self) -> None:
        assert self._folder is not None, "nothing is recorded without it"
        local = Path(str(self._folder))
        if on_object_storage(self._folder):  # the profiler writes to disks alone
            local = Path(self._running.enter_context(tempfile.TemporaryDirectory()))
            self._running.callback(_copy, local, self._folder)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # calls of Python are many, and hide the rest
        jax.profiler.start_trace(str(local), profiler_options=options)
        self._running.callback(jax.profiler.stop_trace)
        self._recording = True

    def _stop(self) -> None:
        self._recording = False
        self._running.close()


def _copy(local: Path, folder: AnyPath) -> None:
    """Copies all files of a folder on this machine to another folder."""
    for path in sorted(local.rglob("*")):
        if path.is_file():
            copy = folder / str(path.relative_to(local))
            copy.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(copy, path.read_bytes())
