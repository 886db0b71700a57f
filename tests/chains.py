"""What tests of the search share: it is given Markov chains, whose tokens 0 and 1 are the start and the end.

The logits of the next token depend on the last one alone. The state of a decoder holds one chain for each sentence, and
which of them is in each slot.
"""

import functools

import jax
import jax.numpy as jnp

from flax_transformer.decoding.decoder_functions import DecoderFunctions

START, END = 0, 1


@functools.cache
def chain_functions(keep_read: bool = False) -> DecoderFunctions:
    """A decoder over the state of `chain_state`; with `keep_read` a token's auxiliary value is the one before it."""

    def step(tokens, state):
        rows = jax.vmap(lambda chain, row: jnp.take(chain, row, axis=0))(state["chains"][state["slots"]], tokens)
        return rows, tokens if keep_read else None, state

    def refill(state, fresh, sentences):
        return state | {"slots": jnp.where(fresh, sentences, state["slots"])}

    return DecoderFunctions(step, lambda state, parents: state, refill)


def chain_state(chains, num_slots: int):
    """The state before the first step, from one chain [V, V] a sentence."""
    return {"chains": jnp.asarray(chains, jnp.float32), "slots": jnp.zeros((num_slots,), jnp.int32)}


def table_functions(chain) -> DecoderFunctions:
    """A decoder without a state: one chain for all sentences."""
    return DecoderFunctions(lambda tokens, state: (chain[tokens], None, state), lambda s, _: s, lambda s, *_: s)


def outputs(found, sentence: int = 0) -> list[tuple[tuple[int, ...], float, bool]]:
    """The hypotheses of a sentence, best first: tokens, score and whether it has ended."""
    result = []
    for beam in range(found.lengths.shape[1]):
        length = int(found.lengths[sentence, beam])
        if length:
            tokens = tuple(int(t) for t in found.tokens[sentence, beam, :length])
            result.append((tokens, float(found.scores[sentence, beam]), bool(found.finished[sentence, beam])))
    return result
