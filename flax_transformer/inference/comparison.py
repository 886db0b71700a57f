"""Several finished runs side by side: cost and quality of each model. This reads run folders and loads no model."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flax_transformer.config.recipe import Config
from flax_transformer.errors import InputError, RunFolderError, shown
from flax_transformer.inference.evaluate import Scores, bleu_metric
from flax_transformer.object_storage import AnyPath, resolved
from flax_transformer.run_folder import RunFolder
from flax_transformer.small_files import as_dataclass, parse_object
from flax_transformer.training.metrics_file import read_metrics

MOST_LENGTH_GROUPS = 8
NUM_RESAMPLES = 300  # bootstrap resamples for the confidence intervals of BLEU by length


@dataclass(frozen=True)
class RunSummary:
    """One finished run.

    Attributes:
        name: name of the run folder.
        model: the model in a few words.
        parameters: number of parameters.
        target_tokens: number of target tokens trained on, without padding.
        tokens_per_second: median target tokens per second over progress lines, without compilation and evaluation.
        training_minutes: time of all updates, without compilation and evaluation.
        curve: (training minutes, validation BLEU) at each evaluation.
        scores: scores on the test part.
        sources, references, hypotheses: lines of the test part.
        bleu_tokenizer: see `evaluation.bleu_tokenizer`.
    """

    name: str
    model: str
    parameters: int
    target_tokens: int
    tokens_per_second: float
    training_minutes: float
    curve: list[tuple[float, float]]
    scores: Scores
    sources: list[str]
    references: list[str]
    hypotheses: list[str]
    bleu_tokenizer: str

    @classmethod
    def read(cls, path: AnyPath) -> "RunSummary":
        """Returns the summary of a run folder.

        Raises:
            RunFolderError: not a run folder, a run that has not ended, or files that are missing or damaged.
        """
        folder = RunFolder.open(path)
        config = folder.read_config()
        if not folder.card_file.is_file():
            raise RunFolderError(
                f"{path} has no {folder.card_file.name}: its training or its last evaluation has not ended (go on with "
                f"it by --run {path} --resume, then compare), or it was not trained: it is an average of another run's "
                "checkpoints, or a converted model."
            )
        try:
            return cls._read(folder, config)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunFolderError(
                f"{path} cannot be compared, since {folder.card_file.name}, {folder.metrics_file.name} or the files of "
                f"its test part are missing or damaged: {type(error).__name__}, {error}. `flax-transformer train --run "
                f"{path} --resume` tests once more. If the log is damaged, mend it or train again."
            ) from error

    @classmethod
    def _read(cls, folder: RunFolder, config: Config) -> "RunSummary":
        card = parse_object(folder.card_file.read_bytes())
        if type(card["parameters"]) is not int:
            raise ValueError(f"{folder.card_file.name}: parameters cannot be {shown(card['parameters'])}")
        records = read_metrics(folder.metrics_file)
        train = [r for r in records if r["kind"] == "train"]
        steps = [0, *(r["step"] for r in train)]
        minutes = np.cumsum([0.0, *(r["seconds"] / 60 for r in train)])
        curve = [(float(np.interp(r["step"], steps, minutes)), r["bleu"]) for r in records if r["kind"] == "validation"]
        if not train or not curve:
            raise ValueError(f"{folder.metrics_file.name} has no progress, or no evaluation")
        if not all(math.isfinite(bleu) for _, bleu in curve):
            raise ValueError(f"{folder.metrics_file.name} has an evaluation without a BLEU")
        sources, references, hypotheses = (
            file.read_bytes().decode("utf-8").split("\n")[:-1]
            for file in (folder.test_sources, folder.test_references, folder.test_hypotheses)
        )
        if not len(sources) == len(references) == len(hypotheses) > 0:
            raise ValueError(f"{len(sources)} sources, {len(references)} references, {len(hypotheses)} hypotheses")
        return cls(
            name=resolved(folder.path).name,
            model=config.model.description,
            parameters=card["parameters"],
            target_tokens=sum(r["target_tokens"] for r in train),
            tokens_per_second=statistics.median(r["target_tokens_per_second"] for r in train),
            training_minutes=float(minutes[-1]),
            curve=curve,
            scores=as_dataclass(Scores, card["test"]),
            sources=sources,
            references=references,
            hypotheses=hypotheses,
            bleu_tokenizer=config.evaluation.bleu_tokenizer,
        )

    def minutes_to(self, quality: float) -> float | None:
        """Returns the training time at the first evaluation with at least that validation BLEU, or None."""
        return next((minutes for minutes, bleu in self.curve if bleu >= quality), None)


@dataclass(frozen=True)
class LengthGroup:
    """BLEU over the test sentences of similar source length.

    Attributes:
        shortest, longest: fewest and most source words.
        num_sentences: number of sentences.
        bleu: corpus BLEU of these sentences.
        margin: half the width of BLEU's bootstrap confidence interval.
    """

    shortest: int
    longest: int
    num_sentences: int
    bleu: float
    margin: float


def read_runs(paths: Sequence[AnyPath]) -> list[RunSummary]:
    """Returns the summaries of runs that can be compared.

    Raises:
        InputError: no run, two runs of the same name, or runs with different test text or different BLEU.
        ConfigError: see `bleu_metric`.
        RunFolderError: see `RunSummary.read`.
    """
    if not paths:
        raise InputError("give at least one run folder to compare.")
    runs = [RunSummary.read(path) for path in paths]
    first = runs[0]
    bleu_metric(first.bleu_tokenizer)  # which may be missing
    for path, run in zip(paths, runs, strict=True):
        if (run.sources, run.references) != (first.sources, first.references):
            raise InputError(
                f"{paths[0]} and {path} were tested on different sentences, so their scores cannot be compared. "
                "Compare runs of one corpus."
            )
        if run.scores.bleu_signature != first.scores.bleu_signature:
            raise InputError(
                f"{paths[0]} and {path} were scored in different ways: {first.scores.bleu_signature} and "
                f"{run.scores.bleu_signature}. Train them with the same evaluation.bleu_tokenizer."
            )
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise InputError(f"the runs need different folder names to be told apart, got {', '.join(names)}.")
    return runs


def common_quality(runs: Sequence[RunSummary]) -> float:
    """Returns the highest whole validation BLEU that every run reached."""
    return float(int(min(max(bleu for _, bleu in run.curve) for run in runs)))


def bleu_by_length(run: RunSummary) -> list[LengthGroup]:
    """Returns BLEU over groups of test sentences by source length in words, the shortest first.

    Each length is a group if there are at most `MOST_LENGTH_GROUPS` lengths. Otherwise groups have similar numbers of
    sentences, and each length belongs to one group.
    """
    lengths = np.array([len(source.split()) for source in run.sources])
    edges = np.unique(lengths)
    if len(edges) > MOST_LENGTH_GROUPS:
        edges = np.unique(np.quantile(lengths, np.linspace(0, 1, MOST_LENGTH_GROUPS + 1)[1:], method="inverted_cdf"))
    bleu = bleu_metric(run.bleu_tokenizer)
    groups, shorter = [], -1
    for edge in edges:
        members = np.flatnonzero((lengths > shorter) & (lengths <= edge))
        hypotheses, references = ([of[i] for i in members] for of in (run.hypotheses, run.references))
        score = bleu.corpus_score(hypotheses, [references], n_bootstrap=NUM_RESAMPLES)
        shortest, longest = int(lengths[members].min()), int(lengths[members].max())
        groups.append(LengthGroup(shortest, longest, len(members), score.score, score._ci))
        shorter = edge
    return groups


def comparison_table(runs: Sequence[RunSummary], quality: float) -> str:
    """Returns a Markdown table with a row for each run."""
    head = (
        "run", "model", "parameters", "target tokens", "target tokens/s", "training", f"to BLEU {quality:g}",
        "BLEU", "chrF", "exact match",
    )  # fmt: skip
    rows = []
    for run in runs:
        reached = run.minutes_to(quality)
        rows.append(
            (
                run.name,
                run.model,
                f"{run.parameters:,}",
                f"{run.target_tokens:,}",
                f"{run.tokens_per_second:,.0f}",
                f"{run.training_minutes:.1f} min",
                "never" if reached is None else f"{reached:.1f} min",
                f"{run.scores.bleu:.2f}",
                f"{run.scores.chrf:.2f}",
                f"{run.scores.exact_match:.1f} %",
            )
        )
    lines = [head, tuple("---" for _ in head), *rows]
    scores = runs[0].scores
    return (
        "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        + f"\n\nBLEU {scores.bleu_signature}, chrF {scores.chrf_signature}, on {scores.num_sentences} test sentences. "
        "Times are of updates alone; the time to a BLEU is that of the first evaluation on validation text that "
        "reached it."
    )
