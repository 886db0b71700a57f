"""Multi-head attention.

Legend: B batch, T query length, S key length, N query heads, M key-value heads, H head dim, D model dim.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from flax_transformer.nn.linear import Linear
from flax_transformer.ops.attention import Projection, attention_weights, projected_attention
from flax_transformer.ops.attention_mask import AttentionMask


class MultiHeadAttention(nnx.Module):
    """N attention functions in parallel, each on its own projection of queries, keys and values.

    Projections are separate matrices, each Xavier-uniform over (D, N * H). PyTorch draws the three as one (D, 3 N H)
    matrix, so its bound is sqrt(2) smaller. All projections have a bias, as in PyTorch and Marian; the paper's
    equations have none.

    The parts are public because decoding calls them separately. The encoder's output is projected once for each
    sentence (`project_key_value`), and each step adds one key and value to a cache.

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
        query_shape = (num_heads, head_dim)
        key_shape = (num_heads if num_key_value_heads is None else num_key_value_heads, head_dim)
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
