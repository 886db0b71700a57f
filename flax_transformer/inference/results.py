"""The results of a search as text: from arrays to hypotheses, and to the answer for a sentence."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from flax_transformer.config.recipe import DecodingConfig
from flax_transformer.data.tokenizer_pair import TokenizerPair
from flax_transformer.decoding.hypotheses import Hypotheses
from flax_transformer.errors import ConfigError, DivergenceError, shortened
from flax_transformer.inference.alignment import word_numbers
from flax_transformer.inference.constraints import contains
from flax_transformer.inference.minimum_bayes_risk import expected_utilities
from flax_transformer.inference.parameters import Parameters
from flax_transformer.inference.requests import Request
from flax_transformer.inference.translation import EMPTY, Hypothesis, NoTranslation, Translation
from flax_transformer.shapes import MASKED

# Fields of section 'decoding' that may exclude every next token.
EXCLUDING = ("min_length", "no_repeat_ngram", "suppress_unknown", "suppress_sequences", "suppress_tokens")


@dataclass(frozen=True)
class ResultReader:
    """Makes answers from the results of searches.

    Attributes:
        tokenizers: tokenizers of both sides.
        decoding: settings of the searches.
        num_hypotheses: most outputs for each sentence.
        parameters: parameters of the model, checked if a sentence has no output.
    """

    tokenizers: TokenizerPair
    decoding: DecodingConfig
    num_hypotheses: int
    parameters: Parameters

    def read(self, request: Request, found: Hypotheses, row: int) -> Translation | NoTranslation:
        """Returns the answer to a request.

        Args:
            request: request for a sentence with at least one token.
            found: results of a whole call, as NumPy arrays.
            row: row of the sentence.
        """
        hypotheses = self._hypotheses(request, found, row)
        if not hypotheses:
            return NoTranslation(request.sentence, self._reason(found, row), request.truncated)
        if request.phrases:  # unfinished outputs are ranked by the number of phrases that they lack
            hypotheses = [self._with_missing(hypothesis, request) for hypothesis in hypotheses]
            hypotheses.sort(key=lambda hypothesis: (not hypothesis.finished, len(hypothesis.missing)))
        elif self.decoding.mbr_samples:
            hypotheses = self._by_utility(hypotheses)
        tokenizer, num = self.tokenizers.source, len(request.source) - 1
        words = []
        if found.auxiliary is not None:
            words = word_numbers(request.sentence, tokenizer.encoded_spans(request.sentence)[:num])
        return Translation(
            hypotheses[: self.num_hypotheses], request.truncated, tokenizer.pieces(request.source[:-1]), words
        )

    def empty(self, request: Request) -> Translation:
        """Returns the answer for a sentence without a token: an empty output, which lacks all required phrases."""
        return Translation([dataclasses.replace(EMPTY.hypotheses[0], missing=request.required)], request.truncated)

    def _hypotheses(self, request: Request, found: Hypotheses, row: int) -> list[Hypothesis]:
        """Returns the distinct outputs of a sentence, best first; an empty list if it has none."""
        results: dict[tuple[Any, ...], Hypothesis] = {}
        # All outputs are read if they are sorted again, or if some may be equal (samples). Otherwise the first suffice.
        sorted_again = request.phrases or self.decoding.method == "sampling"
        for beam in range(found.lengths.shape[1] if sorted_again else self.num_hypotheses):
            length, finished = int(found.lengths[row, beam]), bool(found.finished[row, beam])
            if length == 0 or not found.scores[row, beam] > MASKED / 2:  # no further hypothesis, or NaN
                break
            ids = found.tokens[row, beam, : length - 1 if finished else length].tolist()
            key = *ids, finished
            if (before := results.get(key)) is not None:  # drawn twice
                results[key] = dataclasses.replace(before, count=before.count + 1)
                continue
            target = self.tokenizers.target
            text, attention, words = target.decode(ids), None, []
            if found.auxiliary is not None:  # a copy, so that the array of the whole call can be freed
                attention = found.auxiliary["attention"][row, beam, :length, : len(request.source)].copy()
                words = word_numbers(text, target.decoded_spans(ids))
            results[key] = Hypothesis(
                text,
                target.pieces(ids),
                float(found.scores[row, beam]),
                finished,
                found.log_probs[row, beam, :length].tolist(),
                attention,
                words=words,
            )
        return list(results.values())

    def _by_utility(self, hypotheses: list[Hypothesis]) -> list[Hypothesis]:
        """Returns the samples by their agreement with all samples, the highest first."""
        texts, counts = [h.text for h in hypotheses], [h.count for h in hypotheses]
        utilities = expected_utilities(texts, counts, self.decoding.mbr_utility)
        order = sorted(range(len(hypotheses)), key=lambda number: -utilities[number])
        return [dataclasses.replace(hypotheses[number], utility=utilities[number]) for number in order]

    def _with_missing(self, hypothesis: Hypothesis, request: Request) -> Hypothesis:
        """Returns the hypothesis with the required phrases that it lacks."""
        pieces = self.tokenizers.target.pieces
        named = zip(request.phrases, request.required, strict=True)
        missing = [text for ids, text in named if not contains(hypothesis.tokens, pieces(ids))]
        return dataclasses.replace(hypothesis, missing=missing)

    def _reason(self, found: Hypotheses, row: int) -> ConfigError | DivergenceError:
        """Returns the reason why a sentence has no output: scores are not finite, or rules exclude every output.

        The results look the same in both cases, but the parameters differ. Finite parameters give finite scores, unless
        these leave the range of float32.
        """
        problem = "the search found no output at all, since"
        diverged = "the model's scores are not finite: the training has diverged"
        rules = [name for name in EXCLUDING if getattr(self.decoding, name) != getattr(DecodingConfig(), name)]
        if rules and self.parameters.are_finite and not np.isnan(found.scores[row]).any():
            named = ", ".join(f"decoding.{name}: {shortened(str(getattr(self.decoding, name)))}" for name in rules)
            return ConfigError(
                f"{problem} the rules that are set ({named}) leave no token to go on with. Loosen one of them, or "
                f"leave this sentence out. If it has no output without them either, {diverged}."
            )
        return DivergenceError(f"{problem} {diverged}. Train again with a lower learning rate.")
