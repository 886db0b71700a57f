"""evaluate: translate a file and score it against a reference."""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from flax_transformer.data.parallel_text import ParallelTextConfig, read_parallel_text
from flax_transformer.decoding.beam_search import StopRule
from flax_transformer.errors import InputError
from flax_transformer.inference.evaluate import evaluate
from flax_transformer.inference.prepare import Quantize
from flax_transformer.inference.translation import cut_line
from flax_transformer.inference.translator import Translator
from flax_transformer.run_folder import RunFolder
from flax_transformer.training.checkpoint import Choice


@dataclass(frozen=True)
class EvaluateOptions:
    """Translates a source file and prints BLEU and chrF against a reference file, with their signatures.

    Attributes:
        run: run folder of the model.
        source: text to translate, plain or .gz, one sentence a line; or .tsv or .jsonl, in the run's columns or keys.
        reference: its translation, line by line.
        checkpoint: the one that was best on validation text, or the last.
        beam_size: hypotheses kept at each step; the run's own setting when left out.
        length_penalty: such as gnmt:0.6, average:1.0 or none; the run's own setting when left out.
        stop: when a sentence stops, sure, likely or finished; the run's own setting when left out.
        quantize: "int8" makes 8-bit integers of the weights, which is faster on a CPU with instructions for them;
            "bfloat16" computes in bfloat16, which is faster on an accelerator, and on a CPU with AMX.
        output: where to write the translations; nowhere when left out.
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
    """Returns the exit code: 0, or 4 when lines were shortened.

    Raises:
        InputError: a bad run folder, setting or file.
    """
    options = tyro.cli(EvaluateOptions, args=arguments, prog=program)
    config = RunFolder.open(options.run).read_config()
    columns = config.data if isinstance(config.data, ParallelTextConfig) else None
    text = read_parallel_text(options.source, options.reference, columns)
    if options.output is not None and not options.output.parent.is_dir():
        raise InputError(f"--output {options.output}: there is no folder {options.output.parent}. Make it first.")
    if options.output is not None and options.output.is_dir():
        raise InputError(f"--output {options.output} is a folder. Name a file.")
    translator = Translator.load(options.run, checkpoint=options.checkpoint, quantize=options.quantize)
    changes = {name: getattr(options, name) for name in ("beam_size", "length_penalty", "stop")}
    translations = translator.translate(text.source, **changes)
    hypotheses = [t.text for t in translations]
    print(evaluate(hypotheses, text.target, config.evaluation.bleu_tokenizer).text)
    if options.output is not None:
        options.output.write_text("".join(f"{h}\n" for h in hypotheses), encoding="utf-8")
    shortened = [number for number, t in enumerate(translations, start=1) if t.truncated]
    for number in shortened:
        warning = cut_line(f"{options.source}, line {number}", translator.max_source_length)
        print(f"warning: {warning}", file=sys.stderr)
    return 4 if shortened else 0
