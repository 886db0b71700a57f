"""Processes that train or translate together: who they are, what they tell each other, and how they end.

JAX's distributed runtime connects them. Process 0 runs its coordinator, which keeps a store of keys and values. The
functions here exchange small messages through that store. All processes call them in the same order. With one process
each of them is the identity.

References:
    `jax.distributed`; https://docs.jax.dev/en/latest/multi_process.html.
"""

import contextlib
import itertools
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeVar

import jax

from flax_transformer.errors import ConfigError, InputError, shown

Value = TypeVar("Value")

# The coordinator notices after this time that a process has died without a word. A process that is only slow answers,
# since C++ threads do.
HEARTBEAT_SECONDS = 20

SECONDS_TO_JOIN = 300
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_OF_A_WAIT = 2.0  # Python handles signals between two waits

# A process that learns of a failure first gives its own error this time. All may have the same one.
SECONDS_FOR_OWN_ERROR = 2

# Keys in the store. A message is stored in pieces, since the store has a limit.
FOLDER = "flax_transformer"
FAILURES = f"{FOLDER}/failures/"
BYTES_OF_A_PIECE = 16 << 20


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a command, as its flags say.

    Attributes:
        count: number of processes, or "auto" to ask the environment: SLURM, Open MPI, Cloud TPU or GKE.
        process_id: number of this process, from 0.
        coordinator: address of process 0, as HOST:PORT.
        seconds_to_join: time after which a process that has not come is given up.
    """

    count: int | Literal["auto"] = 1
    process_id: int | None = None
    coordinator: str | None = None
    seconds_to_join: int = SECONDS_TO_JOIN

    @classmethod
    def parse(cls, values: dict[str, str]) -> "ProcessGroup":
        """Returns the group that flags describe.

        Args:
            values: values of the flags "processes", "process-id", "coordinator" and "seconds-to-join" that were given.

        Raises:
            ConfigError: a value that is not possible, or a flag that is missing.
        """

        def number(name: str, least: int) -> int:
            text = values[name]
            if not re.fullmatch(r"\d{1,9}", text) or int(text) < least:
                raise ConfigError(f"--{name} must be a whole number of at least {least}, got {shown(text)}.")
            return int(text)

        seconds = number("seconds-to-join", 1) if "seconds-to-join" in values else SECONDS_TO_JOIN
        if values.get("processes") == "auto":
            if given := [name for name in ("process-id", "coordinator") if name in values]:
                raise ConfigError(f"--processes auto takes all from the environment. Leave out --{given[0]}.")
            return cls("auto", seconds_to_join=seconds)
        if not values.keys() & {"processes", "process-id", "coordinator"}:
            return cls(seconds_to_join=seconds)
        if missing := [f"--{name}" for name in ("processes", "process-id", "coordinator") if name not in values]:
            raise ConfigError(
                f"several processes need --processes, --process-id and --coordinator, and {' and '.join(missing)} "
                "is missing. Give all three, or --processes auto under SLURM, Open MPI, Cloud TPU or GKE."
            )
        count, process_id, coordinator = number("processes", 1), number("process-id", 0), values["coordinator"]
        if process_id >= count:
            raise ConfigError(
                f"--process-id must be below --processes, got {process_id} of {count}: ids are 0 to {count - 1}."
            )
        if not re.fullmatch(r"[^\s:]+:\d{1,5}|\[[0-9a-fA-F:.]+\]:\d{1,5}", coordinator):
            raise ConfigError(
                f"--coordinator must be HOST:PORT of process 0, such as 10.0.0.2:8476, got {shown(coordinator)}."
            )
        return cls(count, process_id, coordinator, seconds)


# --- Beginning and end


def join(group: ProcessGroup) -> None:
    """Connects this process with the others. Call it before JAX looks for devices. One process joins nothing.

    Raises:
        ConfigError: the environment does not describe processes, or the coordinator cannot be reached.
    """
    if group.count == 1:
        return
    # JAX's own handler of SIGTERM would take the place of the handler that saves the state of a training.
    jax.config.update("jax_enable_preemption_service", False)
    who = "the environment's processes" if group.count == "auto" else f"process {group.process_id} of {group.count}"
    where = "" if group.coordinator is None else f" at {group.coordinator}"
    print(f"{who}: waiting for the others{where}, at most {group.seconds_to_join} s", file=sys.stderr, flush=True)
    in_vain = threading.Timer(group.seconds_to_join, _give_up, (who, where, group.seconds_to_join))
    in_vain.daemon = True
    in_vain.start()
    try:
        jax.distributed.initialize(
            group.coordinator,
            None if group.count == "auto" else group.count,
            group.process_id,
            # Under SLURM, JAX would hide all GPUs but one from a process, even if flags say all else.
            cluster_detection_method=None if group.count == "auto" else "deactivate",
            initialization_timeout=group.seconds_to_join + SECONDS_FOR_OWN_ERROR,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError, KeyError, ImportError) as error:  # the last two of an incomplete environment
        in_vain.cancel()
        raise _not_joined(group, f"{who} could not join the others{where}", error) from error
    _Watch.start()
    _keep_output_for_python()
    jax.devices()  # waits for all processes
    in_vain.cancel()
    if group.count != "auto" and group.process_id != jax.process_index():  # TPUs number the processes themselves
        raise ConfigError(
            f"this process has --process-id {group.process_id}, and its devices say {jax.process_index()}. On a TPU "
            "slice leave the numbers to the devices: give --processes auto alone."
        )


def _give_up(who: str, where: str, seconds: int) -> NoReturn:
    """Ends a process that the others have not joined. JAX would abort it, with a trace of C++ functions."""
    print(
        f"error: {who} has waited {seconds} s in vain: another one was not started, has the number of a third one, or "
        f"does not reach process 0{where}. Start every process, each with its own --process-id and with the same "
        "--processes and --coordinator. If they start slowly, raise --seconds-to-join.",
        file=sys.stderr,
    )
    sys.stderr.flush()
    os._exit(2)


def _not_joined(group: ProcessGroup, what: str, error: Exception) -> ConfigError:
    """Returns the error of a process that could not join a group."""
    if group.count == "auto":
        return ConfigError(
            "--processes auto needs processes that SLURM, Open MPI, Cloud TPU or GKE has started, and found none to "
            f"join ({type(error).__name__}: {_first_line(error)}). Start the command by srun, by mpirun or on each "
            "host of a TPU slice, or give --processes, --process-id and --coordinator."
        )
    return ConfigError(
        f"{what}: {_first_line(error)} Start every process, each with its own --process-id and with the same "
        "--processes and --coordinator, and see that process 0 can be reached."
    )


def _keep_output_for_python() -> None:
    """Sends what C++ libraries print to standard error. Gloo prints a line for each group of devices."""
    own = os.dup(1)
    os.dup2(2, 1)
    sys.stdout.flush()
    sys.stdout = open(own, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)


def leave() -> None:
    """Waits until all processes are done, and disconnects. Call it at the end of a command."""
    if joined():
        exchange(None)
        _Watch.stop()
        jax.distributed.shutdown()


def fail(code: int, reason: str) -> NoReturn:
    """Ends this process because of an error, and the other processes, too.

    Args:
        code: exit code.
        reason: what the others say.
    """
    _Watch.stop()
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the coordinator has gone
        _client().key_value_set(f"{FAILURES}{process_id()}", json.dumps([code, reason]), allow_overwrite=True)
    _exit(code)


def wait_for_failure_of_another() -> None:
    """Lets an error of another process end this one, if there is such an error. It may have caused one here."""
    time.sleep(2 * SECONDS_FOR_OWN_ERROR)


def _exit(code: int) -> NoReturn:
    """Ends the process without handlers at its exit, which would wait for processes that have gone."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it, or it is closed
            stream.flush()
    if is_first():  # its coordinator must live until the others have read what has failed
        time.sleep(2 * SECONDS_FOR_OWN_ERROR)
    os._exit(code)


