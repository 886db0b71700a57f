"""The answer of `translate` for a sentence: its outputs, best first, or the reason why it has none."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np

from flax_transformer.errors import ConfigError, DivergenceError, InputError, shown
from flax_transformer.inference.translation_html import alignment_line, attention_table, hypotheses_table


@dataclass(frozen=True)
class Hypothesis:
    """One output for a sentence.

    Attributes:
        text: detokenised output.
        tokens: target pieces, without the end token.
        score: log-probability (nats, end token included) divided by the length penalty, plus the coverage penalty; at
            most 0.
        finished: False for an output that was cut at the maximum length.
        token_scores: log-probability of each token. A finished output has one more, for the end token.
        attention: [token scores, source tokens with the end token], the mean over the heads of the last layer; None if
            it was not asked for.
        missing: required phrases that the output lacks.
        count: number of times that it was drawn; 1 in a beam search.
        utility: agreement with all samples, with minimum Bayes risk (`decoding.mbr_samples`).
        words: word numbers of each token in the text (see `alignment.word_numbers`); empty without attention.

    Example:
        >>> best = Hypothesis("ein Hund", ["▁ein", "▁Hund"], score=-0.5, finished=True, token_scores=[-0.2, -0.2, -0.1])
        >>> len(best.token_scores) - len(best.tokens)  # the end token has a score, too
        1
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
        hypotheses: one or more outputs, at most the number that was asked for.
        truncated: whether the source was cut because it is too long for the model.
        source: source pieces, without the end token.
        source_words: word numbers of each source piece in the sentence (see `alignment.word_numbers`); empty without
            attention.

    Example:
        >>> best = Hypothesis("ein Hund", ["▁ein", "▁Hund"], score=-0.5, finished=True, token_scores=[-0.2, -0.2, -0.1])
        >>> Translation([best]).text
        'ein Hund'
    """

    hypotheses: list[Hypothesis]
    truncated: bool = False
    source: list[str] = field(default_factory=list)
    source_words: list[list[int]] = field(default_factory=list, compare=False)

    @property
    def text(self) -> str:
        """The text of the best hypothesis."""
        return self.hypotheses[0].text

    @property
    def score(self) -> float:
        """The score of the best hypothesis."""
        return self.hypotheses[0].score

    @property
    def tokens(self) -> list[str]:
        """The target pieces of the best hypothesis."""
        return self.hypotheses[0].tokens

    def _repr_html_(self) -> str:
        """Returns what a notebook shows: the outputs, and the best one's aligned words and attention if it has them."""
        best = self.hypotheses[0]
        parts = [hypotheses_table([(each.text, each.score, each.finished) for each in self.hypotheses])]
        if best.attention is not None:
            parts.append(alignment_line(self.source_words, best.words, best.attention))
            parts.append(attention_table(self.source, best.tokens, best.attention))
        return f"<div>{''.join(parts)}</div>"


@dataclass(frozen=True)
class NoTranslation:
    """The reason why a sentence has no translation. Reading an output from it raises the reason.

    Attributes:
        sentence: the raw text.
        reason: an impossible constraint (`InputError`), settings that leave no output (`ConfigError`), or scores that
            are not finite (`DivergenceError`).
        truncated: whether the source was cut because it is too long for the model.

    Example:
        >>> best = Hypothesis("ein Hund", ["▁ein", "▁Hund"], score=-0.5, finished=True, token_scores=[-0.2, -0.2, -0.1])
        >>> found = [Translation([best]), NoTranslation("A cat.", InputError("the prefix is too long."))]
        >>> ["" if isinstance(each, NoTranslation) else each.text for each in found]
        ['ein Hund', '']
    """

    sentence: str
    reason: InputError | DivergenceError
    truncated: bool = False

    @property
    def error(self) -> InputError | DivergenceError:
        """The reason, with the sentence that it concerns."""
        return type(self.reason)(f"{shown(self.sentence)} has no translation: {self.reason}")

    def _raised(self) -> NoReturn:
        raise self.error from self.reason

    # Attributes of a `Translation` that this class lacks.
    hypotheses = text = score = tokens = source = source_words = property(_raised)


@dataclass
class Failures:
    """The sentences so far that have no output because of the model or the settings, among all non-empty ones.

    Attributes:
        others: number of sentences that have an output, or lack one for a reason of their own.
        failed: number of sentences that lack one because of the model or the settings.
        first: the first of these. One whose scores are not finite comes before the others.

    Example:
        >>> failures = Failures()
        >>> for sentence in ("A dog.", "A cat."):
        ...     failures.add([NoTranslation(sentence, ConfigError("no token is left."))])
        >>> failures.raise_if_all()
        Traceback (most recent call last):
        flax_transformer.errors.ConfigError: 'A dog.' has no translation: no token is left.
    """

    others: int = 0
    failed: int = 0
    first: NoTranslation | None = None

    def add(self, answers: Sequence[Translation | NoTranslation]) -> None:
        """Adds sentences."""
        for each in answers:
            if not isinstance(each, NoTranslation):
                self.others += bool(each.source)
            elif not isinstance(each.reason, ConfigError | DivergenceError):
                self.others += 1
            else:
                self.failed += 1
                if self.first is None or _diverged(each) and not _diverged(self.first):
                    self.first = each

    def raise_if_all(self) -> None:
        """Raises if no sentence has an output because of the model or the settings.

        Scores may leave the range of float32 with finite parameters. `ResultReader` then blames the settings, if they
        exclude tokens. So settings that fail for every sentence are an error, too.

        Raises:
            DivergenceError: every non-empty sentence failed, one or more of them because scores are not finite.
            ConfigError: two or more non-empty sentences failed, all of them because of the settings.
        """
        if self.first is not None and not self.others and (_diverged(self.first) or self.failed > 1):
            raise self.first.error from self.first.reason


def _diverged(answer: NoTranslation) -> bool:
    return isinstance(answer.reason, DivergenceError)


def no_output_line(answers: Sequence[Translation | NoTranslation], what: str) -> str:
    """Returns the text of a warning about sentences without a translation; "" if all have one.

    Args:
        answers: answers to all sentences.
        what: name of the sentences, such as "test sentences".
    """
    without = [each for each in answers if isinstance(each, NoTranslation)]
    if not without:
        return ""
    first = without[0]
    return (
        f"{len(without):,} of {len(answers):,} {what} have no output and count as empty. The first is "
        f"{shown(first.sentence)}: {first.reason}"
    )


def texts_or_empty(answers: Sequence[Translation | NoTranslation]) -> list[str]:
    """Returns the best output of each sentence, "" if it has none.

    Raises:
        ConfigError, DivergenceError: see `Failures.raise_if_all`.
    """
    failures = Failures()
    failures.add(answers)
    failures.raise_if_all()
    return ["" if isinstance(each, NoTranslation) else each.text for each in answers]


def cut_line(name: str, max_source_length: int, what: str = "translated") -> str:
    """Returns the text of a warning about a line that was cut.

    Args:
        name: name of the line, such as "line 3".
        max_source_length: most source tokens of the model, end token included.
        what: participle for the beginning of the line, such as "translated".
    """
    return (
        f"{name} is longer than the model's {max_source_length - 1} tokens; only its beginning was {what}. Break it "
        f"into sentences, one a line, or train with a model.max_source_length above {max_source_length}."
    )


EMPTY = Translation([Hypothesis(text="", tokens=[], score=0.0, finished=True, token_scores=[])])
