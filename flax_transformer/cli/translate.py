"""translate: standard input to standard output, one line out for each line in."""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

from flax_transformer.errors import InputError
from flax_transformer.inference.translator import Translator
from flax_transformer.training.checkpoint import Choice

# Lines read, translated and written together: enough to fill batches of like length, few enough to hold in memory.
LINES_AT_ONCE = 2_048


@dataclass(frozen=True)
class TranslateOptions:
    """Translates standard input to standard output: one line out for each line in, in order, empty for empty.

    Attributes:
        run: run folder of the model.
        checkpoint: the one that was best on validation text, or the last.
        beam_size: hypotheses kept at each step; the run's own setting when left out.
        length_penalty: such as gnmt:0.6, average:1.0 or none; the run's own setting when left out.
    """

    run: Path
    checkpoint: Choice = "best"
    beam_size: int | None = None
    length_penalty: str | None = None


def read_lines(stream) -> Iterator[str]:
    """Yields the lines of a binary stream without their line ends.

    Raises:
        InputError: a line that is not UTF-8.
    """
    for number, line in enumerate(stream, start=1):
        try:
            yield line.decode("utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise InputError(
                f"standard input, line {number}: not valid UTF-8 ({error.reason} at byte {error.start} of the line). "
                f"The {number - 1} lines before it were translated."
            ) from error


def main(arguments: list[str], program: str) -> int:
    """Returns the exit code: 0, or 4 when lines were shortened.

    Raises:
        InputError: a bad run folder, setting or line.
    """
    options = tyro.cli(TranslateOptions, args=arguments, prog=program)
    translator = Translator.load(options.run, checkpoint=options.checkpoint)
    at_once = 1 if sys.stdin.isatty() else LINES_AT_ONCE
    done, shortened = 0, 0
    lines = read_lines(sys.stdin.buffer)
    error = None
    while error is None:
        chunk: list[str] = []
        try:
            chunk.extend(itertools.islice(lines, at_once))
        except InputError as bad_line:  # what was read before it is still translated
            error = bad_line
        if not chunk and error is None:
            break
        translations = translator.translate(chunk, beam_size=options.beam_size, length_penalty=options.length_penalty)
        for number, translation in enumerate(translations, start=done + 1):
            sys.stdout.buffer.write(f"{translation.text}\n".encode())  # UTF-8 whatever the locale, as the input is
            if translation.truncated:
                shortened += 1
                limit = translator.max_source_length - 1
                print(
                    f"warning: line {number} is longer than the model's {limit} tokens; only its beginning was "
                    "translated.",
                    file=sys.stderr,
                )
        sys.stdout.buffer.flush()
        done += len(chunk)
    if error is not None:
        raise error
    return 4 if shortened else 0
