"""Reports of a run: its description, the scores of its test part, its pictures and its run card."""

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np
from jax.sharding import Mesh

from flax_transformer.config.recipe import Config
from flax_transformer.data.batching import Plan, TokenizedPairs
from flax_transformer.data.parallel_text import Corpus, TextPart
from flax_transformer.data.preparation import normalized_lines
from flax_transformer.data.tokenizer_pair import TokenizerPair
from flax_transformer.errors import shown
from flax_transformer.experiment.programs import RunPrograms
from flax_transformer.experiment.text import PreparedText
from flax_transformer.inference.attention_map import attention_map
from flax_transformer.inference.evaluate import Scores, evaluate
from flax_transformer.inference.translation import NoTranslation, Translation, cut_line, no_output_line, texts_or_empty
from flax_transformer.inference.translator import Translator
from flax_transformer.parallel import processes
from flax_transformer.run_folder import RunFolder
from flax_transformer.training.metrics_file import read_metrics
from flax_transformer.training.run_log import RunLog

NUM_SAMPLES = 10
PACKAGES = ("flax-transformer", "jax", "flax", "optax", "orbax-checkpoint", "sentencepiece", "sacrebleu")


# --- before the training


def describe_pairs(pairs: TokenizedPairs) -> str:
    """Returns a text with the number of training pairs, and the numbers that were left out by reason."""
    return f"{len(pairs):,} training pairs" + (f" ({pairs.left_out} left out)" if pairs.left_out else "")


def describe_tokens(pairs: TokenizedPairs, tokenizers: TokenizerPair) -> str:
    """Returns a text with the numbers of tokens, and the sizes of the vocabularies."""
    sizes = f"{tokenizers.source.vocab_size:,}"
    if not tokenizers.joint:
        sizes += f" and {tokenizers.target.vocab_size:,}"
    source, target = pairs.lengths.sum(axis=0)
    return f"{source:,} source and {target:,} target tokens, vocabulary {sizes}"


def describe_normalization(parts: Sequence[TextPart], tokenizers: TokenizerPair) -> str:
    """Returns a line that says how much training text normalisation changes; an empty text if it changes none."""
    found = normalized_lines(parts, tokenizers)
    if not found.num_changed:
        return ""
    return (
        f"normalisation changes {found.num_changed:,} of the first {found.num_lines:,} lines of training text, such as "
        f"{shown(found.before)} to {shown(found.after)}; tokenizer.normalization: identity changes none\n"
    )


def describe_batches(pairs: TokenizedPairs, plan: Plan) -> str:
    """Returns a text with the shapes of the batches, the number of batches in an epoch, and their share of padding."""
    batches = plan.epoch(0)
    padded = sum(b.shape.rows * (b.shape.source_length + b.shape.target_length) for b in batches)
    lengths = pairs.lengths.sum(axis=1)
    padding = 1 - sum(int(lengths[b.pairs].sum()) for b in batches) / padded
    shapes = ", ".join(f"{s.rows}x{s.source_length}/{s.target_length}" for s in plan.shapes)
    return (
        f"batches {shapes} (rows x source/target): {len(plan.shapes)} compiled shapes, {len(batches)} "
        f"batches an epoch, padding {100 * padding:.0f} %"
    )


def describe_run(config: Config, text: PreparedText, num_parameters: int, mesh: Mesh) -> str:
    """Returns the description of a run before it starts, with its text, model, devices and batches."""
    train, validation = text.train[0], text.validation
    without = f" ({validation.left_out} left out of the loss)" if validation.left_out else ""
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return (
        f"run {config.run}: {describe_pairs(train)}, {len(text.corpus.validation.source):,} validation{without}, "
        f"{len(text.corpus.test.source):,} test\n"
        f"{describe_tokens(train, text.tokenizers)}\n"
        f"{describe_normalization(text.corpus.train, text.tokenizers)}"
        f"model {config.model.description}: {num_parameters:,} parameters; mesh {axes} on "
        f"{mesh.devices.flat[0].device_kind}\n" + describe_batches(train, text.plan)
    )


# --- after the training