class _Watch:
    """A thread that ends this process when another one has failed. The main thread may be waiting for it for ever."""

    _stopped = threading.Event()

    @classmethod
    def start(cls) -> None:
        cls._stopped.clear()
        threading.Thread(target=cls._look, daemon=True).start()

    @classmethod
    def stop(cls) -> None:
        cls._stopped.set()

    @classmethod
    def _look(cls) -> None:
        while not cls._stopped.wait(SECONDS_BETWEEN_LOOKS):
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # JAX ends the process if its coordinator has gone
                for key, value in _client().key_value_dir_get(FAILURES):
                    if cls._stopped.wait(SECONDS_FOR_OWN_ERROR):
                        return
                    code, reason = json.loads(value)
                    print(f"error: process {key.rpartition('/')[2]} has failed: {reason}", file=sys.stderr, flush=True)
                    _exit(code)


# --- Who this process is


def joined() -> bool:
    """Returns whether this process works with others."""
    return jax.distributed.is_initialized()


def num_processes() -> int:
    """Returns the number of processes."""
    return _state().num_processes if joined() else 1


def process_id() -> int:
    """Returns the number of this process, from 0."""
    return _state().process_id if joined() else 0


def is_first() -> bool:
    """Returns whether this is process 0, which writes the run folder and reads standard input."""
    return process_id() == 0


