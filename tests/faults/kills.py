"""Commands as processes of their own, which are killed at a moment that is chosen: at a step, or inside a phase."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint._src.path.deleter import StandardCheckpointDeleter

from flax_transformer.cli import main as cli
from flax_transformer.cli import partial_output, train, translate
from flax_transformer.data.loader import training_batches
from flax_transformer.experiment import run
from flax_transformer.experiment.validation import Validation

# Processes are forked from one that has imported this module, and has no devices yet. JAX warns of every fork.
warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload([__name__])

VERBS = {"train": train.main, "translate": translate.main}
SECONDS_TO_END = 600.0

# The phase after the last line of a command. The system then takes a while to free the memory of its process.
ENDED = "ended"


@dataclass(frozen=True)
class Moment:
    """A moment of a command.

    Attributes:
        phase: name of a phase. "start" is the time before all others.
        occurrence: number of times that the phase has begun, this time included.
        delay: seconds since it began.
    """

    phase: str
    occurrence: int = 1
    delay: float = 0.0


@dataclass
class Phases:
    """Phases of a command that have begun so far.

    Attributes:
        begun: number of times that each phase has begun.
        open: phases that have not ended; some run beside each other.
        seconds: durations of each phase, in its order.
    """

    begun: Counter[str] = field(default_factory=Counter)
    open: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def note(self, phase: str, begins: bool, now: float) -> None:
        """Notes the beginning or the end of a phase."""
        if begins:
            self.begun[phase] += 1
            self.open[phase] = now
        elif phase in self.open:
            self.seconds.setdefault(phase, []).append(now - self.open.pop(phase))


class Command:
    """A `flax-transformer` command that runs in a process of its own, and tells its phases.

    Args:
        arguments: the command line, verb first.
        output: file that gets what the command prints.
        settings: settings of JAX, and `lines_at_once` for `translate`.
    """

    def __init__(self, arguments: list[str], output: Path, settings: dict[str, Any] | None = None):
        self.phases = Phases()
        self._receiver, sender = _processes.Pipe(duplex=False)
        self._process = _processes.Process(target=_run, args=(sender, arguments, output, settings or {}))
        self.phases.note("start", True, time.monotonic())
        self._process.start()
        sender.close()

    def signal_at(self, moment: Moment, number: int) -> bool:
        """Sends a signal at a moment, and returns whether the command had reached the moment."""
        while self.phases.begun[moment.phase] < moment.occurrence and self._note_next(SECONDS_TO_END):
            pass
        if self.phases.begun[moment.phase] == moment.occurrence:
            time.sleep(moment.delay)
        while self._note_next(0.0):  # so that `open` has the phases of this moment
            pass
        pid, reached = self._process.pid, self._process.is_alive() and not self.phases.begun[ENDED]
        if reached and pid is not None:
            os.kill(pid, number)
        return reached

    def kill_at(self, moment: Moment, number: int) -> bool:
        """Does as `signal_at`, and waits for the end. Then `phases.open` has the phases of the moment."""
        reached, phases = self.signal_at(moment, number), dict(self.phases.open)
        self.wait()
        self.phases.open = phases
        return reached

    def wait(self) -> int:
        """Waits for the end, and returns the exit code; that of a signal is negative."""
        while self._note_next(SECONDS_TO_END):
            pass
        self._process.join(SECONDS_TO_END)
        if self._process.exitcode is None:
            self._process.kill()
            raise AssertionError(f"the command did not end in {SECONDS_TO_END:.0f} s")
        return self._process.exitcode

    def _note_next(self, seconds: float) -> bool:
        """Waits for the next phase, and returns whether there was one in this time, and before the command ended."""
        try:
            if not self._receiver.poll(seconds):
                return False
            self.phases.note(*self._receiver.recv())
        except (EOFError, OSError):
            return False
        return True


def _run(sender: Connection, arguments: list[str], output: Path, settings: dict[str, Any]) -> None:
    """Runs a command in the process that was made for it. Signals act as usual, also where `nohup` ignores them."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    translate.LINES_AT_ONCE = settings.pop("lines_at_once", translate.LINES_AT_ONCE)
    for name, value in settings.items():
        jax.config.update(name, value)
    _tell_phases(lambda phase, begins: sender.send((phase, begins, time.monotonic())))
    code = cli.run_verb(VERBS[arguments[0]], arguments[1:], f"flax-transformer {arguments[0]}")
    sender.send((ENDED, True, time.monotonic()))
    sys.exit(code)


def _tell_phases(tell: Callable[[str, bool], None]) -> None:
    """Makes this process tell the beginning and the end of each phase."""

    @contextlib.contextmanager
    def told(phase: str) -> Generator[None, None, None]:
        tell("start", False)
        tell(phase, True)
        yield
        tell(phase, False)

    def tell_calls(owner: Any, name: str, phase: str) -> None:
        setattr(owner, name, told(phase)(getattr(owner, name)))

    def batches(*arguments: Any, **named: Any) -> Generator[Any, None, None]:
        for batch in training_batches(*arguments, **named):
            with told("step"):
                yield batch

    run.training_batches = batches
    tell_calls(Validation, "__call__", "evaluation")
    tell_calls(ocp.CheckpointManager, "_finalize", "checkpoint write")
    tell_calls(StandardCheckpointDeleter, "delete", "removal")
    tell_calls(run, "score_test_part", "end")
    tell_calls(run, "draw_pictures", "end")
    tell_calls(translate.Translator, "translate", "translation")
    tell_calls(partial_output.PartialOutput, "write", "write")
    tell_calls(partial_output.PartialOutput, "__exit__", "end")
