"""Scaled dot-product attention and multi-head attention.

Legend: B batch, T query length, S key length, N heads, H head dim, D model dim (here D need not be N * H).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from flax_transformer.nn.dropout import dropout
from flax_transformer.nn.linear import Linear
from flax_transformer.parallel.layout import product_type
from flax_transformer.parallel.rules import constrain
from flax_transformer.shapes import MASKED


@jax.custom_vjp
def masked_softmax(scores: Float[Array, "..."], mask: Bool[Array, "..."]) -> Float[Array, "..."]:
    """Returns the float32 softmax over the last axis of the entries where `mask` holds; others are exactly 0.

    A row in which no entry may be attended to is all zeros, not uniform and not NaN, in value and in gradient. The
    gradient needs nothing but the result: weights * (cotangent - sum(cotangent * weights)).

    Args:
        scores: [..., S].
        mask: broadcastable to `scores`.
    """
    mask = jnp.broadcast_to(mask, scores.shape)
    scores = jnp.where(mask, scores.astype(jnp.float32), MASKED)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    exponentials = jnp.where(mask, jnp.exp(scores - highest), 0.0)
    total = jnp.sum(exponentials, axis=-1, keepdims=True)
    return exponentials / jnp.where(total == 0.0, 1.0, total)


def _masked_softmax_forward(scores, mask):
    weights = masked_softmax(scores, mask)
    return weights, (weights, jnp.zeros((), scores.dtype))


def _masked_softmax_backward(kept, cotangent):
    weights, like_scores = kept
    inner = jnp.sum(cotangent * weights, axis=-1, keepdims=True)
    return (weights * (cotangent - inner)).astype(like_scores.dtype), None


masked_softmax.defvjp(_masked_softmax_forward, _masked_softmax_backward)


def dot_product_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    mask: Bool[Array, "#B #N #T S"],
    *,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T S"]]:
    """Returns softmax(query key^T / sqrt(H)) value, and the weights before dropout in float32.

    A query that may attend to nothing gets zeros. Dropout on the weights is not in the paper; it is in its code and in
    PyTorch's layers.

    References:
        Vaswani et al. 2017, section 3.2.1, equation 1.
    """
    scale = jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    scores = jnp.einsum("btnh,bsnh->bnts", query * scale, key, preferred_element_type=jnp.float32)
    weights = masked_softmax(scores, mask)
    dropped = dropout(weights, dropout_rate, dropout_key).astype(value.dtype)
    attended = jnp.einsum("bnts,bsnh->btnh", dropped, value, preferred_element_type=product_type(value.dtype))
    return attended.astype(value.dtype), weights


class MultiHeadAttention(nnx.Module):
    """N attention functions in parallel, each on its own projection of queries, keys and values.

    Projections are separate matrices, each Xavier-uniform over (D, N * H); PyTorch draws the three as one (D, 3 N H)
    matrix, which makes its bound sqrt(2) smaller. All projections have a bias, as in PyTorch and Marian; the paper's
    equations have none.

    The parts are public because decoding needs them one by one: keys and values of the encoder's output are projected
    once a sentence (`project_key_value`), and each step adds one key and value to a cache.

    Example:
        >>> attention = MultiHeadAttention(16, 4, dropout_rate=0.0, param_dtype=jnp.dtype("float32"),
        ...                                compute_dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
        >>> x = jnp.ones((2, 5, 16))
        >>> attention(x, x, jnp.ones((1, 1, 5, 5), bool)).shape
        (2, 5, 16)

    References:
        Vaswani et al. 2017, section 3.2.2.
    """

    def __init__(
        self,
        model_dim: int,
        num_heads: int,
        *,
        dropout_rate: float,
        param_dtype: jnp.dtype,
        compute_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.dropout_rate = dropout_rate
        head_shape = (num_heads, model_dim // num_heads)
        dtypes = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
        axes = ("embed", "heads", "head_dim")
        self.query = Linear((model_dim,), head_shape, axes, **dtypes, rngs=rngs)
        self.key = Linear((model_dim,), head_shape, axes, **dtypes, rngs=rngs)
        self.value = Linear((model_dim,), head_shape, axes, **dtypes, rngs=rngs)
        self.output = Linear(head_shape, (model_dim,), ("heads", "head_dim", "embed"), **dtypes, rngs=rngs)

    def project_key_value(
        self, memory: Float[Array, "B S D"]
    ) -> tuple[Float[Array, "B S N H"], Float[Array, "B S N H"]]:
        """Returns the keys and values of `memory`."""
        return self.key(memory), self.value(memory)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        memory: Float[Array, "B S D"],
        mask: Bool[Array, "#B #N #T S"],
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns attention from each position of `x` over `memory` (self-attention when they are the same).

        Args:
            x: where queries come from.
            memory: where keys and values come from.
            mask: True where a query may attend to a key.
            key: for dropout on the weights; None means evaluation.
        """
        keys, values = self.project_key_value(memory)
        queries = constrain(self.query(x), "batch", "length", "heads", "head_dim")
        attended, _ = dot_product_attention(
            queries, keys, values, mask, dropout_rate=self.dropout_rate, dropout_key=key
        )
        return self.output(attended)
