"""The scores that a model gives to existing translations."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from flax_transformer.data.text_files import MAX_CHARACTERS
from flax_transformer.decoding.length_penalty import LengthPenalty
from flax_transformer.errors import DivergenceError, InputError, as_texts, shown
from flax_transformer.inference.chunks import length_bucket
from flax_transformer.inference.padding import padded_sentences
from flax_transformer.inference.requests import encode_each, is_cut
from flax_transformer.inference.search_program import ALL_AXES, log_of_mean
from flax_transformer.inference.translator import Translator
from flax_transformer.models.parameters import GraphDef, Params
from flax_transformer.parallel.mesh import all_devices_sharding, replicated_sharding
from flax_transformer.parallel.placement import fetch, put
from flax_transformer.parallel.sharding_rules import stationary_weights
from flax_transformer.shapes import Batch


@dataclass(frozen=True)
class PairScore:
    """The score of a pair.

    Attributes:
        score: `log_prob` divided by the length penalty, as in `translate`.
        log_prob: log-probability of the target given the source, in nats, end token included. It is 0 for an empty
            source with an empty target.
        tokens: target pieces, without the end token.
        token_scores: log-probability of each token, end token included.
        truncated: whether the source was cut because it is too long for the model.

    Example:
        >>> found = PairScore(score=-0.5, log_prob=-1.0, tokens=["▁ein"], token_scores=[-0.75, -0.25])
        >>> sum(found.token_scores) == found.log_prob
        True
    """

    score: float
    log_prob: float
    tokens: list[str]
    token_scores: list[float]
    truncated: bool = False


@dataclass(frozen=True)
class NoScore:
    """The reason why a pair has no score. Reading a number from it raises the reason.

    Attributes:
        target: text of the target.
        reason: an impossible pair (`InputError`), or a log-probability that is not finite (`DivergenceError`).

    Example:
        >>> found = NoScore("ein", InputError("the source is empty."))
        >>> str(found.reason)
        'the source is empty.'
    """

    target: str
    reason: InputError | DivergenceError

    @property
    def error(self) -> InputError | DivergenceError:
        """The reason, with the target that it concerns."""
        return type(self.reason)(f"{shown(self.target)} has no score: {self.reason}")

    def _raised(self) -> NoReturn:
        raise self.error from self.reason

    # Attributes of a `PairScore` that this class lacks.
    score = log_prob = tokens = token_scores = truncated = property(_raised)


def _token_log_probs_of(
    graphdef: GraphDef, num_models: int, params: Params, batch: Batch, axis: Literal[0, 1] = 0
) -> Float[Array, "B T"]:
    """Returns the log-probability of each target token under teacher forcing.

    An ensemble averages its models' probabilities, as in a search. Their parameters are stacked. Logits are computed
    for one entry of `axis` of [B, T] at a time, since [B, T, V] is large.
    """

    def of_model(params: Params) -> Float[Array, "B T"]:
        model = nnx.merge(graphdef, params)
        projection = model.output_projection()

        def of_entry(entry: tuple[Float[Array, "_ D"], Int[Array, "_"]]) -> Float[Array, "_"]:
            hidden, tokens = entry
            logits = projection.logits(hidden[None])[0]
            return jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=1)

        entries = model(batch), batch.target_tokens
        if axis == 0:
            return jax.lax.map(of_entry, entries)
        return jax.lax.map(of_entry, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), entries)).T

    if num_models == 1:
        return of_model(params)
    return log_of_mean(jax.vmap(of_model)(params))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _token_log_probs(
    graphdef: GraphDef, num_models: int, mesh: Mesh, params: Params, batch: Batch
) -> Float[Array, "B T"]:
    rows, function = jax.P(ALL_AXES), functools.partial(_token_log_probs_of, graphdef, num_models)
    return jax.shard_map(function, mesh=mesh, in_specs=(jax.P(), rows), out_specs=rows, check_vma=False)(params, batch)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sharded_token_log_probs(graphdef: GraphDef, num_models: int, params: Params, batch: Batch) -> Float[Array, "B T"]:
    """Returns the same with parameters that are split over the mesh in context. Rows are split over "data"."""
    with stationary_weights():  # a row belongs to one part of the mesh, and a position to all
        return _token_log_probs_of(graphdef, num_models, params, batch, axis=1)


class Scorer:
    """Scores pairs with the model of a translator.

    Example:
        >>> scorer = Scorer(Translator.load("runs/number_words"))
        >>> scored = scorer.score(["twenty-one"], ["einundzwanzig"])[0]
        >>> scored.log_prob < 0, len(scored.token_scores) - len(scored.tokens)  # one more, for the end token
        (True, 1)
    """

    def __init__(self, translator: Translator):
        self.translator = translator

    def score(
        self, sources: Iterable[Any], targets: Iterable[Any], length_penalty: str | None = None
    ) -> list[PairScore | NoScore]:
        """Returns the score of each pair, or the reason why it has none.

        A target is tokenised, and scored as a finished output. A pair has no score if its target is too long for the
        model. The same holds if only its source is empty, or if its text is not valid Unicode.

        Args:
            sources, targets: equal numbers of lines of raw text, in any iterable. A source that is too long for the
                model is cut, as in `translate`.
            length_penalty: length penalty, such as "gnmt:0.6"; None takes the run's own.

        Raises:
            InputError: unequal numbers of lines.
            ConfigError: an invalid length penalty, or an item that is no text.
        """
        sources, targets = as_texts("sources", sources), as_texts("targets", targets)
        if len(sources) != len(targets):
            raise InputError(
                f"every source needs its target, but there are {len(sources)} sources and {len(targets)} targets."
            )
        tokenizers = self.translator.tokenizers
        encoded = encode_each(tokenizers.source, sources), encode_each(tokenizers.target, targets)
        faults = {n: each for side in encoded for n, each in enumerate(side) if isinstance(each, InputError)}
        most = f"its target has more than {MAX_CHARACTERS:,} characters, and no model makes such an output."
        faults |= {n: InputError(most) for n, target in enumerate(targets) if is_cut(target)}
        source_ids, target_ids = ([[] if isinstance(each, InputError) else each for each in side] for side in encoded)
        scores = self.score_ids(source_ids, target_ids, length_penalty)
        for n, score in enumerate(scores):
            if n in faults:
                scores[n] = NoScore(targets[n], faults[n])
            elif is_cut(sources[n]) and isinstance(score, PairScore):
                scores[n] = dataclasses.replace(score, truncated=True)
        return scores

    def score_ids(
        self,
        sources: Sequence[list[int]],
        targets: Sequence[list[int]],
        length_penalty: str | None = None,
        end: bool = True,
    ) -> list[PairScore | NoScore]:
        """Returns the score of each pair of token ids.

        Args:
            sources, targets: ids of each line, without the end token.
            length_penalty: see `score`.
            end: whether the targets are scored with an end token.

        Raises:
            ConfigError: an invalid length penalty.
        """
        translator, model = self.translator, self.translator.model
        penalty = LengthPenalty.parse(translator.decoding.length_penalty if length_penalty is None else length_penalty)
        results: list[PairScore | NoScore] = []
        groups: dict[tuple[int, int], list[int]] = {}
        for index, (source, target) in enumerate(zip(sources, targets, strict=True)):
            truncated = len(source) >= model.max_source_length
            fault = self._fault(source, target, end)
            nothing = PairScore(0.0, 0.0, [], [], truncated)
            results.append(nothing if fault is None else NoScore(self._text(target), fault))
            if fault is not None or not source or not target and not end:  # the model has nothing to score
                continue
            shape = (
                length_bucket(min(len(source) + 1, model.max_source_length), model.max_source_length),
                length_bucket(len(target) + int(end), model.max_target_length),
            )
            groups.setdefault(shape, []).append(index)

        for shape, members in sorted(groups.items()):
            for start in range(0, len(members), translator.batch_size):
                chunk = members[start : start + translator.batch_size]
                for index, token_scores in zip(chunk, self._scored(chunk, sources, targets, end, shape), strict=True):
                    truncated = len(sources[index]) >= model.max_source_length
                    results[index] = self._result(targets[index], token_scores, penalty, truncated)
        return results

    def _text(self, target: list[int]) -> str:
        return self.translator.tokenizers.target.decode(target)

    def _fault(self, source: list[int], target: list[int], end: bool) -> InputError | None:
        """Returns the reason why a pair is impossible; None if it is possible."""
        limit = self.translator.model.max_target_length - int(end)
        if len(target) > limit:
            return InputError(
                f"its target has {len(target)} tokens, and the model's outputs have at most {limit} "
                "(model.max_target_length, less the end token). Take the pair out."
            )
        if target and not source:
            return InputError(
                "its source is empty, and its target is not: an empty line has an empty translation. Take the pair out."
            )
        return None

    def _scored(
        self,
        chunk: list[int],
        sources: Sequence[list[int]],
        targets: Sequence[list[int]],
        end: bool,
        shape: tuple[int, int],
    ) -> list[np.ndarray]:
        """Returns the log-probability of each target token, for the pairs of a chunk."""
        translator = self.translator
        tokenizers, room = translator.tokenizers, translator.model.max_source_length - 1
        closed = [targets[i] + [tokenizers.target.special.end] * end for i in chunk]
        batch = self._batch([sources[i][:room] + [tokenizers.source.special.end] for i in chunk], closed, shape)
        model = translator.parameters.graphdef, translator.parameters.num_models
        if translator.parameters.sharded:
            with jax.set_mesh(translator.mesh):
                found = fetch(_sharded_token_log_probs(*model, translator.params, batch))
        else:
            found = fetch(_token_log_probs(*model, translator.mesh, translator.params, batch))
        return [found[row, : len(target)] for row, target in enumerate(closed)]

    def _result(
        self, target: list[int], token_scores: np.ndarray, penalty: LengthPenalty, truncated: bool
    ) -> PairScore | NoScore:
        """Returns the score of a pair from the log-probabilities of its target's tokens."""
        log_prob = float(token_scores.sum(dtype=np.float32))
        if math.isnan(log_prob):
            diverged = "the model's scores are not finite: the training has diverged."
            return NoScore(self._text(target), DivergenceError(f"{diverged} Train again with a lower learning rate."))
        divisor = float(penalty.divisor(jnp.asarray(len(token_scores))))
        pieces = self.translator.tokenizers.target.pieces(target)
        return PairScore(log_prob / divisor, log_prob, pieces, token_scores.tolist(), truncated)

    def _batch(self, sources: list[list[int]], targets: list[list[int]], shape: tuple[int, int]) -> Batch:
        mesh, sharded = self.translator.mesh, self.translator.parameters.sharded
        sharding = replicated_sharding(mesh) if sharded else all_devices_sharding(mesh)
        num_rows = self.translator.batch_size
        source, target = padded_sentences(sources, num_rows, shape[0]), padded_sentences(targets, num_rows, shape[1])
        return Batch(*(put(array, sharding) for array in (*source, *target)))
