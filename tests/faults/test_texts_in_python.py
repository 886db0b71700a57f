"""Texts and settings as programs in Python have them: any iterable is taken, and what has another type is named."""

from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest

from flax_transformer.config.recipe import Config, TrainingConfig
from flax_transformer.data.filters import FilterConfig
from flax_transformer.data.parallel_text import ParallelTextConfig
from flax_transformer.data.text_files import MAX_CHARACTERS
from flax_transformer.errors import ConfigError, as_texts
from flax_transformer.inference.evaluate import evaluate
from flax_transformer.inference.requests import Request
from flax_transformer.inference.scorer import NoScore, PairScore, Scorer
from flax_transformer.inference.translation import Translation
from flax_transformer.inference.translator import Translator, changed
from flax_transformer.models.transformer_config import TransformerConfig
from flax_transformer.optim.optimizer import OptimizerConfig


class Series:
    """A column of a table, as that of pandas: its labels are no positions."""

    def __init__(self, values):
        self.values = dict(enumerate(values, start=7))

    def __iter__(self):
        return iter(self.values.values())

    def __len__(self):
        return len(self.values)

    def __getitem__(self, label):
        return self.values[label]


KINDS = [
    list,
    tuple,
    iter,
    np.array,
    Series,
    lambda texts: (text for text in texts),
    lambda texts: dict.fromkeys(texts),
]


