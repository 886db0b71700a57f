"""The attention of a decoder over a source sentence, while it reads a given output."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_transformer.data.tokenizer import Tokenizer
from flax_transformer.inference.translator import Translator
from flax_transformer.parallel.placement import fetch

# The number of steps of a program is a multiple of this.
LENGTH_MULTIPLE = 16


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
    tokenizers, graphdef = translator.tokenizers, translator.parameters.graphdef

    def closed(tokenizer: Tokenizer, text: str, longest: int) -> list[int]:
        return [*tokenizer.encode([text])[0][: longest - 1], tokenizer.special.end]

    source_ids = closed(tokenizers.source, source, translator.model.max_source_length)
    target_ids = closed(tokenizers.target, target, translator.model.max_target_length)

    inputs = np.asarray([tokenizers.target.special.start, *target_ids[:-1]], np.int32)
    # Outputs of similar length share a program. Steps after the output change none before them.
    padded = np.pad(inputs, (0, -len(inputs) % LENGTH_MULTIPLE), constant_values=target_ids[-1])
    with jax.set_mesh(translator.mesh):
        weights = _weights(graphdef, translator.params, np.asarray([source_ids], np.int32), padded)
    if weights is None:
        return None
    return AttentionMap(
        tokenizers.source.pieces(source_ids),
        tokenizers.target.pieces(target_ids),
        np.moveaxis(fetch(weights)[: len(inputs), 0, 0], 0, 2),
    )


@functools.partial(jax.jit, static_argnums=0)
def _weights(graphdef: Any, params: Any, tokens: Any, inputs: Any) -> Any:
    """Returns the attention of each step, [T, 1, 1, L, N, S], or None, for [1, S] and [T] tokens."""
    model = nnx.merge(graphdef, params)
    positions = jnp.arange(tokens.shape[1])[None, :]
    encoded = model.encode(tokens, positions, jnp.ones_like(tokens))
    state = model.init_decode_state(encoded, 1, inputs.shape[0])

    def step(state, token):
        output, state = model.decode_step(token[None, None], state)
        return state, output.attention

    return jax.lax.scan(step, state, inputs)[1]
