"""The log-probability that a model gives to pairs of sentences that exist already."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from flax_transformer.decoding.length_penalty import LengthPenalty
from flax_transformer.errors import InputError
from flax_transformer.inference.chunks import length_bucket
from flax_transformer.inference.search_program import ALL_AXES
from flax_transformer.inference.translator import Translator
from flax_transformer.parallel.mesh import all_devices_sharding
from flax_transformer.shapes import Batch


@dataclass(frozen=True)
class PairScore:
    """What a model says of a pair.

    Attributes:
        score: `log_prob` divided by the length penalty: the number that `translate` gives the same output.
        log_prob: of the target given the source, end token included; nats. Of an empty source and an empty target it is
            0, as in `translate`.
        tokens: target pieces, without the end token.
        token_scores: log-probability of each token and of the end token.
        truncated: whether the source was longer than the model takes and was cut.
    """

    score: float
    log_prob: float
    tokens: list[str]
    token_scores: list[float]
    truncated: bool = False


def _token_log_probs(graphdef: Any, num_models: int, params: Any, batch: Batch) -> Float[Array, "B T"]:
    """Returns the log-probability of each target token under teacher forcing.

    That of an ensemble, whose parameters are stacked, is of the mean of its models' probabilities, as in a search.
    """

    def of_model(params: Any) -> Float[Array, "B T"]:
        model = nnx.merge(graphdef, params)
        projection = model.output_projection()

        def of_row(row: tuple[Float[Array, "T D"], Int[Array, "T"]]) -> Float[Array, "T"]:
            hidden, tokens = row
            logits = projection.logits(hidden[None])[0]  # one row at a time: [B, T, V] is never made
            return jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=1)

        return jax.lax.map(of_row, (model(batch), batch.target_tokens))

    if num_models == 1:
        return of_model(params)
    return jax.nn.logsumexp(jax.vmap(of_model)(params), axis=0) - jnp.log(jnp.float32(num_models))


class Scorer:
    """Scores pairs with the model of a translator.

    Example:
        scorer = Scorer(Translator.load("runs/number_words"))
        scorer.score(["twenty-one"], ["einundzwanzig"])[0].score
    """

    def __init__(self, translator: Translator):
        self.translator = translator
        rows = jax.P(ALL_AXES)
        function = functools.partial(_token_log_probs, translator.graphdef, translator.num_models)
        self._program = jax.jit(
            jax.shard_map(function, mesh=translator.mesh, in_specs=(jax.P(), rows), out_specs=rows, check_vma=False)
        )

    def score(
        self, sources: Sequence[str], targets: Sequence[str], length_penalty: str | None = None, first: int = 1
    ) -> list[PairScore]:
        """Returns the score of each pair.

        A target is scored as the tokens that its text is cut into, and as an output that has ended.

        Args:
            sources, targets: equally many lines of raw text. A source that is longer than the model takes is cut, as it
                is in `translate`; an empty one has an empty target.
            length_penalty: such as "gnmt:0.6"; the run's own when None.
            first: number of the first pair, for messages.

        Raises:
            InputError: unequal numbers of lines, a target for an empty source, or one that is longer than the model's
                outputs.
            ConfigError: a bad length penalty.
        """
        if len(sources) != len(targets):
            raise InputError(
                f"every source needs its target, but there are {len(sources)} sources and {len(targets)} targets."
            )
        tokenizers = self.translator.tokenizers
        return self.score_ids(
            tokenizers.source.encode(sources), tokenizers.target.encode(targets), length_penalty, True, first
        )

    def score_ids(
        self,
        sources: Sequence[list[int]],
        targets: Sequence[list[int]],
        length_penalty: str | None = None,
        end: bool = True,
        first: int = 1,
    ) -> list[PairScore]:
        """Returns the score of each pair of token ids; `end` says whether the end token closes the targets.

        For the rest see `score`.

        Raises:
            InputError: a target for an empty source, or one that is longer than the model's outputs.
            ConfigError: a bad length penalty.
        """
        translator, tokenizers = self.translator, self.translator.tokenizers
        penalty = LengthPenalty.parse(translator.decoding.length_penalty if length_penalty is None else length_penalty)
        room, limit = translator.max_source_length - 1, translator.max_target_length - int(end)
        for index, (source, target) in enumerate(zip(sources, targets, strict=True)):
            wrong = ""
            if len(target) > limit:
                wrong = (
                    f"target line {first + index} has {len(target)} tokens, and the model's outputs have at most "
                    f"{limit} (model.max_target_length, less the end token)"
                )
            elif target and not source:
                wrong = (
                    f"source line {first + index} is empty, and its target is not: an empty line has an empty "
                    "translation"
                )
            if wrong:
                error = InputError(f"{wrong}. Take the pair out.")
                error.sentence = index
                raise error
        long = [len(source) > room for source in sources]
        sources = [source[:room] for source in sources]
        results = [PairScore(0.0, 0.0, [], [], truncated) for truncated in long]
        groups: dict[tuple[int, int], list[int]] = {}
        for index, (source, target) in enumerate(zip(sources, targets, strict=True)):
            if not source or not target and not end:  # nothing that could be asked of the model
                continue
            shape = (
                length_bucket(len(source) + 1, translator.max_source_length),
                length_bucket(len(target) + int(end), translator.max_target_length),
            )
            groups.setdefault(shape, []).append(index)

        for shape, members in sorted(groups.items()):
            for start in range(0, len(members), translator.rows):
                chunk = members[start : start + translator.rows]
                source_end, target_end = (side.special.end for side in (tokenizers.source, tokenizers.target))
                closed = [(targets[i] + [target_end]) if end else targets[i] for i in chunk]
                batch = self._batch([sources[i] + [source_end] for i in chunk], closed, shape)
                found = np.asarray(self._program(translator.params, batch))
                for row, index in enumerate(chunk):
                    token_scores = found[row, : len(closed[row])]
                    log_prob = float(token_scores.sum(dtype=np.float32))
                    divisor = float(penalty.divisor(jnp.asarray(len(token_scores))))
                    pieces = translator.tokenizers.target.pieces(targets[index])
                    scores = token_scores.tolist()
                    results[index] = PairScore(log_prob / divisor, log_prob, pieces, scores, long[index])
        return results

    def _batch(self, sources: list[list[int]], targets: list[list[int]], shape: tuple[int, int]) -> Batch:
        def side(sentences: list[list[int]], length: int) -> list[np.ndarray]:
            tokens, segments = np.zeros((2, self.translator.rows, length), np.int32)
            for row, ids in enumerate(sentences):
                tokens[row, : len(ids)] = ids
                segments[row, : len(ids)] = 1
            positions = np.ascontiguousarray(np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape))
            return [tokens, positions, segments]

        sharding = all_devices_sharding(self.translator.mesh)
        return Batch(*(jax.device_put(a, sharding) for a in (*side(sources, shape[0]), *side(targets, shape[1]))))
