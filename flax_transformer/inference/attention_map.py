"""The attention of a decoder over a source sentence, while it is fed a given output."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_transformer.inference.translator import Translator


@dataclass(frozen=True)
class AttentionMap:
    """How much each target token looked at each source token.

    Attributes:
        source: source pieces with the end token.
        target: target pieces with the end token.
        weights: [L, N, T, S], each row sums to 1.
    """

    source: list[str]
    target: list[str]
    weights: np.ndarray


def attention_map(translator: Translator, source: str, target: str) -> AttentionMap | None:
    """Returns the attention over `source` while the model is fed `target`; None for a model without attention."""
    ends = [side.special.end for side in (translator.tokenizers.source, translator.tokenizers.target)]
    source_ids = [*translator.tokenizers.source.encode([source])[0][: translator.max_source_length - 1], ends[0]]
    target_ids = [*translator.tokenizers.target.encode([target])[0][: translator.max_target_length - 1], ends[1]]

    @jax.jit
    def run(params, tokens, inputs):
        model = nnx.merge(translator.graphdef, params)
        positions = jnp.arange(tokens.shape[1])[None, :]
        memory = model.encode(tokens, positions, jnp.ones_like(tokens))
        state = model.init_decode_state(memory, 1, inputs.shape[0])

        def step(state, token):
            output, state = model.decode_step(token[None, None], state)
            return state, output.attention

        return jax.lax.scan(step, state, inputs)[1]

    inputs = np.asarray([translator.tokenizers.target.special.start, *target_ids[:-1]], np.int32)
    weights = run(translator.params, np.asarray([source_ids], np.int32), inputs)  # [T, 1, 1, L, N, S]
    if weights is None:
        return None
    return AttentionMap(
        translator.tokenizers.source.pieces(source_ids),
        translator.tokenizers.target.pieces(target_ids),
        np.moveaxis(np.asarray(weights)[:, 0, 0], 0, 2),
    )
