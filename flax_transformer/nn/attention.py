"""Multi-head attention, and the attention functions that its heads may compute.

Legend: B batch, T query length, S key length, N query heads, M key-value heads, H head dim, D model dim, K beams.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from flax_transformer.nn.linear import Linear
from flax_transformer.ops.attention import Projection, attention_weights, projected_attention
from flax_transformer.ops.attention_mask import AttentionMask
from flax_transformer.ops.cached_attention import (
    CrossAttentionCache,
    SelfAttentionCache,
    cached_cross_attention,
    cached_self_attention,
    cross_attention_cache,
    empty_self_attention_cache,
)


class MultiHeadAttention(nnx.Module):
    """N attention functions in parallel, each on its own projection of queries, keys and values.

    Projections are separate matrices, each Xavier-uniform over (D, N * H). PyTorch draws the three as one (D, 3 N H)
    matrix, so its bound is sqrt(2) smaller. All projections have a bias, as in PyTorch and Marian; the paper's
    equations have none.

    The parts are public because decoding calls them separately. The encoder's output is projected once for each
    sentence (`source_cache`), and each step adds one key and value to a cache.

    Args:
        model_dim: D.
        num_heads: N.
        num_key_value_heads: M, which divides N; N when None.
        head_dim: H; D / N when None.

    Raises:
        ValueError: M does not divide N.

    Example:
        >>> layer = MultiHeadAttention(16, 4, dropout_rate=0.0, param_dtype=jnp.dtype("float32"),
        ...                            compute_dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
        >>> x = jnp.ones((2, 5, 16))
        >>> layer(x, x, AttentionMask(causal=True)).shape
        (2, 5, 16)

    References:
        Vaswani et al. 2017, section 3.2.2; Ainslie et al. 2023, "GQA", for M below N.
    """

    def __init__(
        self,
        model_dim: int,
        num_heads: int,
        *,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        dropout_rate: float,
        param_dtype: jnp.dtype,
        compute_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        if num_key_value_heads is not None and (num_key_value_heads < 1 or num_heads % num_key_value_heads):
            divisors = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
            raise ValueError(
                f"num_key_value_heads ({num_key_value_heads}) must divide num_heads ({num_heads}): one of {divisors}."
            )
        self.dropout_rate = dropout_rate
        head_dim = model_dim // num_heads if head_dim is None else head_dim
        self.num_key_value_heads = num_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = head_dim
        query_shape, key_shape = (num_heads, head_dim), (self.num_key_value_heads, head_dim)
        dtypes = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
        axes = ("embed", "heads", "head_dim")
        self.query = Linear((model_dim,), query_shape, axes, **dtypes, rngs=rngs)
        self.key = Linear((model_dim,), key_shape, axes, **dtypes, rngs=rngs)
        self.value = Linear((model_dim,), key_shape, axes, **dtypes, rngs=rngs)
        self.output = Linear(query_shape, (model_dim,), ("heads", "head_dim", "embed"), **dtypes, rngs=rngs)

    def project_key_value(
        self, encoded: Float[Array, "B S D"]
    ) -> tuple[Float[Array, "B S M H"], Float[Array, "B S M H"]]:
        """Returns the keys and values of `encoded`."""
        return self.key(encoded), self.value(encoded)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        encoded: Float[Array, "B S D"],
        mask: AttentionMask,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns attention from each position of `x` over `encoded`; see `attend` for the arguments."""
        return self.output(self.attend(x, encoded, mask, key))

    def attend(
        self,
        x: Float[Array, "B T D"],
        encoded: Float[Array, "B S D"],
        mask: AttentionMask,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B T N H"]:
        """Returns the heads' results, before the output projection. For self-attention `encoded` is `x` itself.

        Args:
            x: source of the queries.
            encoded: source of the keys and values.
            mask: which keys each query may attend to.
            key: random key of dropout on the weights; None means evaluation.
        """

        def projection(layer: Linear) -> Projection:
            assert layer.bias is not None, "all projections have a bias"
            return layer.kernel.get_value(), layer.bias.get_value()

        return projected_attention(
            x,
            encoded,
            (projection(self.query), projection(self.key), projection(self.value)),
            mask,
            self.query.compute_dtype,
            dropout_rate=self.dropout_rate,
            dropout_key=key,
        )

    def weights(
        self, x: Float[Array, "B T D"], encoded: Float[Array, "B S D"], mask: AttentionMask
    ) -> Float[Array, "B N T S"]:
        """Returns the weights that `attend` multiplies the values by, without dropout."""
        return attention_weights(self.query(x), self.key(encoded), mask)

    def empty_cache(self, num_sentences: int, num_beams: int, length: int) -> SelfAttentionCache:
        """Returns a cache for the keys and values of `length` tokens of each beam."""
        heads, dtype = self.num_key_value_heads, self.query.compute_dtype
        return empty_self_attention_cache(num_sentences, num_beams, heads, length, self.head_dim, dtype)

    def source_cache(self, encoded: Float[Array, "B S D"]) -> CrossAttentionCache:
        """Returns the keys and values of the encoder's output, which all beams of a sentence read."""
        return cross_attention_cache(*self.project_key_value(encoded))


# --- attention functions: what the heads of a layer attend to

# (layer, source of the queries, random key of dropout) -> the heads' results [B, T, N, H], and an auxiliary result.
AttentionFunction = Callable[[MultiHeadAttention, jax.Array, PRNGKeyArray | None], tuple[jax.Array, Any]]


def over_tokens(mask: AttentionMask, encoded: Float[Array, "B S D"] | None = None) -> AttentionFunction:
    """Returns attention over `encoded`, or self-attention if it is None. There is no auxiliary result."""

    def attend(layer: MultiHeadAttention, x: jax.Array, key: PRNGKeyArray | None) -> tuple[jax.Array, None]:
        return layer.attend(x, x if encoded is None else encoded, mask, key), None

    return attend


def over_tokens_with_weights(mask: AttentionMask, encoded: Float[Array, "B S D"] | None = None) -> AttentionFunction:
    """Returns the function of `over_tokens`, with the weights [B, N, T, S] as the auxiliary result."""

    def attend(layer: MultiHeadAttention, x: jax.Array, key: PRNGKeyArray | None) -> tuple[jax.Array, jax.Array]:
        attended, _ = over_tokens(mask, encoded)(layer, x, key)
        return attended, layer.weights(x, x if encoded is None else encoded, mask)

    return attend


def over_history(
    cache: SelfAttentionCache, positions: Int[Array, "B"], ancestors: Int[Array, "B K T"] | None
) -> AttentionFunction:
    """Returns self-attention of a decoding step: each beam's token attends to the beam's history and to itself.

    The auxiliary result is the cache with the token. The arguments are those of `cached_self_attention`.
    """

    def attend(layer: MultiHeadAttention, x: jax.Array, key: PRNGKeyArray | None) -> tuple[jax.Array, Any]:
        assert key is None, "a decoding step has no dropout"
        new_key, new_value = layer.project_key_value(x)
        return cached_self_attention(cache, layer.query(x), new_key, new_value, positions, ancestors)

    return attend


def over_source(cache: CrossAttentionCache, mask: AttentionMask) -> AttentionFunction:
    """Returns cross-attention of a decoding step: each beam's token attends to the source, whose mask is `mask`.

    The auxiliary result is the weights [B, N, K, S].
    """

    def attend(layer: MultiHeadAttention, x: jax.Array, key: PRNGKeyArray | None) -> tuple[jax.Array, jax.Array]:
        assert key is None, "a decoding step has no dropout"
        return cached_cross_attention(cache, layer.query(x), mask)

    return attend
