"""Texts as programs in Python have them: any iterable is taken, and an item that is no text is named."""

import numpy as np
import pytest

from flax_transformer.data.text_files import MAX_CHARACTERS
from flax_transformer.errors import ConfigError, as_texts
from flax_transformer.inference.evaluate import evaluate
from flax_transformer.inference.requests import Request
from flax_transformer.inference.scorer import NoScore, PairScore, Scorer
from flax_transformer.inference.translation import Translation
from flax_transformer.inference.translator import Translator


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
