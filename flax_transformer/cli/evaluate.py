"""evaluate: BLEU and chrF of a run on a source and a reference file."""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from flax_transformer.cli.partial_output import output_of_lines
from flax_transformer.data.parallel_text import read_parallel_text
from flax_transformer.decoding.stop_rules import StopRule
from flax_transformer.inference.evaluate import bleu_metric, evaluate
from flax_transformer.inference.prepare import Quantize
from flax_transformer.inference.translation import NoTranslation, cut_line, texts_or_empty
from flax_transformer.inference.translator import Translator
from flax_transformer.parallel import processes
from flax_transformer.run_folder import RunFolder
from flax_transformer.training.checkpoint import Choice


@dataclass(frozen=True)
class EvaluateOptions:
    """Translates a source file and prints BLEU and chrF against a reference file, with their signatures.

    A line for which the search finds no output counts as empty.

    Example: flax-transformer evaluate --run runs/mine --source test.en --reference test.de

    Attributes:
        run: run folder of the model.
        source: text to translate, one sentence a line, plain or compressed; "-" is standard input. A .tsv or .jsonl
            file is read by the column or key that the run was trained with.
        reference: translations of these lines, in the same formats.
        checkpoint: "best" is the best one on validation text, "last" the newest.
        beam_size: number of hypotheses kept at each step; 1 is greedy search. None takes the run's own setting.
        length_penalty: gnmt:0.6, average:1.0 or none, with any exponent. None takes the run's own setting.
        stop: rule that ends the search of a sentence; see translate --help. None takes the run's own setting.
        quantize: "int8" makes weights 8-bit integers. It is faster on a CPU with instructions for them. "bfloat16"
            computes in bfloat16. It is faster on an accelerator, and on a CPU with AMX.
        output: file for the translations, compressed if its name ends in .gz, .bz2 or .xz. None writes no file.
    """

    run: Path
    source: Path
    reference: Path
    checkpoint: Choice = "best"
    beam_size: int | None = None
    length_penalty: str | None = None
    stop: StopRule | None = None
    quantize: Quantize = "none"
    output: Path | None = None


def main(arguments: list[str], program: str) -> int:
    """Returns the exit code: 0, or 4 if a line was cut or has no output.

    Raises:
        InputError: an invalid run folder, setting or file.
        DivergenceError: no line has an output, since the model's scores are not finite.
    """
    options = tyro.cli(EvaluateOptions, args=arguments, prog=program)
    config = RunFolder.open(options.run).read_config()
    bleu_metric(config.evaluation.bleu_tokenizer)  # which may be missing
    text, write = None, None
    with contextlib.ExitStack() as opened:
        if processes.is_first():
            text = read_parallel_text(options.source, options.reference, config.text_format)
            if options.output is not None:
                inputs = options.source, options.reference
                write = opened.enter_context(output_of_lines(options.output, inputs))
        translator = Translator.load(options.run, checkpoint=options.checkpoint, quantize=options.quantize)
        with processes.calls_of_first(translator.translate) as translate:
            if translate is None or text is None:
                return 0
            changes = {name: getattr(options, name) for name in ("beam_size", "length_penalty", "stop")}
            translations = translate(sentences=text.source, **changes)
        hypotheses = texts_or_empty(translations)
        print(evaluate(hypotheses, text.target, config.evaluation.bleu_tokenizer).text, flush=True)
        if write is not None:
            write(hypotheses)
    warnings = []
    for number, found in enumerate(translations, start=1):
        line = f"{options.source}, line {number}"
        if isinstance(found, NoTranslation):
            warnings.append(f"{line} has no output: {found.reason}")
        elif found.truncated:
            warnings.append(cut_line(line, translator.model.max_source_length))
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return 4 if warnings else 0
