"""The attention of a model while it reads a source sentence and a given output."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from flax_transformer.data.tokenizer import Tokenizer
from flax_transformer.inference.chunks import length_bucket
from flax_transformer.inference.padding import padded_sentences
from flax_transformer.inference.translator import Translator
from flax_transformer.models.parameters import GraphDef, Params
from flax_transformer.models.seq2seq import AttentionWeights
from flax_transformer.parallel.placement import fetch
from flax_transformer.shapes import Batch


@dataclass(frozen=True)
class AttentionMap:
    """The attention weights of each target token over the source tokens.

    Attributes:
        source: source pieces with the end token.
        target: target pieces with the end token.
        weights: [L, N, T, S], for L layers and N heads; each row sums to 1.
    """

    source: list[str]
    target: list[str]
    weights: np.ndarray


def attention_map(translator: Translator, source: str, target: str) -> AttentionMap | None:
    """Returns the attention over `source` while the model reads `target`; None for a model without attention."""
    tokenizers = translator.tokenizers

    def closed(tokenizer: Tokenizer, text: str, longest: int) -> list[int]:
        return [*tokenizer.encode([text])[0][: longest - 1], tokenizer.special.end]

    source_ids = closed(tokenizers.source, source, translator.model.max_source_length)
    target_ids = closed(tokenizers.target, target, translator.model.max_target_length)
    weights = attention_weights(translator, source_ids, target_ids).cross
    if weights is None:
        return None
    return AttentionMap(tokenizers.source.pieces(source_ids), tokenizers.target.pieces(target_ids), np.asarray(weights))


def attention_weights(translator: Translator, source: Sequence[int], target: Sequence[int]) -> AttentionWeights:
    """Returns the weights of all layers and heads, as arrays of NumPy without the batch axis of `AttentionWeights`.

    Args:
        translator: translator with a single model.
        source: ids that the encoder reads, end token included.
        target: ids that the decoder predicts, end token included if there is one.
    """
    model = translator.model

    def side(ids: Sequence[int], longest: int) -> tuple[np.ndarray, ...]:
        return padded_sentences([ids], 1, length_bucket(len(ids), longest))  # few lengths, so few programs

    batch = Batch(*side(source, model.max_source_length), *side(target, model.max_target_length))
    with jax.set_mesh(translator.mesh):
        found = _attention_weights(translator.parameters.graphdef, translator.params, batch)

    def without_padding(weights: Any, num_queries: int, num_keys: int) -> np.ndarray | None:
        return None if weights is None else fetch(weights)[0, :, :, :num_queries, :num_keys]

    return AttentionWeights(
        without_padding(found.encoder, len(source), len(source)),
        without_padding(found.decoder, len(target), len(target)),
        without_padding(found.cross, len(target), len(source)),
    )


@functools.partial(jax.jit, static_argnums=0)
def _attention_weights(graphdef: GraphDef, params: Params, batch: Batch) -> AttentionWeights:
    return nnx.merge(graphdef, params).attention_weights(batch)
