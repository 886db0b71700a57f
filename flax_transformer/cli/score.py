"""score: the log-probability of existing translations."""

import contextlib
import itertools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from flax_transformer.data.parallel_text import ParallelFiles
from flax_transformer.data.text_files import chunks_of
from flax_transformer.errors import ConfigError, DivergenceError
from flax_transformer.inference.prepare import Quantize
from flax_transformer.inference.scorer import NoScore, PairScore, Scorer
from flax_transformer.inference.translation import cut_line
from flax_transformer.inference.translator import Translator
from flax_transformer.parallel import processes
from flax_transformer.run_folder import RunFolder
from flax_transformer.training.checkpoint import Choice

# Pairs that are in memory at the same time.
PAIRS_AT_ONCE = 4_096


@dataclass(frozen=True)
class ScoreOptions:
    """Prints the score of each pair of lines of two files, and the totals on standard error.

    The score is the log-probability (nats, end token included) divided by the length penalty. It equals the score that
    translate prints for the same output, with three exceptions:
    1. A repetition penalty, a coverage penalty or force_eos changed the score of translate.
    2. The output was cut at its maximum length.
    3. The tokenizer cuts the text into other tokens than the search found.

    A pair without a score is printed as nan, and a warning says why. With --json its object says why.

    Example: flax-transformer score --run runs/mine --source test.en --target test.de

    Attributes:
        run: run folder of the model, or several as an ensemble.
        source: source sentences, one a line, plain or compressed; "-" is standard input. A .tsv or .jsonl file is read
            by the column or key that the run was trained with.
        target: translations of these lines, in the same formats.
        checkpoint: "best" is the best one on validation text, "last" the newest.
        length_penalty: gnmt:0.6, average:1.0 or none, with any exponent. None takes the run's own setting.
        quantize: "int8" makes weights 8-bit integers, "bfloat16" computes in bfloat16; see translate --help.
        json: print an object for each pair, with the log-probability of every token.
    """

    run: tuple[Path, ...]
    source: Path
    target: Path
    checkpoint: Choice = "best"
    length_penalty: str | None = None
    quantize: Quantize = "none"
    json: bool = False


@dataclass
class Total:
    """The totals of all pairs so far.

    Attributes:
        pairs: number of pairs.
        without: number of pairs without a score.
        tokens: number of target tokens of the scored pairs, end tokens included.
        log_prob: log-probability of these targets, in nats.
        shortened: whether a source was cut.
        diverged: number of pairs whose scores are not finite.
        first_diverged: the first of these.
    """

    pairs: int = 0
    without: int = 0
    tokens: int = 0
    log_prob: float = 0.0
    shortened: bool = False
    diverged: int = 0
    first_diverged: NoScore | None = None

    def add(self, score: PairScore | NoScore) -> None:
        """Adds a pair."""
        self.pairs += 1
        if isinstance(score, NoScore):
            self.without += 1
            if isinstance(score.reason, DivergenceError):
                self.diverged += 1
                self.first_diverged = self.first_diverged or score
            return
        self.tokens += len(score.token_scores)
        self.log_prob += score.log_prob
        self.shortened |= score.truncated

    def raise_if_diverged(self) -> None:
        """Raises if no pair has a score, since none is finite. Then the model is at fault.

        Raises:
            DivergenceError: all pairs that are not empty have scores that are not finite.
        """
        if self.first_diverged is not None and not self.tokens and self.diverged == self.without:
            raise self.first_diverged.error from self.first_diverged.reason

    @property
    def text(self) -> str:
        """The totals as a line. The perplexity is exp(-log-probability / tokens)."""
        perplexity = math.exp(-self.log_prob / self.tokens) if self.tokens else math.nan
        pairs = "1 pair has" if self.without == 1 else f"{self.without:,} pairs have"
        without = f"; {pairs} no score" if self.without else ""
        return (
            f"{self.pairs:,} pairs, {self.tokens:,} target tokens, log-probability {self.log_prob:.2f}, perplexity "
            f"{perplexity:.4f}{without}"
        )


def main(arguments: list[str], program: str) -> int:
    """Returns the exit code: 0, or 4 if a source was cut or a pair has no score.

    Raises:
        InputError: an invalid run folder, setting or file. The pairs before an invalid line are scored.
        DivergenceError: no pair has a score, since the model's scores are not finite.
    """
    options = tyro.cli(ScoreOptions, args=arguments, prog=program)
    if not options.run:
        raise ConfigError("give the run folder of a trained model by --run FOLDER.")
    config = RunFolder.open(options.run[0]).read_config()
    chunks = None
    with contextlib.ExitStack() as opened:
        if processes.is_first():
            files = ParallelFiles(options.source, options.target, config.text_format)
            pairs = opened.enter_context(files.open())
            # The first pair is read before the model, so that bad files fail early.
            given = itertools.chain([next(pairs)], pairs)
            chunks = chunks_of(given, PAIRS_AT_ONCE, lambda pair: len("".join(pair)), pairs.next_has_arrived)
        scorer = Scorer(Translator.load(options.run, checkpoint=options.checkpoint, quantize=options.quantize))
        with processes.calls_of_first(scorer.score) as score:
            if score is None or chunks is None:
                return 0
            total = Total()
            for chunk in chunks:
                sources, targets = zip(*chunk, strict=True)
                scores = score(sources=sources, targets=targets, length_penalty=options.length_penalty)
                write_scores(options, scores, scorer.translator.model.max_source_length, total)
    total.raise_if_diverged()
    print(total.text, file=sys.stderr)
    return 4 if total.shortened or total.without else 0


def write_scores(
    options: ScoreOptions, scores: list[PairScore | NoScore], max_source_length: int, total: Total
) -> None:
    """Writes the scores of pairs, and adds them to the totals."""
    for score in scores:
        total.add(score)
        if isinstance(score, NoScore):
            print(f"warning: pair {total.pairs} has no score: {score.reason}", file=sys.stderr)
        elif score.truncated:
            warning = cut_line(f"{options.source}, line {total.pairs}", max_source_length, "read")
            print(f"warning: {warning}", file=sys.stderr)
        sys.stdout.buffer.write(f"{as_line(options, score)}\n".encode())  # UTF-8 in every locale
    sys.stdout.buffer.flush()


def as_line(options: ScoreOptions, score: PairScore | NoScore) -> str:
    """Returns the output line of a pair."""
    if isinstance(score, NoScore):
        return json.dumps({"error": str(score.reason)}, ensure_ascii=False) if options.json else "nan"
    if not options.json:
        return f"{score.score:.6f}"
    named = {name: getattr(score, name) for name in ("score", "log_prob", "tokens", "token_scores")}
    return json.dumps(named, ensure_ascii=False)
