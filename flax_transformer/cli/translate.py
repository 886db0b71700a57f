"""translate: one output line for each input line."""

import contextlib
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from flax_transformer.cli.partial_output import PartialOutput, StreamOutput, digest_of, is_stream
from flax_transformer.config.recipe import METHOD_FIELDS, DecodingConfig
from flax_transformer.data.parallel_text import SentenceReader
from flax_transformer.data.text_files import STANDARD_STREAM, chunks_of, iterate_lines
from flax_transformer.errors import ConfigError, InputError, shown
from flax_transformer.inference.alignment import word_alignment
from flax_transformer.inference.prepare import Quantize
from flax_transformer.inference.translation import Failures, Hypothesis, NoTranslation, Translation, cut_line
from flax_transformer.inference.translator import Translator
from flax_transformer.object_storage import resolved
from flax_transformer.parallel import processes
from flax_transformer.progress import Advance, no_progress, progress
from flax_transformer.run_folder import RunFolder
from flax_transformer.training.checkpoint import Checkpoints, Choice

# Most lines that are read, translated and written together. More lines fill batches better; fewer take less memory.
LINES_AT_ONCE = 4_096


@dataclass(frozen=True)
class TranslateOptions:
    """Translates line by line and writes one line for each input line, in order. An empty line stays empty.

    If the search finds no output for a line, an empty line is written, and a warning says why. With --scores the line
    has nan and a tab, and with --json an object that says why. From --method on, options that are left out take the
    run's own settings.

    Example: flax-transformer translate --run runs/mine --input input.en --output output.de

    Attributes:
        run: run folder of the model, or several as an ensemble.
        checkpoint: "best" is the best one on validation text, "last" the newest.
        input: file to translate, plain or compressed. A .tsv or .jsonl file is read by the column or key that the run
            was trained with. None or "-" reads standard input. Lines that come through a pipe are translated as they
            arrive.
        output: file to write, compressed if its name ends in .gz, .bz2 or .xz. None or "-" writes standard output.
        resume: continue an interrupted --output, with the same input and options. Warnings concern the new lines, and
            the exit code all lines.
        scores: write the score and a tab before each line.
        json: write an object for each line, with all hypotheses, their tokens and token scores.
        num_hypotheses: most outputs for each line; more than one needs --json.
        alignment: add the aligned words to each output, as pairs of source and target word (Moses format); needs
            --json.
        attention: add the attention to each output, and the source tokens to each object; needs --json. The attention
            has a row for each token score, and a column for each source token and the end token.
        quantize: "int8" makes weights 8-bit integers. It is faster on a CPU with instructions for them. "bfloat16"
            computes in bfloat16. It is faster on an accelerator, and on a CPU with AMX.
        prefix: text that every output begins with.
        required: file with a line for each input line: the phrases that the output must contain, separated by tabs.
        decoding: how to translate.
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
    attention: bool = False
    quantize: Quantize = "none"
    prefix: str | None = None
    required: Path | None = None
    decoding: Annotated[DecodingConfig, tyro.conf.arg(name="")] = field(default_factory=DecodingConfig)

    def __post_init__(self):
        needs = {"num-hypotheses": self.num_hypotheses > 1, "alignment": self.alignment, "attention": self.attention}
        for name, value in needs.items():
            if value and not self.json:
                raise ConfigError(f"--{name} needs --json: a line of text holds one translation and nothing else.")
        if self.scores and self.json:
            raise ConfigError("--scores and --json contradict each other: the objects have scores already.")
        if self.resume and (self.output is None or self.input is None):
            raise ConfigError("--resume needs --input and --output: it continues after the lines in the output.")


def read_phrases(path: Path) -> list[list[str]]:
    """Returns the phrases of each line of a file. It raises the errors of `LineReader`."""
    return [[phrase for phrase in line.split("\t") if phrase.strip()] for line in iterate_lines(path)]


def as_line(options: TranslateOptions, translation: Translation | NoTranslation) -> str:
    """Returns the output line of an input line."""
    if isinstance(translation, NoTranslation):
        if options.json:
            nothing = {"hypotheses": [], "truncated": translation.truncated, "error": str(translation.reason)}
            nothing |= {"source": []} if options.attention else {}
            return json.dumps(nothing, ensure_ascii=False)
        return "nan\t" if options.scores else ""
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
            words = "" if weights is None else word_alignment(translation.source_words, hypothesis.words, weights)
            values["alignment"] = words
        if options.attention:
            weights = hypothesis.attention
            values["attention"] = [] if weights is None else [[round(float(w), 6) for w in row] for row in weights]
        return values

    found: dict[str, Any] = {
        "hypotheses": [record(h) for h in translation.hypotheses],
        "truncated": translation.truncated,
    }
    if options.attention:
        found["source"] = translation.source
    return json.dumps(found, ensure_ascii=False)


def output_of(options: TranslateOptions, settings: dict[str, Any] | None) -> PartialOutput | StreamOutput:
    """Returns the output that translations are written to; `settings` is the result of `settings_of`.

    Raises:
        InputError: see `PartialOutput`.
    """
    if options.output is None or settings is None:
        return StreamOutput(STANDARD_STREAM if options.output is None else options.output)
    return PartialOutput(options.output, settings, options.resume)


def settings_of(options: TranslateOptions, phrases: list[list[str]] | None) -> dict[str, Any] | None:
    """Returns the settings that determine an output file, as JSON values; None for a stream.

    Raises:
        InputError: --resume without a file, or a run folder that cannot be read.
    """
    if options.output is None or is_stream(options.output):
        if options.resume:
            raise ConfigError(f"--resume continues a file, and --output {options.output} is a stream. Name a file.")
        return None
    settings: dict[str, Any] = asdict(options)
    settings |= settings.pop("decoding")
    for name in ("input", "output", "resume"):  # a digest of its lines stands for the input
        del settings[name]
    settings["run"] = []
    for run in options.run:  # a training may have changed the run since
        folder = RunFolder.open(run)
        with Checkpoints(folder.checkpoints) as checkpoints:

            def chosen(of: Checkpoints = checkpoints) -> tuple[int, str]:
                step = of.choose(options.checkpoint)
                return step, of.digest(step)

            step, digest = checkpoints.undisturbed(chosen)
            made_by = (digest, folder.tokenizers().fingerprint, folder.read_config().model)
        digest = hashlib.sha256(repr(made_by).encode()).hexdigest()
        settings["run"].append([str(resolved(folder.path)), step, digest])
    if phrases is not None:
        settings["required"] = hashlib.sha256(repr(phrases).encode()).hexdigest()
    return settings


def values_of(arguments: list[str], option: str) -> list[str]:
    """Returns the values of an option; an empty list if it is not given."""
    for position, argument in enumerate(arguments):
        if argument.startswith(f"{option}="):
            return [argument.removeprefix(f"{option}=")]
        if argument == option:
            return list(itertools.takewhile(lambda value: not value.startswith("--"), arguments[position + 1 :]))
    return []


def main(arguments: list[str], program: str) -> int:
    """Returns the exit code: 0, or 4 if a line was cut, lacks a required phrase or has no output.

    Raises:
        InputError: an invalid run folder, setting or file. Or no line has an output because of the settings.
        DivergenceError: no line has an output, since the model's scores are not finite.
    """
    defaults = TranslateOptions(run=())
    if runs := values_of(arguments, "--run"):  # the run's own settings are the defaults
        decoding = RunFolder.open(runs[0]).read_config().decoding
        if (method := "".join(values_of(arguments, "--method"))) in METHOD_FIELDS:
            decoding = decoding.with_method(method)  # without settings of the other method
        defaults = replace(defaults, run=tuple(map(Path, runs)), decoding=decoding)
    options = tyro.cli(TranslateOptions, args=arguments, prog=program, default=defaults)
    if not options.run:
        raise ConfigError("give the run folder of a trained model by --run FOLDER.")
    phrases = None if options.required is None else read_phrases(options.required)
    files, settings = RunFolder.open(options.run[0]).read_config().text_format, settings_of(options, phrases)
    source, output = None, None
    with contextlib.ExitStack() as opened:
        if processes.is_first():
            source = SentenceReader(options.input or STANDARD_STREAM, files.source_column, files.source_key)
            opened.enter_context(source)
            output = opened.enter_context(output_of(options, settings))
        translator = Translator.load(options.run, checkpoint=options.checkpoint, quantize=options.quantize)
        translator = translator.with_decoding(options.decoding)
        with processes.calls_of_first(translator.translate) as translate:
            if translate is None or source is None or output is None:
                return 0
            # A bar would stand between outputs that go to the same terminal.
            told = (
                progress("translating", only_on_terminals=True)
                if settings is not None
                else contextlib.nullcontext(no_progress)
            )
            with told as advance:
                return translate_stream(options, translator, translate, phrases, source, output, advance)


def warnings_of(number: int, translation: Translation | NoTranslation, max_source_length: int) -> Iterator[str]:
    """Yields the warnings about a line: it has no output, it was cut, or its output lacks required phrases."""
    if isinstance(translation, NoTranslation):
        yield f"line {number} has no output: {translation.reason}"
    else:
        empty = not translation.source
        reason = "the line is empty, and so is its output" if empty else "it reached its maximum length first"
        for phrase in translation.hypotheses[0].missing:
            yield f"the output of line {number} lacks {shown(phrase)}: {reason}."
    if translation.truncated:
        yield cut_line(f"line {number}", max_source_length)


@dataclass
class Total:
    """The totals of all lines of this call so far.

    Attributes:
        lines: number of lines.
        tokens: number of tokens of the best outputs.
        unfinished: number of best outputs that were cut at their maximum length.
        without: number of lines without an output.
    """

    lines: int = 0
    tokens: int = 0
    unfinished: int = 0
    without: int = 0

    def add(self, translations: Sequence[Translation | NoTranslation]) -> None:
        """Adds lines."""
        self.lines += len(translations)
        for translation in translations:
            if isinstance(translation, NoTranslation):
                self.without += 1
            else:
                self.tokens += len(translation.tokens)
                self.unfinished += not translation.hypotheses[0].finished

    def text(self, seconds: float) -> str:
        """Returns the totals as a line."""
        lines = "1 line has" if self.without == 1 else f"{self.without:,} lines have"
        without = f"; {lines} no output" if self.without else ""
        cut = f"; {self.unfinished:,} outputs were cut at their maximum length" if self.unfinished else ""
        return (
            f"{self.lines:,} sentences, {self.tokens:,} tokens in {seconds:.1f} s: {self.lines / seconds:,.1f} "
            f"sentences/s, {self.tokens / seconds:,.1f} tokens/s{without}{cut}"
        )


def skip_translated(source: SentenceReader, output: PartialOutput | StreamOutput) -> Any:
    """Reads the lines that have been translated before, and returns their digest.

    Raises:
        InputError: the output is a translation of other lines.
    """
    done, digest = output.progress.lines, digest_of([])
    for start in range(0, done, LINES_AT_ONCE):
        digest_of(list(itertools.islice(source, min(LINES_AT_ONCE, done - start))), digest)
    if digest.hexdigest() != output.progress.source:
        raise InputError(
            f"--resume: {source.name} does not begin with the {done:,} lines that have been translated: it is another "
            "file, or it has been changed."
        )
    return digest


def check_phrases(options: TranslateOptions, phrases: list[list[str]], name: str, done: int, ended: bool) -> None:
    """Raises an `InputError` if --required has more or fewer lines than the text.

    Args:
        options: options of the command.
        phrases: phrases of each line of --required.
        name: name of the text.
        done: number of lines of the text that have been read.
        ended: whether these are all lines of the text.
    """
    if done > len(phrases) or ended and done < len(phrases):
        raise InputError(
            f"--required {options.required} has {len(phrases):,} lines, and {name} has "
            f"{'fewer' if ended else 'more'}: line n of one belongs to line n of the other."
        )


def next_chunk(chunks: Iterator[list[str]], done: int, translated: int) -> list[str]:
    """Returns the next lines; an empty list at the end.

    Args:
        chunks: the lines.
        done: number of lines before them.
        translated: number of these that have a translation.

    Raises:
        InputError: a line that cannot be read.
    """
    try:
        return next(chunks, [])
    except InputError as bad_line:
        before = "were translated" if translated else "have no translation, so nothing is kept"
        raise InputError(f"{bad_line} The {done:,} lines before it {before}.") from bad_line


def translate_stream(
    options: TranslateOptions,
    translator: Translator,
    translate: Callable[..., list[Translation | NoTranslation]],
    phrases: list[list[str]] | None,
    source: SentenceReader,
    output: PartialOutput | StreamOutput,
    advance: Advance,
) -> int:
    """Translates a stream chunk by chunk with `translate`, a form of `translator.translate`. Returns the exit code.

    `advance` is told how many more lines are translated.

    Raises:
        InputError: a line that cannot be read; the lines before it are translated. Or --required has another number of
            lines, the prefix is impossible, or the output is a translation of another text.
        ConfigError, DivergenceError: the whole text has no output, of two lines or more (see `Failures.raise_if_all`).
    """
    translator.requests.constraints.prefix(options.prefix or "")  # an impossible prefix concerns every line
    digest, done, total = skip_translated(source, output), output.progress.lines, Total()
    faulty, started = output.progress.faulty, time.monotonic()
    translated = output.progress.translated
    failures = Failures(others=translated)
    chunks = chunks_of(source, LINES_AT_ONCE, len, source.next_has_arrived)
    while chunk := next_chunk(chunks, done, translated):
        if phrases is not None:
            check_phrases(options, phrases, source.name, done + len(chunk), ended=False)
        translations = translate(
            sentences=chunk,
            num_hypotheses=options.num_hypotheses,
            prefixes=None if options.prefix is None else [options.prefix] * len(chunk),
            required=None if phrases is None else phrases[done : done + len(chunk)],
            attention=options.alignment or options.attention,
        )
        failures.add(translations)
        if failures.first is not None and not processes.joined() and not translator.parameters.are_finite:
            failures.raise_if_all()  # no line to come can have an output
        warnings = [
            warning
            for number, translation in enumerate(translations, start=done + 1)
            for warning in warnings_of(number, translation, translator.model.max_source_length)
        ]
        num_translated = sum(isinstance(each, Translation) and bool(each.source) for each in translations)
        lines = [as_line(options, translation) for translation in translations]
        output.write(lines, digest_of(chunk, digest).hexdigest(), bool(warnings), num_translated)
        translated += num_translated
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        faulty = faulty or bool(warnings)
        total.add(translations)
        done += len(chunk)
        advance(len(chunk))
    if phrases is not None:
        check_phrases(options, phrases, source.name, done, ended=True)
    failures.raise_if_all()  # only now, so that it does not matter how the text was cut into chunks
    print(total.text(max(time.monotonic() - started, 1e-9)), file=sys.stderr)
    return 4 if faulty else 0