# --- Messages

_numbers = itertools.count()


def exchange_bytes(message: bytes) -> list[bytes]:
    """Returns the messages of all processes in the order of their numbers."""
    if not joined():
        return [message]
    client, me, number = _client(), process_id(), next(_numbers)
    pieces = [message[start : start + BYTES_OF_A_PIECE] for start in range(0, len(message), BYTES_OF_A_PIECE)]
    for place, piece in enumerate([str(len(pieces)).encode(), *pieces]):
        client.key_value_set_bytes(f"{FOLDER}/{number}/{me}/{place}", piece)
    found = [message if other == me else _received(f"{FOLDER}/{number}/{other}") for other in range(num_processes())]
    if number:  # every process has read the messages before these
        client.key_value_delete(f"{FOLDER}/{number - 1}/{me}")
    return found


def _received(folder: str) -> bytes:
    num_pieces = int(_wait_for(f"{folder}/0"))
    return b"".join(_wait_for(f"{folder}/{place}") for place in range(1, num_pieces + 1))


def exchange(value: Any) -> list[Any]:
    """Returns the values of all processes, each one that JSON can write."""
    return [json.loads(message) for message in exchange_bytes(json.dumps(value).encode())]


def from_first(make: Callable[[], Any]) -> Any:
    """Returns a value that process 0 makes, one that JSON can write.

    Raises:
        InputError: process 0 raised it. The others raise one with the same message.
    """
    value, error = None, None
    if is_first():
        try:
            value = make()
        except InputError as mistake:
            if not joined():
                raise
            error = mistake
    value, message = exchange([value, None if error is None else str(error)])[0]
    if error is not None:
        raise error
    if message is not None:
        raise InputError(message)
    return value


def first_then_others(make: Callable[[], Value]) -> Value:
    """Returns what `make` returns. Process 0 calls it before the others do, so they find its files.

    Raises:
        InputError: process 0 raised it.
    """
    made: list[Value] = []
    from_first(lambda: made.append(make()))
    return made[0] if made else make()


@contextlib.contextmanager
def calls_of_first(call: Callable[..., Value]) -> Generator[Callable[..., Value] | None, None, None]:
    """Yields, in process 0, a function like `call`. The others make each of its calls, too, with the same arguments.

    They get None once process 0 has left its `with` block.

    Args:
        call: function of keyword arguments that JSON can write.
    """
    if not joined():
        yield call
    elif is_first():

        def together(**arguments: Any) -> Value:
            exchange(arguments)
            return call(**arguments)

        yield together
        exchange(None)
    else:
        while (arguments := exchange(None)[0]) is not None:
            call(**arguments)
        yield None


def check_agreement(values: dict[str, str]) -> None:
    """Checks that all processes have the same values. Each process then says who differs, and in what.

    Args:
        values: a text for each thing that must be the same, such as a digest.

    Raises:
        ConfigError: process k has another value than process 0.
    """
    everyone = exchange(values)
    for name in values:
        others = [number for number, each in enumerate(everyone) if each.get(name) != everyone[0].get(name)]
        if others:
            differ = f"process {others[0]} has" if len(others) == 1 else f"processes {_listed(others)} have"
            ours, theirs = shown(everyone[0].get(name)), shown(everyone[others[0]].get(name))
            raise ConfigError(
                f"{differ} another {name} than process 0: expected {ours}, got {theirs}. Start all processes with the "
                "same command, the same versions and the same files."
            )


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (" and others" if numbers[8:] else "")


def _wait_for(key: str) -> bytes:
    """Returns the value of a key as soon as it is there. The watching thread ends the process if that never happens."""
    while True:
        try:
            return _client().blocking_key_value_get_bytes(key, int(1000 * SECONDS_OF_A_WAIT))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _state() -> Any:
    """Returns JAX's record of its coordinator. JAX has no public function for it."""
    from jax._src import distributed

    return distributed.global_state


def _client() -> Any:
    return _state().client


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
