"""score: the log-probability of translations that exist already."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from flax_transformer.data.parallel_text import ParallelTextConfig, read_parallel_text
from flax_transformer.errors import ConfigError
from flax_transformer.inference.quantize import Quantize
from flax_transformer.inference.scorer import Scorer, corpus_perplexity
from flax_transformer.inference.translation import cut_line
from flax_transformer.inference.translator import Translator
from flax_transformer.run_folder import RunFolder
from flax_transformer.training.checkpoint import Choice


@dataclass(frozen=True)
class ScoreOptions:
    """Prints a score for each pair of a source and a target file, one a line, and sums them up on standard error.

    The score of a pair is its log-probability (nats, end token included) divided by the length penalty. That is the
    number that translate prints for an output that has ended, unless a repetition penalty, a coverage penalty or a
    forced end had a part in it, or the output's text is cut into other tokens than it was made of.

    Attributes:
        run: run folder of the model, or several as an ensemble.
        source: one sentence a line, plain or .gz; or .tsv or .jsonl, in the run's columns or keys.
        target: its translation, line by line.
        checkpoint: the one that was best on validation text, or the last.
        length_penalty: such as gnmt:0.6, average:1.0 or none; the run's own setting when left out.
        quantize: "int8" makes 8-bit integers of the weights, "bfloat16" computes in bfloat16, as translate does.
        json: print an object for each pair, with the log-probability of every token.
    """

    run: tuple[Path, ...]
    source: Path
    target: Path
    checkpoint: Choice = "best"
    length_penalty: str | None = None
    quantize: Quantize = "none"
    json: bool = False


def main(arguments: list[str], program: str) -> int:
    """Returns the exit code: 0, or 4 when lines were shortened.

    Raises:
        InputError: a bad run folder, setting or file, or a pair that cannot be scored.
    """
    options = tyro.cli(ScoreOptions, args=arguments, prog=program)
    if not options.run:
        raise ConfigError("give the run folder of a trained model by --run FOLDER.")
    config = RunFolder.open(options.run[0]).read_config()
    columns = config.data if isinstance(config.data, ParallelTextConfig) else None
    text = read_parallel_text(options.source, options.target, columns)
    scorer = Scorer(Translator.load(options.run, checkpoint=options.checkpoint, quantize=options.quantize))
    scores = scorer.score(text.source, text.target, options.length_penalty)
    for number, score in enumerate(scores, start=1):
        if score.truncated:
            warning = cut_line(f"{options.source}, line {number}", scorer.translator.max_source_length, "read")
            print(f"warning: {warning}", file=sys.stderr)
        if options.json:
            named = {name: getattr(score, name) for name in ("score", "log_prob", "tokens", "token_scores")}
            line = json.dumps(named, ensure_ascii=False)
        else:
            line = f"{score.score:.6f}"
        sys.stdout.buffer.write(f"{line}\n".encode())  # UTF-8 whatever the locale, as translate writes
    sys.stdout.buffer.flush()
    tokens = sum(len(score.token_scores) for score in scores)
    print(
        f"{len(scores):,} pairs, {tokens:,} target tokens, log-probability "
        f"{sum(score.log_prob for score in scores):.2f}, perplexity {corpus_perplexity(scores):.4f}",
        file=sys.stderr,
    )
    return 4 if any(score.truncated for score in scores) else 0
