"""The choice of a first recipe, in reading order: devices, tokenizer, lengths, model, batches, steps, time."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jax.sharding import Mesh

from flax_transformer.config.commented_recipe import CommentedRecipe
from flax_transformer.config.recipe import Config
from flax_transformer.data.corpus import load_corpus
from flax_transformer.data.parallel_text import Corpus
from flax_transformer.data.preparation import prepare_tokenizers, prepare_training_pairs
from flax_transformer.data.text_survey import TextSurvey
from flax_transformer.data.tokenizer_pair import TokenizerPair
from flax_transformer.errors import ConfigError, InputError
from flax_transformer.experiment.first_recipe import (
    STEP_MULTIPLE,
    Machine,
    Size,
    add_batching,
    add_decoding,
    add_evaluations,
    add_model,
    add_tokenizer,
    add_training,
    choose_size,
    num_evaluations,
    num_steps,
    reason_of_steps,
)
from flax_transformer.experiment.programs import RunPrograms, make_programs
from flax_transformer.experiment.text import PreparedText, prepare_text
from flax_transformer.experiment.training_time import TrainingTime, measure_training, step_seconds
from flax_transformer.parallel.memory import available_bytes
from flax_transformer.parallel.mesh import MeshConfig, make_mesh

# No sentence has more tokens than this.
NO_LIMIT = np.iinfo(np.int32).max

# Maximum number of micro-batches of a batch.
MAX_MICRO_BATCHES = 8

# Share of the time of a training for its steps. The rest is for compilation and evaluations.
STEPS_SHARE = 0.8

Measured = TypeVar("Measured")


@dataclass(frozen=True)
class ChosenRecipe:
    """A first recipe.

    Attributes:
        recipe: the recipe.
        machine: the devices that it is for.
        wanted_steps: number of steps for the corpus, whatever their time.
        epochs: number of epochs of its steps.
        time: measured times, or None if nothing was measured.
    """

    recipe: CommentedRecipe
    machine: Machine
    wanted_steps: int
    epochs: float
    time: TrainingTime | None

    @property
    def evaluations(self) -> int:
        """Number of evaluations of a training."""
        return -(-self.recipe["training.steps"] // self.recipe["training.evaluate_every_steps"])


def choose_recipe(
    recipe: CommentedRecipe, survey: TextSurvey, num_pairs: int, hours: float, measure: bool = True
) -> ChosenRecipe:
    """Completes a recipe that has its run and its data.

    The tokenizer is learnt and the text is tokenised, into the cache where the training will find them.

    Args:
        recipe: the recipe, which is changed.
        survey: survey of the text that the training text was taken from.
        num_pairs: number of different training pairs.
        hours: longest training, if `measure` is set.
        measure: whether to compile the programs and to measure the time of a training.

    Raises:
        InputError: bad text, or a step that does not fit the memory however it is divided.
    """
    # --- devices
    mesh = make_mesh(MeshConfig())
    device = mesh.devices.flat[0]
    machine = Machine(device.platform, mesh.size, device.device_kind, available_bytes(mesh))
    size = choose_size(num_pairs, machine)

    # --- tokenizer
    add_tokenizer(recipe, survey, size, num_pairs)
    corpus = load_corpus(recipe.config.data)
    tokenizers = _learnt(recipe, corpus)

    # --- lengths, model, batches
    pairs = prepare_training_pairs(corpus.train, tokenizers, recipe.config.filters, NO_LIMIT, NO_LIMIT)[0]
    add_model(recipe, pairs, size, machine)
    add_batching(recipe, size, machine)

    # --- steps and time
    batches = len(prepare_text(recipe.config, corpus, tokenizers, mesh).plan.epoch(0))
    wanted = steps = num_steps(size, batches)
    add_training(recipe, size, steps, reason_of_steps(size, batches), len(corpus.validation.source))
    add_decoding(recipe, survey, pairs)
    if not measure:
        return ChosenRecipe(recipe, machine, wanted, steps / batches, None)
    seconds = _fitted(recipe, size, machine, corpus, tokenizers, mesh, step_seconds)
    limit = int(STEPS_SHARE * 3_600 * hours / seconds)
    if limit < steps:
        steps = max(limit // STEP_MULTIPLE, 1) * STEP_MULTIPLE
        why = f"what {hours:g} hours on this machine allow, {steps / batches:.1f} epochs; usual are {wanted:,} steps"
        add_training(recipe, size, steps, why, len(corpus.validation.source))
    time = _fitted(recipe, size, machine, corpus, tokenizers, mesh, measure_training)
    add_evaluations(recipe, steps, num_evaluations(steps * time.step, time.evaluation))
    return ChosenRecipe(recipe, machine, wanted, steps / batches, time)


def _learnt(recipe: CommentedRecipe, corpus: Corpus) -> TokenizerPair:
    """Returns the tokenizers. A text that has fewer pieces than the recipe asks for gets as many as it has.

    Raises:
        InputError: bad text.
    """
    try:
        return prepare_tokenizers(corpus.train, recipe.config.tokenizer)
    except InputError as error:
        most = re.search(r"value <= (\d+)", str(error))
        if most is None:
            raise
        recipe.set("this text has no more pieces", tokenizer__vocab_size=int(most[1]))
        return prepare_tokenizers(corpus.train, recipe.config.tokenizer)


def _fitted(
    recipe: CommentedRecipe,
    size: Size,
    machine: Machine,
    corpus: Corpus,
    tokenizers: TokenizerPair,
    mesh: Mesh,
    measure: Callable[[Config, PreparedText, RunPrograms], Measured],
) -> Measured:
    """Returns what `measure` finds. Batches that do not fit the memory are divided into micro-batches first.

    Raises:
        ConfigError: a step does not fit the memory however it is divided.
    """
    micro_batches = recipe.get("batching.gradient_accumulation_steps", 1)
    refused: ConfigError | None = None
    while True:
        config: Config = recipe.config
        try:
            text = prepare_text(config, corpus, tokenizers, mesh)
        except ConfigError as error:  # after a division: a batch has too few rows for so many parts
            raise refused or error from None
        try:
            return measure(config, text, make_programs(config, text, mesh))
        except ConfigError as error:
            refused = refused or error
            if micro_batches == MAX_MICRO_BATCHES:
                raise refused from None
            micro_batches *= 2
            add_batching(recipe, size, machine, micro_batches)
