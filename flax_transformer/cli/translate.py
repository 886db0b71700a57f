"""translate: lines to lines, one out for each one in."""

import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from flax_transformer.config import DecodingConfig
from flax_transformer.errors import ConfigError, InputError
from flax_transformer.inference.alignment import word_alignment
from flax_transformer.inference.quantize import Quantize
from flax_transformer.inference.translator import Hypothesis, Translation, Translator
from flax_transformer.run_folder import RunFolder
from flax_transformer.training.checkpoint import Choice

# Lines read, translated and written together: enough to fill batches of like length, few enough to hold in memory.
LINES_AT_ONCE = 4_096


@dataclass(frozen=True)
class TranslateOptions:
    """Translates line by line: one line out for each line in, in order, empty for empty.

    Attributes:
        run: run folder of the model, or several as an ensemble.
        checkpoint: the one that was best on validation text, or the last.
        input: file to translate; standard input when left out.
        output: file to write; standard output when left out.
        resume: go on with an --output that was interrupted, with the same options; warnings are of the rest alone.
        scores: put the score and a tab before each line.
        json: write an object for each line, with all hypotheses, their tokens and token scores.
        num_hypotheses: at most so many of each line; more than one needs --json.
        alignment: add to each object which source word each target word was made from (Moses format); needs --json.
        quantize: "int8" makes 8-bit integers of the weights, which is faster on a CPU with instructions for them.
        prefix: what every output begins with.
        required: file with as many lines as the input: the phrases, separated by tabs, that the output of the same line
            must hold.
        decoding: how to translate; the run's own settings when left out.
    """

    run: tuple[Path, ...]
    checkpoint: Choice = "best"
    input: Path | None = None
    output: Path | None = None
    resume: bool = False
    scores: bool = False
    json: bool = False
    num_hypotheses: int = 1
    alignment: bool = False
    quantize: Quantize = "none"
    prefix: str | None = None
    required: Path | None = None
    decoding: Annotated[DecodingConfig, tyro.conf.arg(name="")] = field(default_factory=DecodingConfig)

    def __post_init__(self):
        for name, value in (("num-hypotheses", self.num_hypotheses > 1), ("alignment", self.alignment)):
            if value and not self.json:
                raise ConfigError(f"--{name} needs --json: a line of text holds one translation and nothing else.")
        if self.scores and self.json:
            raise ConfigError("--scores and --json contradict each other: the objects hold scores already.")
        if self.resume and (self.output is None or self.input is None):
            raise ConfigError("--resume needs --input and --output: it goes on behind the lines in the output.")


def read_lines(stream: Any, name: str) -> Iterator[str]:
    """Yields the lines of a binary stream without their line ends.

    Raises:
        InputError: a line that is not UTF-8.
    """
    for number, line in enumerate(stream, start=1):
        try:
            yield line.decode("utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{name}, line {number}: not valid UTF-8 ({error.reason} at byte {error.start} of the line). "
                f"The {number - 1} lines before it were translated."
            ) from error


