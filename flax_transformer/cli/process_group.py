"""A command that several processes run together: its flags, its beginning, its end."""

import contextlib
import os
import platform
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from flax_transformer.errors import ConfigError, LostProcessError, explains_itself, shortened
from flax_transformer.parallel import processes

FLAGS = ("processes", "process-id", "coordinator", "seconds-to-join")
SHARED_VERBS = ("train", "train.py", "translate", "evaluate", "score")
# Parts of the messages of JAX's communication libraries.
SIGNS_OF_LOSS = ("Gloo", "NCCL", "Connection reset", "Connection closed", "coordination service", "barrier")

# Environment variables that change programs.
VARIABLES = ("FLAX_TRANSFORMER_KERNELS", "JAX_DEFAULT_MATMUL_PRECISION", "JAX_ENABLE_X64")

PACKAGES = ("flax-transformer", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "sentencepiece")


def take_flags(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Returns the values of the flags of a process group, and all other arguments.

    Raises:
        ConfigError: a flag without a value.
    """
    flags, rest, position = {}, [], 0
    while position < len(arguments):
        name, equals, value = arguments[position].partition("=")
        if name.removeprefix("--").replace("_", "-") in FLAGS and name.startswith("--"):
            if not equals:
                position += 1
                if position == len(arguments):
                    raise ConfigError(f"{name} needs a value.")
                value = arguments[position]
            flags[name.removeprefix("--").replace("_", "-")] = value
        else:
            rest.append(arguments[position])
        position += 1
    return flags, rest


def surroundings() -> dict[str, str]:
    """Returns what all processes must have alike beside their arguments: versions, and a setting of programs."""
    found = {"Python": platform.python_version()} | {name: os.environ.get(name, "") for name in VARIABLES}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):  # a checkout that is not installed
            found[name] = version(name)
    return found


def run_in_group(verb: Callable[[list[str], str], int], arguments: list[str], program: str) -> int:
    """Returns the exit code of a verb, which runs in one process or, as flags say, in several together.

    Raises:
        InputError: invalid input, flags that contradict each other, or processes that differ in arguments or versions.
        LostProcessError: another process has ended.
    """
    flags, arguments = take_flags(arguments)
    group = processes.ProcessGroup.parse(flags)
    if group.count == 1:
        return verb(arguments, program)
    if program.split()[-1] not in SHARED_VERBS:
        raise ConfigError(f"{program} is the work of one process. Leave out --processes.")
    processes.join(group)
    processes.check_agreement({"command line": " ".join(arguments)} | surroundings())
    try:
        code = processes.exchange(verb(arguments, program))[0]
    except SystemExit as stop:
        if stop.code:
            processes.fail(stop.code if isinstance(stop.code, int) else 1, "it cannot use its command line.")
        raise
    except Exception as error:  # of any class: the others must hear of it, or they wait for this process for ever
        if explains_itself(error):
            raise
        processes.wait_for_failure_of_another()
        what = f"{type(error).__name__}: {shortened(str(error).partition(chr(10))[0], 200)}"
        if any(word in str(error) for word in SIGNS_OF_LOSS):
            raise LostProcessError(
                f"process {processes.process_id()} has lost the connection to another one, which has probably ended "
                f"({what}). See what that process printed, mend the cause, and start all processes again, a training "
                "with --resume."
            ) from error
        traceback.print_exc()
        processes.fail(1, what)
    processes.leave()
    return code
