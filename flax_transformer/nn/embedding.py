"""Token embeddings, and the input of the first layer of a stack."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from flax_transformer.nn.positions import LearnedPositions, PositionKind, SinusoidalPositions
from flax_transformer.ops.dropout import dropout
from flax_transformer.ops.vocabulary import take_rows
from flax_transformer.parallel.sharding_rules import constrain

ShareKind = Literal["all", "target_output", "none"]


def round_up(size: int, multiple: int) -> int:
    """Returns a size rounded up to a multiple, so that a vocabulary divides over devices and vector lanes."""
    return -(-size // multiple) * multiple


class Embedding(nnx.Module):
    """A table of token vectors [V, D], drawn from N(0, 1/D) and multiplied by sqrt(D) when read.

    So each channel of a vector that is read has variance 1. Sinusoidal positions have a similar variance. As an output
    projection the same table gives logits of variance 1.

    Example:
        >>> table = Embedding(10, 4, param_dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
        >>> table(jnp.array([[3, 1, 3]])).shape
        (1, 3, 4)

    References:
        Vaswani et al. 2017, section 3.4 (the scale; one table shared with the output projection).
    """

    def __init__(self, num_rows: int, dim: int, *, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        self.dim = dim
        table = jax.random.normal(rngs.params(), (num_rows, dim), param_dtype) * jnp.asarray(dim**-0.5, param_dtype)
        self.table = nnx.Param(table, logical_axes=("vocab", "embed"), int8_axes=(1,))  # a scale for each token

    def __call__(self, tokens: Int[Array, "*rows"]) -> Float[Array, "*rows D"]:
        """Returns the scaled vectors of `tokens`, in the table's type, or in float32 if the table holds integers."""
        vectors = take_rows(self.table.get_value(), tokens)
        # The partitioner cannot change the sharding in one step.
        vectors = constrain(vectors, "lookup_batch", "length", "embed")
        vectors = constrain(vectors, "batch", "length", "activation_embed")
        return vectors * jnp.asarray(self.dim**0.5, vectors.dtype)


def make_embeddings(
    share: ShareKind,
    source_vocab_size: int,
    target_vocab_size: int,
    dim: int,
    *,
    vocab_multiple: int,
    param_dtype: jnp.dtype,
    rngs: nnx.Rngs,
) -> tuple[Embedding, Embedding | None, Embedding | None]:
    """Returns the tables for target, source and output; None for a role that shares the target's table.

    A module must not be stored under two names. So a shared table is stored once and called for all its roles.
    """

    def table(vocab_size: int) -> Embedding:
        return Embedding(round_up(vocab_size, vocab_multiple), dim, param_dtype=param_dtype, rngs=rngs)

    target = table(target_vocab_size)
    source = None if share == "all" else table(source_vocab_size)
    output = table(target_vocab_size) if share == "none" else None
    return target, source, output


class InputEmbedding(nnx.Module):
    """The input of the first layer of a stack: token vectors plus positions, after dropout.

    The token table is an argument of each call, since encoder, decoder and output projection may share one. The vector
    of `zero_token` is zeros, whatever the table contains.

    Example:
        >>> float32 = jnp.dtype("float32")
        >>> table = Embedding(10, 4, param_dtype=float32, rngs=nnx.Rngs(0))
        >>> inputs = InputEmbedding("sinusoidal", 16, 4, dropout_rate=0.1, param_dtype=float32, compute_dtype=float32,
        ...                         rngs=nnx.Rngs(0))
        >>> inputs(table, jnp.array([[3, 1, 3]]), jnp.array([[0, 1, 2]])).shape
        (1, 3, 4)

    References:
        Vaswani et al. 2017, sections 3.4, 3.5 and 5.4.
    """

    def __init__(
        self,
        positions: PositionKind,
        max_length: int,
        dim: int,
        *,
        dropout_rate: float,
        param_dtype: jnp.dtype,
        compute_dtype: jnp.dtype,
        zero_token: int | None = None,
        rngs: nnx.Rngs,
    ):
        self.dropout_rate = dropout_rate
        self.compute_dtype = compute_dtype
        self.zero_token = zero_token
        if positions == "sinusoidal":
            self.positions = SinusoidalPositions(max_length, dim)
        else:
            self.positions = LearnedPositions(max_length, dim, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self,
        embedding: Embedding,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        key: jax.Array | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns token vectors plus positions, after dropout, in `compute_dtype`."""
        vectors = embedding(tokens).astype(jnp.float32)
        if self.zero_token is not None:
            vectors = jnp.where((tokens == self.zero_token)[..., None], 0.0, vectors)
        vectors = vectors + self.positions(positions).astype(jnp.float32)
        vectors = constrain(vectors.astype(self.compute_dtype), "batch", "length", "activation_embed")
        return dropout(vectors, self.dropout_rate, key)