def read_phrases(path: Path) -> list[list[str]]:
    """Returns the phrases of each line of a file.

    Raises:
        InputError: not a file, or not UTF-8.
    """
    if not path.is_file():
        raise InputError(f"--required {path}: there is no such file.")
    try:
        lines = path.read_bytes().decode("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"--required {path}: not valid UTF-8 ({error.reason} at byte {error.start}).") from error
    return [[phrase for phrase in line.removesuffix("\r").split("\t") if phrase.strip()] for line in lines]


def as_line(options: TranslateOptions, translation: Translation) -> str:
    """Returns what is written for a line."""
    if not options.json:
        return f"{translation.score:.6f}\t{translation.text}" if options.scores else translation.text

    def record(hypothesis: Hypothesis) -> dict[str, Any]:
        values: dict[str, Any] = {
            "text": hypothesis.text,
            "score": hypothesis.score,
            "finished": hypothesis.finished,
            "tokens": hypothesis.tokens,
            "token_scores": hypothesis.token_scores,
        }
        if options.decoding.method == "sampling":
            values["count"] = hypothesis.count
        if hypothesis.utility is not None:
            values["utility"] = hypothesis.utility
        if options.required is not None:
            values["missing"] = hypothesis.missing
        if options.alignment:
            weights = hypothesis.attention
            words = "" if weights is None else word_alignment(translation.source, hypothesis.tokens, weights)
            values["alignment"] = words
        return values

    found = {
        "hypotheses": [record(h) for h in translation.hypotheses],
        "truncated": translation.truncated,
    }
    return json.dumps(found, ensure_ascii=False)


def complete_lines(partial: Path) -> int:
    """Returns the number of whole lines in a file, and cuts off what stands behind the last of them."""
    if not partial.exists():
        return 0
    lines = end = 0
    with partial.open("rb+") as file:
        for line in file:
            if line.endswith(b"\n"):
                lines, end = lines + 1, end + len(line)
        file.truncate(end)
    return lines


@contextlib.contextmanager
def opened(options: TranslateOptions) -> Iterator[tuple[Any, Any, int]]:
    """Yields input, output, and the number of lines that have been done; an output file gets its name when all is done.

    Raises:
        InputError: a file that is not there, or an output that is there already.
    """
    with contextlib.ExitStack() as stack:
        source: Any = sys.stdin.buffer
        if options.input is not None:
            if not options.input.is_file():
                raise InputError(f"--input {options.input}: there is no such file.")
            source = stack.enter_context(options.input.open("rb"))
        if options.output is None:
            yield source, sys.stdout.buffer, 0
            return
        partial = options.output.with_name(options.output.name + ".partial")
        if options.output.exists():
            raise InputError(f"--output {options.output} is there already. Choose another name, or remove it.")
        if partial.exists() and not options.resume:
            raise InputError(
                f"{partial} is there from a translation that was interrupted. Go on with it by --resume, or remove it."
            )
        if not options.output.parent.is_dir():
            raise InputError(f"--output {options.output}: there is no folder {options.output.parent}. Make it first.")
        done = complete_lines(partial)
        try:
            with partial.open("ab") as output:
                yield source, output, done
        finally:
            if partial.stat().st_size == 0:  # nothing was translated that could be gone on with
                partial.unlink()
        partial.touch()
        os.replace(partial, options.output)


def runs_of(arguments: list[str]) -> list[str]:
    """Returns the values of --run."""
    for position, argument in enumerate(arguments):
        if argument.startswith("--run="):
            return [argument.removeprefix("--run=")]
        if argument == "--run":
            return list(itertools.takewhile(lambda value: not value.startswith("--"), arguments[position + 1 :]))
    return []


def main(arguments: list[str], program: str) -> int:
    """Returns the exit code: 0, or 4 when lines were shortened or lack a required phrase.

    Raises:
        InputError: a bad run folder, setting, file or line.
    """
    defaults = TranslateOptions(run=())
    if runs := runs_of(arguments):  # the run says what is used where nothing is said
        decoding = RunFolder.open(runs[0]).read_config().decoding
        defaults = replace(defaults, run=tuple(map(Path, runs)), decoding=decoding)
    options = tyro.cli(TranslateOptions, args=arguments, prog=program, default=defaults)
    if not options.run:
        raise ConfigError("give the run folder of a trained model by --run FOLDER.")
    phrases = None if options.required is None else read_phrases(options.required)
    with opened(options) as (source, output, done):
        translator = Translator.load(options.run, checkpoint=options.checkpoint, quantize=options.quantize)
        translator = translator.with_decoding(options.decoding)
        return translate_stream(options, translator, phrases, source, output, done)


def translate_stream(
    options: TranslateOptions,
    translator: Translator,
    phrases: list[list[str]] | None,
    source: Any,
    output: Any,
    skipped: int,
) -> int:
    """Translates a stream piece by piece, and returns the exit code.

    Raises:
        InputError: a bad line; what stands before it is translated. Phrases that no output can hold, or more or fewer
            lines of them.
    """
    if phrases is not None:
        translator.encode_required(phrases)  # raises now, rather than in the middle
    at_once = 1 if options.input is None and sys.stdin.isatty() else LINES_AT_ONCE
    name = "standard input" if options.input is None else str(options.input)
    lines = read_lines(source, name)
    if skipped > sum(1 for _ in itertools.islice(lines, skipped)):
        raise InputError(f"{name} has fewer lines than the {skipped:,} that have been translated: it is another file.")
    done, faulty, tokens, error = skipped, False, 0, None
    started = time.monotonic()
    while error is None:
        chunk: list[str] = []
        try:
            chunk.extend(itertools.islice(lines, at_once))
        except InputError as bad_line:  # what was read before it is still translated
            error = bad_line
        if phrases is not None and (done + len(chunk) > len(phrases) or not chunk and done < len(phrases)):
            raise InputError(
                f"--required {options.required} has {len(phrases):,} lines, and {name} has "
                f"{'fewer' if not chunk else 'more'}: line n of one belongs to line n of the other."
            )
        if not chunk and error is None:
            break
        translations = translator.translate(
            chunk,
            num_hypotheses=options.num_hypotheses,
            prefixes=None if options.prefix is None else [options.prefix] * len(chunk),
            required=None if phrases is None else phrases[done : done + len(chunk)],
            attention=options.alignment,
        )
        for number, translation in enumerate(translations, start=done + 1):
            output.write(f"{as_line(options, translation)}\n".encode())  # UTF-8 whatever the locale, as the input is
            tokens += len(translation.tokens)
            faulty |= translation.truncated or bool(translation.hypotheses[0].missing)
            for phrase in translation.hypotheses[0].missing:
                print(
                    f"warning: the output of line {number} lacks {phrase!r}: it reached its maximum length first.",
                    file=sys.stderr,
                )
            if translation.truncated:
                limit = translator.max_source_length - 1
                print(
                    f"warning: line {number} is longer than the model's {limit} tokens; only its beginning was "
                    "translated.",
                    file=sys.stderr,
                )
        output.flush()
        done += len(chunk)
    if error is not None:
        raise error
    seconds = max(time.monotonic() - started, 1e-9)
    sentences = done - skipped
    print(
        f"{sentences:,} sentences, {tokens:,} tokens in {seconds:.1f} s: {sentences / seconds:,.1f} sentences/s, "
        f"{tokens / seconds:,.1f} tokens/s",
        file=sys.stderr,
    )
    return 4 if faulty else 0