@pytest.fixture
def unchecked():
    """Types are not checked as in the other tests, but as for a user."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def translator(run) -> Translator:
    return Translator.load(run)


def test_any_iterable_of_texts_is_taken(translator):
    sources, targets = ["one", "two"], ["eins", "zwei"]
    requests, scorer = translator.requests.read_all(sources), Scorer(translator)
    scores = scorer.score(sources, targets)
    for kind in KINDS:
        assert translator.requests.read_all(kind(sources)) == requests
        assert scorer.score(kind(sources), kind(targets)) == scores
        assert evaluate(kind(targets), kind(targets)).exact_match == 100.0
        assert all(type(text) is str for text in as_texts("texts", kind(sources)))
    assert translator.translate(Series(sources)) == translator.translate(sources)
    read = translator.requests.read_all
    prefixes = read(sources, prefixes=["e", ["n", "e"]])
    assert read(iter(sources), prefixes=Series(["e", np.array(["n", "e"])])) == prefixes != requests
    assert read(sources, prefixes=[None, ""], required=(None, [])) == requests


@pytest.mark.parametrize("item", [None, float("nan"), b"one", 5, ["one"], np.bytes_(b"one")])
def test_an_item_that_is_no_text_is_named(translator, item):
    for kind in (list, tuple, iter, Series):
        with pytest.raises(ConfigError, match=r"sentences must be texts, but sentences\[1\] is .*one|None|nan|5.* \("):
            translator.translate(kind(["one", item, item]))
    for call in (
        lambda texts: Scorer(translator).score(texts, ["eins"]),
        lambda texts: Scorer(translator).score(["one"], texts),
        lambda texts: evaluate(texts, ["eins"]),
        lambda texts: translator.compile(texts),
    ):
        with pytest.raises(ConfigError, match=r" must be texts, but \w+\[0\] is "):
            call([item])
    if item is not None:
        with pytest.raises(ConfigError, match=r"required\[0\]\[1\] is "):
            translator.translate(["one"], required=[["eins", item]])


@pytest.mark.parametrize("texts", ["one", b"one", 5, None])
def test_what_is_no_list_of_texts_is_explained(texts):
    with pytest.raises(ConfigError, match="sentences must be a list of texts, got .*; put a single one into a list"):
        as_texts("sentences", texts)


def test_a_text_of_a_million_characters_is_cut_before_it_is_tokenised(translator):
    """Its beginning is translated as it is alone, and every cut is told, also if only spaces were read."""
    words = "one " * (MAX_CHARACTERS // 4)
    whole, beginning, empty = translator.requests.read_all([words * 2, words, " " * MAX_CHARACTERS + "one"])
    assert isinstance(whole, Request) and whole == beginning and whole.truncated
    assert isinstance(empty, Request) and empty.source == [] and empty.truncated
    (nothing,) = translator.translate([" " * MAX_CHARACTERS + "one"])
    assert isinstance(nothing, Translation) and nothing.text == "" and nothing.truncated
    scores = Scorer(translator).score([" " * MAX_CHARACTERS + "one", "one"], ["", "eins" * MAX_CHARACTERS])
    assert isinstance(scores[0], PairScore) and scores[0].truncated
    assert isinstance(scores[1], NoScore) and "has more than 1,000,000 characters" in str(scores[1].reason)


def test_a_beam_beyond_what_can_be_numbered_is_refused(translator):
    with pytest.raises(ConfigError, match=r"decoding.beam_size .* must be at most 30,000, got 99,999,999"):
        translator.translate(["one"], beam_size=99_999_999)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"beam_size": "4"}, r"decoding.beam_size: expected int, got '4' \(str\)"),
        ({"beam_size": 4.5}, "decoding.beam_size: expected int, got 4.5"),
        ({"beam_size": True}, "decoding.beam_size: expected int, got True"),
        ({"beam_size": np.arange(3)}, "decoding.beam_size: expected int, got array"),
        ({"length_penalty": 0.6}, "decoding.length_penalty: expected str, got 0.6"),
        ({"stop": ["exact"]}, r"decoding.stop: expected one of exact, heuristic, first_finished, got \('exact'"),
        ({"method": 5}, "decoding.method: expected one of beam, sampling, got 5"),
        ({"method": ["beam"]}, "decoding.method: expected one of beam, sampling, got"),
        ({"suppress_tokens": "the"}, "decoding.suppress_tokens: expected tuple, got 'the'"),
        ({"suppress_sequences": ("a", 5)}, "decoding.suppress_sequences: expected tuple, got"),
        ({"force_eos": "yes"}, "decoding.force_eos: expected bool, got 'yes'"),
        ({"max_length_factor": "2"}, "decoding.max_length_factor: expected float, got '2'"),
        ({"num_hypotheses": "2"}, "num_hypotheses: expected int, got '2'"),
    ],
    ids=str,
)
def test_an_option_of_another_type_is_named(translator, unchecked, options, message):
    with pytest.raises(ConfigError, match=message):
        translator.translate(["one"], **options)


def test_options_may_be_numbers_of_numpy_and_lists(translator, unchecked):
    plain = translator.translate(["one"], beam_size=1, max_length_factor=1.0, suppress_tokens=("e",))
    others = {"beam_size": np.int64(1), "max_length_factor": np.float32(1), "suppress_tokens": ["e"]}
    assert translator.translate(["one"], **others) == plain
    assert changed(translator.decoding, others) == changed(translator.decoding, {**others, "suppress_tokens": ("e",)})


@pytest.mark.parametrize(
    "section, fields, message",
    [
        (TransformerConfig, {"model_dim": "512"}, "model.model_dim: expected int, got '512'"),
        (TrainingConfig, {"steps": 1e5}, "training.steps: expected int, got 100000.0"),
        (TrainingConfig, {"best_metric": "BLEU"}, "training.best_metric: expected one of bleu, chrf, loss, got 'BLEU'"),
        (OptimizerConfig, {"warmup_steps": None}, "optimizer.warmup_steps: expected int, got None"),
        (FilterConfig, {"max_length_ratio": "3"}, "filters.max_length_ratio: expected float, got '3'"),
        (ParallelTextConfig, {"train_source": "train.en"}, "data.train_source: expected tuple, got 'train.en'"),
        (Config, {"run": Path("run")}, "run: expected str, got PosixPath"),
        (Config, {"model": {"model_dim": 8}}, "model: expected .*TransformerConfig.*, got {'model_dim': 8}"),
    ],
)
def test_a_field_of_another_type_is_named(unchecked, section, fields, message):
    with pytest.raises(ConfigError, match=message):
        section(**fields)


def test_a_choice_that_does_not_exist_is_explained(run, unchecked):
    choices: list[dict[str, Any]] = [{"checkpoint": "newest"}, {"quantize": "int4"}, {"quantize": None}]
    for options in choices:
        with pytest.raises(
            ConfigError, match="(checkpoint: expected one of best, last|quantize: expected one of none)"
        ):
            Translator.load(run, **options)
    with pytest.raises(ConfigError, match="a translator needs at least one run folder"):
        Translator.load([])
