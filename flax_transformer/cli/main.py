"""The command `flax-transformer VERB ...`. It sets up the process, calls the verb, and prints a user's mistakes.

Exit codes:
    0: done.
    1: failed.
    2: wrong usage or invalid input.
    3: a signal stopped a training, and its state was saved.
    4: done, but some lines were cut, lack a required phrase, or have no output.
    130: another command was interrupted.
"""

import contextlib
import importlib
import logging
import os
import platform
import sys
import traceback
from collections.abc import Callable
from typing import Any

from flax_transformer.errors import (
    InputError,
    describe_os_error,
    did_you_mean,
    explains_itself,
    lacks_memory,
    shortened,
    shown,
)
from flax_transformer.standard_streams import escape_unknown_characters, lossy_standard_streams
from flax_transformer.user_cache import remove_damaged_programs, writable_cache

Verb = Callable[[list[str], str], int]  # (arguments, program) -> exit code

VERBS = {
    "init": "look at a corpus, split it, and write a first recipe for it and for this machine",
    "prepare": "train the tokenizers and tokenise the text of a configuration, before the training",
    "train": "train as a configuration says, then test",
    "translate": "translate a file or standard input, line by line",
    "attention": "write a web page about how a model translates a sentence",
    "score": "print the log-probability of existing translations",
    "evaluate": "translate a file and score it against a reference",
    "average": "average several checkpoints of a run into a new run folder",
    "convert": "convert a run to a MarianMT model of Hugging Face, or such a model to a run",
    "plot": "draw the curves of runs, finished or not",
    "compare": "compare finished runs in a table and two pictures",
    "plan": "tell what a recipe needs on hardware that is not there",
    "completion": "print a script that completes verbs and options in bash or zsh",
}

USAGE = "usage: flax-transformer VERB [options]\n\n" + "\n".join(f"  {v:10} {text}" for v, text in VERBS.items())


def verb(name: str) -> Verb:
    """Returns the verb of this name. Its module and the libraries that it needs are imported when it is called."""

    def run(arguments: list[str], program: str) -> int:
        return importlib.import_module(f"flax_transformer.cli.{name}").main(arguments, program)

    return run


# XLA's devices warn after five minutes of waiting for each other, and abort after a day.
PATIENT_COLLECTIVES = (
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=300 --xla_cpu_collective_call_terminate_timeout_seconds=86400"
)


