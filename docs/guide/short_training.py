"""A training of seconds on number words below 10,000: the lines of the page "Training, by hand" as one function."""

import dataclasses
import functools
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from flax_transformer import Batch, RecurrentConfig, TransformerConfig, Translator, VocabularyInfo
from flax_transformer.config.recipe import DecodingConfig
from flax_transformer.data.batching import BatchingConfig, Position, TokenizedPairs
from flax_transformer.data.loader import evaluation_batches, evaluation_plan, training_batches, training_plan
from flax_transformer.data.parallel_text import ParallelText
from flax_transformer.data.preparation import held_out_pairs
from flax_transformer.data.synthetic import english_number_words, german_number_words
from flax_transformer.data.tokenizer import TokenizerConfig
from flax_transformer.data.tokenizer_pair import TokenizerPair
from flax_transformer.models.build import ModelConfig, vocabulary_info
from flax_transformer.optim.optimizer import OptimizerConfig, make_optimizer
from flax_transformer.optim.schedule import make_schedule
from flax_transformer.parallel.mesh import MeshConfig, make_mesh
from flax_transformer.training.state import describe_parameters, init_state, make_layout
from flax_transformer.training.step import Objective, jit_train_step

NUM_HELD_OUT = 256
LENGTH = 32  # most tokens of a side
LENGTHS = {"max_source_length": LENGTH, "max_target_length": LENGTH}
MODELS: dict[str, ModelConfig] = {
    "transformer": TransformerConfig(
        model_dim=64, num_heads=4, feed_forward_dim=256, dropout=0.0, activation_dropout=0.0, **LENGTHS
    ),
    "recurrent with attention": RecurrentConfig(
        model_dim=64, hidden_dim=128, cell="gru", attention="additive", dropout=0.0, **LENGTHS
    ),
}


@dataclasses.dataclass(frozen=True)
class Text:
    """Sentence pairs, cut into pieces.

    Attributes:
        tokenizers: tokenizers of both sides; they share one vocabulary.
        train: training pairs.
        held_out: pairs that are not in training, and their lines.
        held_out_lines: the same as text.
    """

    tokenizers: TokenizerPair
    train: TokenizedPairs
    held_out: TokenizedPairs
    held_out_lines: ParallelText

    @property
    def vocabulary(self) -> VocabularyInfo:
        """The sizes of the vocabularies, and the start token."""
        return vocabulary_info(self.tokenizers)

    def held_out_batch(self) -> Batch:
        """Returns all held-out pairs as one batch."""
        plan = evaluation_plan(self.held_out.lengths, BatchingConfig(tokens_per_batch=1 << 16))
        batch = next(evaluation_batches(self.held_out, plan))
        return Batch(*(side[: len(self.held_out.kept)] for side in batch))  # without rows of padding alone


def prepared_text(source: list[str], target: list[str], vocab_size: int = 100) -> Text:
    """Returns pairs of lines with a tokenizer learnt from them; the first ones are held out."""
    lines = ParallelText(source[:NUM_HELD_OUT], target[:NUM_HELD_OUT], "held-out lines")
    rest = ParallelText(source[NUM_HELD_OUT:], target[NUM_HELD_OUT:], "lines")
    tokenizers = TokenizerPair.train(rest.source, rest.target, TokenizerConfig(vocab_size=vocab_size))
    train, held_out = (held_out_pairs(text, tokenizers, LENGTH, LENGTH) for text in (rest, lines))
    return Text(tokenizers, train, held_out, lines)


@functools.cache
def number_text() -> Text:
    """Returns all number words below 10,000, in both languages."""
    numbers = np.random.default_rng(0).permutation(10_000).tolist()
    return prepared_text([english_number_words(n) for n in numbers], [german_number_words(n) for n in numbers])


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model that was trained for some steps.

    Attributes:
        config: configuration of the model.
        text: what it was trained on.
        params: its parameters.
        losses: [steps], training loss in nats per target token.
    """

    config: ModelConfig
    text: Text
    params: Any
    losses: np.ndarray

    @property
    def model(self) -> Any:
        """The model with its parameters."""
        graphdef = make_training(self.config, self.text.vocabulary, 1, 0)[0].graphdef
        return nnx.merge(graphdef, self.params)

    def translator(self, **settings: Any) -> Translator:
        """Returns the translator of the model, with settings of the search."""
        decoding = DecodingConfig(**({"beam_size": 1, "batch_size": 64, "max_length_factor": 1.5} | settings))
        return Translator.from_params(self.config, self.text.tokenizers, self.params, decoding, one_device())

    def exact(self, translator: Translator | None = None) -> float:
        """Returns the share of held-out numbers that are translated without a mistake, in %."""
        lines = self.text.held_out_lines
        found = (translator or self.translator()).translate(lines.source)
        return 100.0 * float(np.mean([a.text == b for a, b in zip(found, lines.target, strict=True)]))


def one_device() -> Any:
    """Returns a mesh of the first device."""
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


def make_training(config: ModelConfig, vocabulary: VocabularyInfo, warmup_steps: int, seed: int) -> tuple[Any, Any]:
    """Returns the layout of a training state, and the train step."""
    optimizer_config = OptimizerConfig(warmup_steps=warmup_steps)
    schedule = make_schedule(optimizer_config, config.model_dim)
    optimizer = make_optimizer(optimizer_config, schedule, describe_parameters(config, vocabulary))
    mesh = one_device()
    layout = make_layout(config, vocabulary, optimizer, mesh)
    return layout, jit_train_step(layout, schedule, Objective(label_smoothing=0.1), seed, mesh)


def short_training(
    config: ModelConfig,
    text: Text,
    steps: int = 300,
    *,
    rows: int = 64,
    warmup_steps: int = 100,
    seed: int = 0,
    change: Callable[[Batch], Batch] = lambda batch: batch,
) -> Trained:
    """Returns a model that is trained for some steps.

    Args:
        config: configuration of the model.
        text: pairs to train on.
        steps: number of updates.
        rows: number of pairs in a batch.
        warmup_steps: number of updates before the learning rate falls.
        seed: of the first parameters, and of the order of the pairs.
        change: changes each batch, for an experiment.
    """
    layout, step = make_training(config, text.vocabulary, warmup_steps, seed)
    longest = -(-int(text.train.lengths.max()) // 8) * 8
    plan = training_plan([text.train], BatchingConfig(tokens_per_batch=rows * longest, num_buckets=1), seed)
    batches = training_batches([text.train], plan, Position(0, 0))
    losses = []
    with jax.set_mesh(one_device()):
        state = init_state(config, text.vocabulary, layout, seed)
        for _ in range(steps):
            state, metrics = step(state, change(next(batches)[0]))
            losses.append(metrics.sums.loss / metrics.sums.count)
    return Trained(config, text, state.eval_params, np.asarray(jax.device_get(losses)))


def shared_training(name: str) -> Trained:
    """Returns a model that several pages look at, trained on number words. The first page that asks trains it.

    Args:
        name: key of `MODELS`.
    """
    file = Path(os.environ.get("GUIDE_RUNS", Path(tempfile.gettempdir()) / "guide_runs")) / f"{name}.pickle"
    if file.exists():
        params, losses = pickle.loads(file.read_bytes())
        return Trained(MODELS[name], number_text(), params, losses)
    trained = short_training(MODELS[name], number_text())
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pickle.dumps((jax.device_get(trained.params), trained.losses)))
    return trained
