"""Minimum Bayes risk: the choice of the sample that agrees best with all samples.

References:
    Kumar and Byrne 2004; Eikema and Aziz 2022, "Sampling-Based Approximations to Minimum Bayes Risk Decoding".
"""

from collections.abc import Sequence
from typing import Literal

from sacrebleu.metrics import BLEU, CHRF

Utility = Literal["chrf", "bleu"]


def expected_utilities(texts: Sequence[str], counts: Sequence[int], utility: Utility) -> list[float]:
    """Returns the mean agreement of each text with all samples, itself included, from 0 to 100.

    Args:
        texts: distinct samples for one sentence.
        counts: number of times that each text was drawn.
        utility: sacreBLEU's sentence-level "chrf" or "bleu" (with effective order).
    """
    metric = CHRF() if utility == "chrf" else BLEU(effective_order=True)
    total = sum(counts)

    def mean(text: str) -> float:
        matches = (
            count * metric.sentence_score(text, [other]).score for other, count in zip(texts, counts, strict=True)
        )
        return sum(matches) / total

    return [mean(text) for text in texts]