def open_standard_streams() -> None:
    """Opens standard streams that the caller has closed on the null device.

    Otherwise the next file that is opened takes the number of a standard stream, and gets what is meant for it.
    """
    for descriptor, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless the user has named another or turned it off.

    Without a folder that can be written they are not kept.
    """
    import jax

    settings: Any = jax.config
    if settings.jax_compilation_cache_dir is None and settings.jax_enable_compilation_cache:
        if (folder := writable_cache("compiled")) is not None:
            remove_damaged_programs(folder)
            jax.config.update("jax_compilation_cache_dir", str(folder))


def use_every_core() -> None:
    """Makes each CPU core a device, unless the user has set the number of devices. Accelerators are not affected.

    The rows of a batch are then split over the cores. That is faster than splitting each operation. Each core works on
    smaller arrays in its own cache, and no core waits for another after each operation. The number of devices is a
    power of two, at most `ROW_MULTIPLE`, since that divides the rows of every batch.

    By default XLA aborts the process if its devices wait for each other for long. Other processes may keep a core busy
    for a longer time, so the limit is raised to a day.
    """
    import jax

    from flax_transformer.data.batching import ROW_MULTIPLE

    settings: Any = jax.config
    flags = os.environ.get("XLA_FLAGS", "")
    if settings.jax_num_cpu_devices > 0 or "xla_force_host_platform_device_count" in flags:
        return
    if "xla_cpu_collective_call" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {PATIENT_COLLECTIVES}".strip()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jax.config.update("jax_num_cpu_devices", min(1 << (cores.bit_length() - 1), ROW_MULTIPLE))


# Settings of glibc's allocator: the process keeps its memory, in huge pages where the kernel has them.
KEPT_MEMORY = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {"hugetlb": 1, "mmap_max": 0, "trim_threshold": 1 << 40, "top_pad": 1 << 26}.items()
)


def keep_memory() -> None:
    """Starts this process again with `KEPT_MEMORY`, on Linux with glibc, unless the user has set GLIBC_TUNABLES.

    XLA for CPU allocates its temporary arrays anew in every step. By default, glibc returns such large blocks to the
    system at once. The system then clears each small page again, which takes much of a training step
    (docs/lab_book.md, "Temporaries kept by the allocator"). The allocator reads its settings only when a process
    starts. So this function is called before slow imports.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc" or "GLIBC_TUNABLES" in os.environ:
        return
    os.environ["GLIBC_TUNABLES"] = KEPT_MEMORY
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def silence_orbax() -> Callable[[], None]:
    """Keeps Orbax from printing, and returns a function that lets it print again. It raises the errors, too.

    It logs normal events as warnings, and an error of a full disk several times. After such an error TensorStore, its
    library, prints a traceback for each array whose writing ends when nobody waits for it.
    """
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level

    def without_late_arrays(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    def undo() -> None:
        logger.setLevel(level)
        sys.unraisablehook = hook

    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = without_late_arrays
    return undo


def run_verb(verb: Verb, arguments: list[str], program: str) -> int:
    """Returns the exit code of a verb. An error that a user can cause is one paragraph; --debug adds the traceback.

    Messages that standard error cannot take are lost, and end nothing. An error of one process ends all others.
    """
    escape_unknown_characters(sys.stdout)
    debug, arguments = "--debug" in arguments, [argument for argument in arguments if argument != "--debug"]
    with contextlib.ExitStack() as stack:
        stack.callback(silence_orbax())
        stack.enter_context(lossy_standard_streams(output=False))
        from flax_transformer.cli.process_group import run_in_group
        from flax_transformer.parallel import processes

        try:
            use_compilation_cache()
            use_every_core()
            return run_in_group(verb, arguments, program)
        except (Exception, KeyboardInterrupt) as error:
            if not explains_itself(error):
                raise
            code, text = exit_code(error), describe(error)
            if debug and not isinstance(error, BrokenPipeError):
                traceback.print_exc()
            if text:
                print(text, file=sys.stderr)
            if processes.joined():
                processes.fail(code, text.removeprefix("error: ") or "the reader of its output has ended.")
            if not text:
                sys.stderr.close()
            return code


def exit_code(error: BaseException) -> int:
    """Returns the exit code for an error that a user can cause."""
    if isinstance(error, KeyboardInterrupt):  # a training catches the signal itself and saves its state
        return 130
    return 2 if isinstance(error, InputError | OSError) and not isinstance(error, BrokenPipeError) else 1


def describe(error: BaseException) -> str:
    """Returns the message of an error that a user can cause; nothing if the reader of standard output has ended."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, BrokenPipeError):
        return ""
    if lacks_memory(error):
        error = MemoryError(shortened(" ".join(str(error).split()), 200).rstrip("."))
    if isinstance(error, OSError):  # such as a file that cannot be read, a folder that cannot be written, a full disk
        return f"error: {describe_os_error(error)}"
    if isinstance(error, MemoryError):
        what = f": {error}" if str(error) else ""
        return f"error: there is not enough memory{what}. Use a smaller model, batch or text."
    return f"error: {error}"


def main() -> int:
    """Runs the verb that the command line names."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(
            f"{USAGE}\n\nflax-transformer VERB --help prints the options of a verb, and an example. --debug adds "
            "tracebacks to errors. --version prints what a report of a defect needs. train, translate, evaluate and "
            "score can be the work of several processes; see docs/scale/README.md."
        )
        return 0 if arguments else 2
    if arguments[0] == "--version":
        return run_verb(verb("versions"), arguments[1:], "flax-transformer --version")
    if arguments[0] not in VERBS:
        near = did_you_mean(arguments[0], VERBS)
        print(f"error: unknown verb {shown(arguments[0])}.{near}\n\n{USAGE}", file=sys.stderr)
        return 2
    return run_verb(verb(arguments[0]), arguments[1:], f"flax-transformer {arguments[0]}")


def set_up_process() -> None:
    """Prepares the process of a command. It comes before slow imports, and before any file is opened."""
    open_standard_streams()
    keep_memory()
    silence_orbax()  # until the process ends: its threads may print after the verb


def command() -> int:
    """Runs the command `flax-transformer`: `main` in a process that keeps its memory."""
    set_up_process()
    return main()


if __name__ == "__main__":
    sys.exit(command())
