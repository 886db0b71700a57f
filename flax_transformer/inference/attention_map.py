"""The attention of a decoder over a source sentence, while it reads a given output."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_transformer.data.tokenizer import Tokenizer
from flax_transformer.inference.translator import Translator
from flax_transformer.parallel.placement import fetch


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

    @jax.jit
    def run(params, tokens, inputs):
        model = nnx.merge(graphdef, params)
        positions = jnp.arange(tokens.shape[1])[None, :]
        encoded = model.encode(tokens, positions, jnp.ones_like(tokens))
        state = model.init_decode_state(encoded, 1, inputs.shape[0])

        def step(state, token):
            output, state = model.decode_step(token[None, None], state)
            return state, output.attention

        return jax.lax.scan(step, state, inputs)[1]

    inputs = np.asarray([tokenizers.target.special.start, *target_ids[:-1]], np.int32)
    with jax.set_mesh(translator.mesh):
        weights = run(translator.params, np.asarray([source_ids], np.int32), inputs)  # [T, 1, 1, L, N, S]
    if weights is None:
        return None
    return AttentionMap(
        tokenizers.source.pieces(source_ids),
        tokenizers.target.pieces(target_ids),
        np.moveaxis(fetch(weights)[:, 0, 0], 0, 2),
    )
