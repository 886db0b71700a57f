"""Choosing, among outputs that were drawn, the one that the others agree with most.

References:
    Kumar and Byrne 2004; Eikema and Aziz 2022, "Sampling-Based Approximations to Minimum Bayes Risk Decoding".
"""

from collections.abc import Sequence
from typing import Literal

from sacrebleu.metrics import BLEU, CHRF

Utility = Literal["chrf", "bleu"]


def expected_utilities(texts: Sequence[str], counts: Sequence[int], utility: Utility) -> list[float]:
    """Returns for each text the mean over all that were drawn, itself included, of how well it matches them, 0 to 100.

    Args:
        texts: different outputs for one sentence.
        counts: how often each was drawn.
        utility: sacreBLEU's sentence-level "chrf" or "bleu" (with the effective order, as for single sentences).
    """
    metric = CHRF() if utility == "chrf" else BLEU(effective_order=True)
    total = sum(counts)

    def mean(text: str) -> float:
        matches = (
            count * metric.sentence_score(text, [other]).score for other, count in zip(texts, counts, strict=True)
        )
        return sum(matches) / total

    return [mean(text) for text in texts]
