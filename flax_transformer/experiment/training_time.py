"""The time that a training will take, from some of its steps on this machine."""

import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from flax_transformer.config.recipe import Config
from flax_transformer.data.batching import BatchShape, PlannedBatch, make_batch
from flax_transformer.data.tokenizer import TokenizedText
from flax_transformer.experiment.programs import RunPrograms
from flax_transformer.experiment.text import PreparedText
from flax_transformer.models.build import vocabulary_info
from flax_transformer.parallel.mesh import batch_sharding
from flax_transformer.parallel.placement import put
from flax_transformer.training.loop import compile_steps, shape_of
from flax_transformer.training.state import TrainState, init_state

# Timed steps of each shape. The first step of a program is not timed.
STEPS_PER_SHAPE = 4

# Sentences that are translated for the time of an evaluation.
MOST_SENTENCES = 128

# A forward pass has a third of the products of a training step.
FORWARD_SHARE = 1 / 3

# Other programs, heat and the host make a long training slower or faster than some of its steps. The range of the
# estimate is widened by this share on both sides.
MARGIN = 0.15


@dataclass(frozen=True)
class TrainingTime:
    """Measured times, in seconds.

    Attributes:
        step: mean over the steps of an epoch.
        fastest_step, slowest_step: the same mean from the fastest and the slowest steps of each shape.
        evaluation: an evaluation on validation text.
        test: translation of the test text.
        compilation: compilation of all programs. A training finds them in the cache.
    """

    step: float
    fastest_step: float
    slowest_step: float
    evaluation: float
    test: float
    compilation: float

    def total(self, steps: int, evaluations: int) -> tuple[float, float, float]:
        """Returns the estimate for a training, and the ends of its range."""
        pauses = evaluations * self.evaluation + self.test + self.compilation
        return (
            steps * self.step + pauses,
            (1 - MARGIN) * (steps * self.fastest_step + pauses),
            (1 + MARGIN) * (steps * self.slowest_step + pauses),
        )


def step_seconds(config: Config, text: PreparedText, programs: RunPrograms) -> float:
    """Returns the duration of a step on batches of the most frequent shape. Nothing else is compiled.

    Raises:
        ConfigError: the step needs more memory than a device has.
    """
    shape, batches = max(_batches_by_shape(text).items(), key=lambda item: len(item[1]))
    steps = compile_steps(programs.step, programs.layout.abstract, [shape], programs.mesh)
    state = init_state(config.model, vocabulary_info(text.tokenizers), programs.layout, config.training.seed)
    return float(np.mean(_timed(state, text, programs, steps, batches)[1]))


def measure_training(config: Config, text: PreparedText, programs: RunPrograms) -> TrainingTime:
    """Compiles all programs of a training, takes some steps, and translates some sentences.

    Steps are taken on real batches, of each shape. A shape counts as often as an epoch has it. Translations come from a
    model that has hardly been trained, so most outputs have their maximum length. The time of an evaluation is scaled
    to the mean length of the references.

    Raises:
        ConfigError: a program needs more memory than a device has.
    """
    compiled = programs.compile(text)
    state = init_state(config.model, vocabulary_info(text.tokenizers), programs.layout, config.training.seed)
    planned, times = _batches_by_shape(text), {}
    for shape, batches in planned.items():
        state, times[shape] = _timed(state, text, programs, compiled.steps.programs, batches)
    num_batches = sum(map(len, planned.values()))

    def mean(choose: Any) -> float:
        return float(sum(choose(times[shape]) * len(batches) for shape, batches in planned.items()) / num_batches)

    step = mean(np.mean)
    loss = FORWARD_SHARE * step * len(text.validation_plan.epoch(0))
    num = len(programs.validation.source)
    translating = _translation_seconds(programs, text, state)
    return TrainingTime(
        step=step,
        fastest_step=mean(np.min),
        slowest_step=mean(np.max),
        evaluation=translating * num + loss,
        test=translating * len(text.corpus.test.source),
        compilation=compiled.seconds,
    )


def _batches_by_shape(text: PreparedText) -> dict[BatchShape, list[PlannedBatch]]:
    """Returns the batches of the first epoch by their shapes. Each shape has one at least."""
    found: dict[BatchShape, list[PlannedBatch]] = {}
    for batch in text.plan.epoch(0):
        found.setdefault(batch.shape, []).append(batch)
    return found


def _timed(
    state: TrainState, text: PreparedText, programs: RunPrograms, steps: dict[Any, Any], batches: list[PlannedBatch]
) -> tuple[TrainState, list[float]]:
    """Returns the state after steps of one shape, and the duration of each step but the first."""
    sharding, seconds = batch_sharding(programs.mesh), []
    for number in range(STEPS_PER_SHAPE + 1):
        batch = make_batch(text.train[0], batches[number % len(batches)])
        clock = time.monotonic()
        state, metrics = steps[shape_of(batch)](state, put(batch, sharding))
        jax.block_until_ready((state, metrics))
        seconds.append(time.monotonic() - clock)
    return state, seconds[1:]


def _translation_seconds(programs: RunPrograms, text: PreparedText, state: TrainState) -> float:
    """Returns the time of a translation of a validation sentence, after a whole training."""
    sources, targets = programs.validation.source, programs.validation.target
    chosen = np.linspace(0, len(sources) - 1, min(MOST_SENTENCES, len(sources))).astype(int).tolist()
    translator = programs.translator.with_params(state.eval_params)
    clock = time.monotonic()
    found = translator.translate([sources[index] for index in chosen])
    seconds = time.monotonic() - clock
    made = sum(len(hypothesis.tokens) + 1 for each in found for hypothesis in each.hypotheses[:1])
    references = TokenizedText.from_lines([targets[index] for index in chosen], text.tokenizers.target)
    return seconds / len(chosen) * min(1.0, float(references.lengths.sum()) / max(made, 1))


def duration_text(seconds: float | int) -> str:
    """Returns a duration in words, in the unit that fits it."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} minutes"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 86400:.1f} days"
