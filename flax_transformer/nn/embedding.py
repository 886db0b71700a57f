"""Token embeddings, and the output projection that may share their table."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from flax_transformer.nn.dropout import dropout
from flax_transformer.nn.positions import LearnedPositions, PositionKind, SinusoidalPositions
from flax_transformer.nn.quantization import Int8Weights, int8_product, looked_up
from flax_transformer.parallel.layout import vocabulary_first
from flax_transformer.parallel.rules import constrain
from flax_transformer.shapes import MASKED

ShareKind = Literal["all", "target_output", "none"]


def padded_rows(vocab_size: int, multiple: int) -> int:
    """Returns the vocabulary size rounded up to a multiple, so that the table divides over devices and lanes."""
    return -(-vocab_size // multiple) * multiple


@jax.custom_vjp
def _rows_of(table: Float[Array, "V D"], rows: Int[Array, "*rows"]) -> Float[Array, "*rows D"]:
    """Returns the `rows` of a table; its gradient is summed in float32, whatever the table's type."""
    return jnp.take(table, rows, axis=0, mode="clip")


def _rows_of_forward(table, rows):
    return _rows_of(table, rows), (table, rows)


def _rows_of_backward(kept, cotangent):
    table, rows = kept
    wide = jax.ShapeDtypeStruct(table.shape, jnp.float32)
    back = jax.linear_transpose(lambda table: jnp.take(table, rows, axis=0, mode="clip"), wide)
    return back(cotangent.astype(jnp.float32))[0].astype(table.dtype), None


_rows_of.defvjp(_rows_of_forward, _rows_of_backward)


class Embedding(nnx.Module):
    """A table of token vectors [V, D], drawn from N(0, 1/D) and multiplied by sqrt(D) when read.

    So a vector that is read has unit variance per channel, as the positions added to it have about, and the same
    table read as an output projection gives logits of unit variance.

    References:
        Vaswani et al. 2017, section 3.4 (the scale; one table shared with the output projection).
    """

    def __init__(self, num_rows: int, dim: int, *, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        self.dim = dim
        table = jax.random.normal(rngs.params(), (num_rows, dim), param_dtype) * jnp.asarray(dim**-0.5, param_dtype)
        self.table = nnx.Param(table, logical_axes=("vocab", "embed"))

    def __call__(self, tokens: Int[Array, "*rows"]) -> Float[Array, "*rows D"]:
        """Returns the scaled vectors of `tokens`, in the table's type, or float32 where that is integers."""
        table = self.table.get_value()
        if isinstance(table, Int8Weights):
            vectors = looked_up(table, tokens)
        else:
            vectors = _rows_of(table, tokens)
        # In two steps, since the partitioner knows no way from the one sharding to the other in one.
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

    A module must not be stored under two names, so a shared table stands under one and is called for all its roles.
    """

    def table(vocab_size: int) -> Embedding:
        return Embedding(padded_rows(vocab_size, vocab_multiple), dim, param_dtype=param_dtype, rngs=rngs)

    target = table(target_vocab_size)
    source = None if share == "all" else table(source_vocab_size)
    output = table(target_vocab_size) if share == "none" else None
    return target, source, output


class InputEmbedding(nnx.Module):
    """Adds positions to token vectors and applies dropout: what enters the first layer of a stack.

    The token table is handed in at each call, since encoder, decoder and output projection may share one. A token that
    is named as `zero_token` has zeros for its vector, whatever the table says.

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


@dataclasses.dataclass(frozen=True)
class OutputProjection:
    """The map from a decoder's hidden vector to logits, given as arrays so that the loss may fuse it.

        logits = hidden @ kernel.T + bias,   padding rows of the vocabulary masked

    Attributes:
        kernel: [V, D], rows as in an embedding table (and often that very table); for inference it may be integers, or
            have one more column, see `with_offset_column`.
        bias: [V], or None.
        num_real_rows: rows from here on are padding of the table and never get probability.
    """

    kernel: Float[Array, "V D"] | Int8Weights
    bias: Float[Array, "V"] | None
    num_real_rows: int

    def logits(self, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Returns float32 logits of `hidden`; they may lie in memory as `vocabulary_first` says."""
        first, offset = vocabulary_first(), self._offset()
        if jax.tree.leaves(self.kernel)[0].shape[1] == hidden.shape[-1] + 1:
            hidden, offset = jnp.concatenate([hidden, jnp.ones((*hidden.shape[:-1], 1), hidden.dtype)], axis=-1), None
        if isinstance(self.kernel, Int8Weights):
            logits = int8_product(hidden, self.kernel, (1,), weights_left=first)
        else:
            sides, contract = (hidden, self.kernel.astype(hidden.dtype)), ((hidden.ndim - 1,), (1,))
            if first:
                sides, contract = sides[::-1], contract[::-1]
            logits = jax.lax.dot_general(*sides, (contract, ((), ())), preferred_element_type=jnp.float32)
        if offset is not None:
            offset = offset.reshape(-1, *(1,) * (hidden.ndim - 1)) if first else offset
            logits = logits + jnp.broadcast_to(offset, logits.shape)
        # Not before all is done: XLA for CPU would write the exponentials anew in the other order.
        return jnp.moveaxis(logits, 0, -1) if first else logits

    def with_offset_column(self) -> "OutputProjection":
        """Returns this map with what is added to the products, if anything, in a column of the kernel, times 1.

        XLA for CPU adds it in passes of its own over all logits (docs/lab_book.md, 2026-11-26). On other backends, and
        for integers, this map itself is returned.
        """
        offset = self._offset()
        if offset is None or isinstance(self.kernel, Int8Weights) or not vocabulary_first():
            return self
        column = offset[:, None].astype(self.kernel.dtype)
        return dataclasses.replace(self, kernel=jnp.concatenate([self.kernel, column], axis=1))

    def with_type(self, dtype: jnp.dtype) -> "OutputProjection":
        """Returns this map with its kernel cast to `dtype`; a kernel of integers stays as it is."""
        if isinstance(self.kernel, Int8Weights) or self.kernel.dtype == dtype:
            return self
        return dataclasses.replace(self, kernel=self.kernel.astype(dtype))

    def _offset(self) -> Float[Array, "V"] | None:
        """Returns what is added to the products: the bias, and for padding MASKED, in which rounding swallows them."""
        num_rows = jax.tree.leaves(self.kernel)[0].shape[0]
        bias = None if self.bias is None else self.bias.astype(jnp.float32)
        if self.num_real_rows == num_rows:
            return bias
        bias = jnp.zeros(num_rows, jnp.float32) if bias is None else bias
        return jnp.where(jnp.arange(num_rows) < self.num_real_rows, bias, MASKED)
