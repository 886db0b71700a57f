"""What a search does along the vocabulary: log-probabilities and the best candidates.

Legend: B slots, K beams, M candidates, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flax_transformer.parallel.layout import vocabulary_first


def best_of_vocabulary(x: Float[Array, "B K V"], num: int) -> tuple[Float[Array, "B K M"], Int[Array, "B K M"]]:
    """Returns what `jax.lax.top_k` does, with less to sort: the best lie in the blocks with the highest maxima.

    Blocks are in a row, and those chosen stay in order, so that ties go to the lower index here, too. Where the
    vocabulary comes first in memory (`vocabulary_first`), it does so in here.
    """
    size = x.shape[-1]
    divisors = [block for block in range(1, size // num + 1) if size % block == 0]
    block = min(divisors, key=lambda block: size // block + num * block)
    if block == 1:
        best, place = jax.lax.top_k(x, num)
        return best, place
    if vocabulary_first():
        blocks = jnp.moveaxis(x, -1, 0).reshape(size // block, block, *x.shape[:-1])
        highest = jnp.moveaxis(jnp.max(blocks, axis=1), 0, -1)
    else:
        blocks = x.reshape(*x.shape[:-1], size // block, block)
        highest = jnp.max(blocks, axis=-1)
    _, chosen = jax.lax.top_k(highest, num)  # [B, K, num]
    chosen = jnp.sort(chosen, axis=-1)
    if vocabulary_first():
        slots, beams = jnp.arange(x.shape[0])[:, None, None], jnp.arange(x.shape[1])[None, :, None]
        entries = blocks.at[chosen, :, slots, beams].get(mode="clip")  # [B, K, num, block]
    else:
        entries = jnp.take_along_axis(blocks, chosen[..., None], axis=2, mode="clip")  # [B, K, num, block]
    best, place = jax.lax.top_k(entries.reshape(*x.shape[:-1], num * block), num)
    return best, jnp.take_along_axis(chosen, place // block, axis=-1) * block + place % block


def sum_of_exponentials(logits: Float[Array, "B K V"], highest: Float[Array, "B K 1"]) -> Float[Array, "B K 1"]:
    """Returns the sum over V of exp(logits - highest)."""
    if vocabulary_first():
        return jnp.sum(jnp.exp(jnp.moveaxis(logits, -1, 0) - highest[None, ..., 0]), axis=0)[..., None]
    return jnp.sum(jnp.exp(logits - highest), axis=-1, keepdims=True)


def log_probabilities(logits: Float[Array, "B K V"]) -> Float[Array, "B K V"]:
    """Returns what `jax.nn.log_softmax` does, read in the order in which logits lie in memory."""
    if vocabulary_first():
        highest = jnp.max(jnp.moveaxis(logits, -1, 0), axis=0)[..., None]
    else:
        highest = jnp.max(logits, axis=-1, keepdims=True)
    return (logits - highest) - jnp.log(sum_of_exponentials(logits, highest))
