"""Recipes: those of text say how it is fetched, those of published set-ups build, compile and take ten steps.

The steps are on generated text of the shape of the real one. Words follow Zipf's law, and lengths are about those of
the corpus. What takes steps has fewer rows and no long pairs, since a CPU takes minutes for a whole batch.
"""

import dataclasses
import functools
import itertools
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from flax_transformer.config.reading import read_config
from flax_transformer.data.batching import Position
from flax_transformer.data.filters import FilterConfig
from flax_transformer.data.loader import training_batches, training_plan
from flax_transformer.data.parallel_text import ParallelText, ParallelTextConfig
from flax_transformer.data.preparation import prepare_training_pairs
from flax_transformer.data.tokenizer import TokenizerConfig
from flax_transformer.data.tokenizer_pair import TokenizerPair
from flax_transformer.inference.translator import vocabulary_info
from flax_transformer.optim.optimizer import make_optimizer
from flax_transformer.optim.schedule import make_schedule
from flax_transformer.parallel.mesh import batch_sharding
from flax_transformer.training.loop import compile_steps
from flax_transformer.training.state import describe_parameters, init_state, make_layout
from flax_transformer.training.step import Objective, jit_train_step

CONFIGS = Path(__file__).parent.parent / "configs"

# Mean words of a sentence, its spread as a factor, and millions of parameters (Vaswani et al. 2017, table 3; for IWSLT
# counted by hand from the sizes: 12 layers, two embedding tables).
RECIPES = {
    "wmt14_en_de_base": (25, 1.8, 65),
    "wmt14_en_de_big": (25, 1.8, 213),
    "iwslt14_de_en": (20, 1.8, 42),
}


def generated_text(pairs: int, mean: int, spread: float, words: int) -> ParallelText:
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    vocabulary = np.array(["".join(rng.choice(letters, rng.integers(2, 10))) for _ in range(words)], object)
    frequency = 1 / np.arange(1, words + 1)
    frequency /= frequency.sum()

    def line(length: float) -> str:
        return " ".join(rng.choice(vocabulary, max(1, round(length)), p=frequency))

    lengths = rng.lognormal(math.log(mean), math.log(spread), pairs)
    unlike = rng.lognormal(0.0, 0.2, pairs)  # a translation is about as long as its source
    return ParallelText([line(n) for n in lengths], [line(n * u) for n, u in zip(lengths, unlike, strict=True)])


OF_TEXT = sorted(path for path in CONFIGS.glob("*.yaml") if not path.stem.startswith("number_words"))


@pytest.mark.parametrize("path", OF_TEXT, ids=lambda path: path.stem)
def test_a_recipe_of_text_begins_with_the_lines_that_fetch_it(path):
    config = read_config(path)
    assert isinstance(config.data, ParallelTextConfig) and config.data.folder.startswith("data/")  # git ignores it
    text = path.read_text(encoding="utf-8")
    header = text[: text.index("\nrun:")]
    commands = [line.lstrip("# ") for line in header.splitlines()]
    assert f"python train.py --config configs/{path.name}" in commands
    cloned = [found[1] for line in commands if (found := re.fullmatch(r"git clone --depth 1 https://\S+ (\S+)", line))]
    assert any(config.data.folder.startswith(f"{folder}/") for folder in cloned) or "curl -L" in header


@functools.cache
def text_and_tokenizers(mean: int, spread: float) -> tuple[ParallelText, TokenizerPair]:
    text = generated_text(3_000, mean, spread, 30_000)
    # Generated words hold fewer pieces than a recipe asks for: its tables have the recipe's size all the same.
    return text, TokenizerPair.train(text.source, text.target, TokenizerConfig("bpe", vocab_size=8_000))


@pytest.mark.parametrize("name", RECIPES)
def test_the_batches_of_a_published_recipe_are_as_many_shapes_and_tokens_as_it_says(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mean, spread, _ = RECIPES[name]
    config = read_config(CONFIGS / f"{name}.yaml")
    text, tokenizers = text_and_tokenizers(mean, spread)
    limits = config.model.max_source_length, config.model.max_target_length
    (pairs,) = prepare_training_pairs((text,), tokenizers, config.filters, *limits)
    assert len(pairs) > 0.95 * 3_000
    plan = training_plan([pairs], config.batching, 0)
    assert len(plan.shapes) == config.batching.num_buckets
    assert pairs.lengths.max() > 128  # none of the long ones was cut away
    batches = plan.epoch(0)
    budget = config.batching.tokens_per_batch
    assert all(b.shape.rows * max(b.shape[1:]) <= budget for b in batches)
    used = sum(len(b.pairs) * (b.shape.source_length + b.shape.target_length) for b in batches)  # rows that are filled
    assert 0.7 * used < pairs.lengths.sum() < used


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_published_recipe_takes_ten_steps(name, one_device, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mean, spread, millions = RECIPES[name]
    config = read_config(CONFIGS / f"{name}.yaml")
    text, tokenizers = text_and_tokenizers(mean, spread)
    pairs = prepare_training_pairs((text,), tokenizers, FilterConfig(), 64, 64)
    batching = dataclasses.replace(config.batching, tokens_per_batch=8 * 64, num_buckets=2)
    plan = training_plan(pairs, batching, 0)

    schedule = make_schedule(config.optimizer, config.model.model_dim)
    size = config.tokenizer.vocab_size
    vocabulary = dataclasses.replace(vocabulary_info(tokenizers), source_size=size, target_size=size)
    optimizer = make_optimizer(config.optimizer, schedule, describe_parameters(config.model, vocabulary))
    layout = make_layout(config.model, vocabulary, optimizer, one_device)
    assert layout.num_parameters / 1e6 == pytest.approx(millions, rel=0.03)
    step = jit_train_step(layout, schedule, Objective(config.training.label_smoothing), 0, one_device)
    compiled = compile_steps(step, layout.abstract, plan.shapes, one_device)
    state = init_state(config.model, vocabulary, layout, 0)
    losses = []
    for batch, _ in itertools.islice(training_batches(pairs, plan, Position(0, 0)), 10):
        shape = (*batch.source_tokens.shape, batch.target_tokens.shape[1])
        state, metrics = compiled[shape](state, jax.device_put(batch, batch_sharding(one_device)))
        losses.append(float(metrics.sums.loss / metrics.sums.count))
        assert not metrics.skipped
    assert int(state.step) == 10 and np.isfinite(losses).all()
    assert losses[0] == pytest.approx(math.log(size), rel=0.15)  # nothing is known yet