@dataclass(frozen=True)
class ScoredTestPart:
    """Scores of the translated test part.

    Attributes:
        scores: scores of all translations.
        samples: source and answer of each sample in the log.
    """

    scores: Scores
    samples: list[tuple[str, Translation | NoTranslation]]


@dataclass(frozen=True)
class TrainingSummary:
    """Figures of a training for the run card.

    Attributes:
        steps: number of updates of the whole training.
        tested_step: step of the parameters that were tested.
        seconds: duration of the training since its start, or since it was last resumed.
    """

    steps: int
    tested_step: int
    seconds: float


def score_test_part(
    config: Config, corpus: Corpus, translator: Translator, folder: RunFolder, log: RunLog
) -> ScoredTestPart:
    """Translates and scores the test part, writes its translations, and logs samples."""
    clock = time.monotonic()
    translations = translator.translate(corpus.test.source)
    seconds = time.monotonic() - clock
    hypotheses = texts_or_empty(translations)
    scores = evaluate(hypotheses, corpus.test.target, config.evaluation.bleu_tokenizer)
    processes.from_first(lambda: folder.write_test(corpus.test.source, corpus.test.target, hypotheses))

    log.say("\nsamples from the test part")
    chosen = np.linspace(0, len(hypotheses) - 1, min(NUM_SAMPLES, len(hypotheses))).astype(int).tolist()
    for index in chosen:
        source, target = corpus.test.source[index], corpus.test.target[index]
        verdict = "=" if hypotheses[index] == target else f"reference: {target}"
        log.say(f"  {source}\n    -> {hypotheses[index]}  {verdict}")
    cut = [number for number, t in enumerate(translations, start=1) if t.truncated]
    if cut:
        first = cut_line(f"{corpus.test.name}, line {cut[0]}", translator.model.max_source_length)
        others = f" So were {len(cut) - 1} test lines after it." if cut[1:] else ""
        log.say(f"\nwarning: {first}{others}")
    if without := no_output_line(translations, "test sentences"):
        log.say(f"\nwarning: {without}")
    decoding = config.decoding
    log.say(f"\ntest, beam {decoding.beam_size}, length penalty {decoding.length_penalty}, {seconds:.1f} s")
    log.say(scores.text)
    return ScoredTestPart(scores, [(corpus.test.source[index], translations[index]) for index in chosen])


def draw_pictures(config: Config, translator: Translator, folder: RunFolder, test: ScoredTestPart, log: RunLog) -> None:
    """Draws the curves of the training, and the attention of the sample of middle length."""
    from flax_transformer.plots.attention import plot_attention  # Matplotlib is needed at the end of a training alone
    from flax_transformer.plots.curves import plot_curves
    from flax_transformer.plots.picture import missing_letters_note

    by_length = sorted(test.samples, key=lambda sample: len(sample[0]))
    source, found = by_length[len(by_length) // 2]
    attention = None if isinstance(found, NoTranslation) else attention_map(translator, source, found.text)
    if not processes.is_first():
        return
    log.flush()
    records = read_metrics(folder.metrics_file)
    with folder.writing():
        folder.plots.mkdir(exist_ok=True)
        pictures = [plot_curves(records, folder.plots / "curves.png", f"training of {config.run}")]
    if attention is not None and not isinstance(found, NoTranslation):
        with folder.writing():
            pictures.append(plot_attention(attention, folder.plots / "attention.png", f"{source}\n{found.text}"))
    if note := missing_letters_note(pictures):
        log.say(f"note: {note}")


def run_card(
    config: Config, text: PreparedText, programs: RunPrograms, training: TrainingSummary, scores: Scores
) -> dict[str, Any]:
    """Returns the summary of a run: versions, devices, figures of the training, and scores of the test part."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "devices": [d.device_kind for d in programs.mesh.devices.flat],
        "versions": {name: version(name) for name in PACKAGES},
        "parameters": programs.layout.num_parameters,
        "tokenizers": {
            "source": text.tokenizers.source.fingerprint,
            "target": text.tokenizers.target.fingerprint,
        },
        "steps": training.steps,
        "tested_step": training.tested_step,
        "seed": config.training.seed,
        "training_seconds": training.seconds,
        "decoding": {"beam_size": config.decoding.beam_size, "length_penalty": config.decoding.length_penalty},
        "test": scores.record,
    }
