"""What a translation consists of: a sentence's outputs, best first, and what is known of each."""

from dataclasses import dataclass, field

import numpy as np


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
