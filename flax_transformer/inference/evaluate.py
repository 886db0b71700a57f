"""Scores of translations against references, computed by sacreBLEU, with their signatures."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from sacrebleu.metrics import BLEU, CHRF

from flax_transformer.errors import InputError, as_texts


@dataclass(frozen=True)
class Scores:
    """Corpus-level scores.

    Attributes:
        bleu: BLEU, 0 to 100.
        bleu_signature: sacreBLEU's signature of BLEU.
        chrf: chrF2, 0 to 100.
        chrf_signature: sacreBLEU's signature of chrF2.
        exact_match: percentage of sentences that equal their reference.
        num_sentences: number of sentences.
    """

    bleu: float
    bleu_signature: str
    chrf: float
    chrf_signature: str
    exact_match: float
    num_sentences: int

    @property
    def record(self) -> dict[str, Any]:
        """The fields as a dict."""
        return asdict(self)

    @property
    def text(self) -> str:
        """The scores as lines of text."""
        return (
            f"BLEU {self.bleu:.2f}   {self.bleu_signature}\n"
            f"chrF {self.chrf:.2f}   {self.chrf_signature}\n"
            f"exact match {self.exact_match:.2f} % of {self.num_sentences} sentences"
        )


def evaluate(hypotheses: Iterable[Any], references: Iterable[Any], bleu_tokenizer: str = "13a") -> Scores:
    """Returns the scores of detokenised `hypotheses` against one reference each.

    Args:
        hypotheses, references: equal numbers of sentences, in any iterable.
        bleu_tokenizer: sacreBLEU's name of the tokenizer for BLEU.

    Raises:
        InputError: different numbers of lines, no line, or an item that is no text.
    """
    hypotheses, references = as_texts("hypotheses", hypotheses), as_texts("references", references)
    if len(hypotheses) != len(references):
        raise InputError(
            f"every hypothesis needs its reference, but there are {len(hypotheses)} hypotheses and "
            f"{len(references)} references."
        )
    if not references:
        raise InputError("there is nothing to evaluate: at least one sentence is needed.")
    # `force` silences sacreBLEU's warning about tokenised text. With "none" the user says that it is tokenised.
    bleu, chrf = BLEU(tokenize=bleu_tokenizer, force=bleu_tokenizer == "none"), CHRF()
    bleu_score = bleu.corpus_score(hypotheses, [references]).score
    chrf_score = chrf.corpus_score(hypotheses, [references]).score
    matches = sum(h == r for h, r in zip(hypotheses, references, strict=True))
    return Scores(
        bleu_score,
        str(bleu.get_signature()),
        chrf_score,
        str(chrf.get_signature()),
        100.0 * matches / len(references),
        len(references),
    )
