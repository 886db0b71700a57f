"""What `translate` answers for a sentence: its outputs, best first, or the reason why there are none."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np

from flax_transformer.errors import DivergenceError, InputError, shortened


@dataclass(frozen=True)
class Hypothesis:
    """One output for a sentence.

    Attributes:
        text: detokenised.
        tokens: target pieces, without the end token.
        score: log-probability (nats, end token included) divided by the length penalty; at most 0.
        finished: False when it was cut at the maximum length.
        token_scores: log-probability of each token, and of the end token if it is finished.
        attention: [number of token scores, source tokens with the end token], the mean over the last layer's heads;
            None unless it was asked for.
        missing: required phrases that it does not hold.
        count: how often it was drawn; 1 where nothing is.
        utility: its agreement with all that were drawn, if it was chosen by that (`decoding.mbr_samples`).
        words: for each token the numbers of its words of the text, see `alignment.word_numbers`; empty without
            attention.
    """

    text: str
    tokens: list[str]
    score: float
    finished: bool
    token_scores: list[float]
    attention: np.ndarray | None = field(default=None, compare=False)
    missing: list[str] = field(default_factory=list)
    count: int = 1
    utility: float | None = None
    words: list[list[int]] = field(default_factory=list, compare=False)


@dataclass(frozen=True)
class Translation:
    """The outputs for a sentence, best first.

    Attributes:
        hypotheses: at least one, at most as many as asked for.
        truncated: whether the source was longer than the model takes and was cut.
        source: source pieces, without the end token.
        source_words: for each of them the numbers of its words of the sentence, see `alignment.word_numbers`; empty
            without attention.
    """

    hypotheses: list[Hypothesis]
    truncated: bool = False
    source: list[str] = field(default_factory=list)
    source_words: list[list[int]] = field(default_factory=list, compare=False)

    @property
    def text(self) -> str:
        """Text of the best hypothesis."""
        return self.hypotheses[0].text

    @property
    def score(self) -> float:
        """Score of the best hypothesis."""
        return self.hypotheses[0].score

    @property
    def tokens(self) -> list[str]:
        """Target pieces of the best hypothesis."""
        return self.hypotheses[0].tokens


@dataclass(frozen=True)
class NoTranslation:
    """The reason why a sentence has no translation. Whoever asks for an output of it gets the reason raised.

    Attributes:
        sentence: the raw text.
        reason: what cannot be had for this sentence (`InputError`), or scores that are not finite (`DivergenceError`).
        truncated: as of `Translation`.

    Example:
        found = translator.translate(sentences)
        texts = ["" if isinstance(each, NoTranslation) else each.text for each in found]
    """

    sentence: str
    reason: InputError | DivergenceError
    truncated: bool = False

    @property
    def error(self) -> InputError | DivergenceError:
        """The reason, with the sentence that it is of."""
        return type(self.reason)(f"{shortened(self.sentence)!r} has no translation: {self.reason}")

    def _raised(self) -> NoReturn:
        raise self.error from self.reason

    # What a `Translation` has and this has not.
    hypotheses = text = score = tokens = source = source_words = property(_raised)


def raise_if_diverged(answers: Sequence[Translation | NoTranslation]) -> None:
    """Returns if some sentence has a translation, or lacks one because of rules or of what is asked of it alone.

    Raises:
        DivergenceError: scores that are not finite are why no sentence has one, but for the empty ones. So it is the
            model that is at fault.
    """
    asked = [each for each in answers if isinstance(each, NoTranslation) or each.source]
    diverged = [e for e in asked if isinstance(e, NoTranslation) and isinstance(e.reason, DivergenceError)]
    if diverged and len(diverged) == len(asked):
        raise diverged[0].error from diverged[0].reason


def no_output_line(answers: Sequence[Translation | NoTranslation], what: str) -> str:
    """Returns what a warning says of sentences without a translation; nothing if all have one.

    Args:
        answers: to all sentences.
        what: they are, "test sentences".
    """
    without = [each for each in answers if isinstance(each, NoTranslation)]
    if not without:
        return ""
    first = without[0]
    return (
        f"{len(without):,} of {len(answers):,} {what} have no output and count as empty. The first is "
        f"{shortened(first.sentence)!r}: {first.reason}"
    )


def texts_or_empty(answers: Sequence[Translation | NoTranslation]) -> list[str]:
    """Returns the best output of each sentence, empty where there is none: for evaluations.

    Raises:
        DivergenceError: see `raise_if_diverged`.
    """
    raise_if_diverged(answers)
    return ["" if isinstance(each, NoTranslation) else each.text for each in answers]


def cut_line(name: str, max_source_length: int, what: str = "translated") -> str:
    """Returns what a warning says of a line that was cut.

    Args:
        name: of the line, "line 3".
        max_source_length: of the model, end token included.
        what: was done with the rest of it.
    """
    return (
        f"{name} is longer than the model's {max_source_length - 1} tokens; only its beginning was {what}. Break it "
        f"into sentences, one a line, or train with a model.max_source_length above {max_source_length}."
    )


EMPTY = Translation([Hypothesis(text="", tokens=[], score=0.0, finished=True, token_scores=[])])
