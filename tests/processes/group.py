"""Starts several processes on this machine that work together, and tells how they end."""

import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from flax_transformer.cli import evaluate, score, train, translate
from flax_transformer.cli import main as cli
from flax_transformer.parallel import processes

# Processes are forked from one that has imported this module, and has no devices yet. JAX warns of every fork.
warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([__name__])

VERBS = {"train": train.main, "translate": translate.main, "evaluate": evaluate.main, "score": score.main}
SECONDS_TO_END = 240.0


def free_port() -> int:
    """A port of this machine that nothing uses."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


class Group:
    """Several processes that call one function, each with its own flags of the process group.

    Args:
        function: function of (flags, *arguments).
        count: number of processes.
        folder: folder of what they print.
        arguments: arguments of all processes, or a function from the number of a process to its arguments.
        devices: number of devices of each process.
    """

    def __init__(self, function: Callable[..., Any], count: int, folder: Path, arguments: Any = (), devices: int = 1):
        folder.mkdir(parents=True, exist_ok=True)
        self._outputs, self._processes, coordinator = [], [], f"localhost:{free_port()}"
        for number in range(count):
            flags = ["--processes", str(count), "--process-id", str(number), "--coordinator", coordinator]
            self._outputs.append((folder / f"{number}.out", folder / f"{number}.err"))
            own = arguments(number) if callable(arguments) else arguments
            process = _context.Process(target=_run, args=(function, self._outputs[-1], devices, flags, *own))
            process.start()
            self._processes.append(process)

    def send(self, number: int, which: int) -> None:
        """Sends a signal to a process."""
        pid = self._processes[number].pid
        assert pid is not None
        os.kill(pid, which)

    def wait(self, seconds: float = SECONDS_TO_END) -> list[int | None]:
        """Waits for the end of all, and returns their exit codes; that of a signal is negative."""
        last = time.monotonic() + seconds
        for process in self._processes:
            process.join(max(0.0, last - time.monotonic()))
        codes = [process.exitcode for process in self._processes]
        for process in self._processes:
            if process.exitcode is None:
                process.kill()
        return codes

    def output(self, number: int) -> str:
        """What a process has printed so far."""
        return self._outputs[number][0].read_text(encoding="utf-8")

    def errors(self, number: int) -> str:
        """What a process has printed to standard error so far."""
        return self._outputs[number][1].read_text(encoding="utf-8")


def command(flags: list[str], *arguments: str) -> int:
    """Runs a command as a process of a group."""
    return cli.run_verb(VERBS[arguments[0]], [*arguments[1:], *flags], f"flax-transformer {arguments[0]}")


def join(flags: list[str]) -> None:
    """Joins the group as a command does."""
    names = [flag.removeprefix("--") for flag in flags[::2]]
    processes.join(processes.ProcessGroup.parse(dict(zip(names, flags[1::2], strict=True))))


def _run(
    function: Callable[..., Any], outputs: tuple[Path, Path], devices: int, flags: list[str], *arguments: Any
) -> None:
    """Runs a function in the process that was made for it."""
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    jax.config.update("jax_num_cpu_devices", devices)
    try:
        code = function(flags, *arguments)
    except Exception:  # of any class: it is printed where the test reads it
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.exit(code)
