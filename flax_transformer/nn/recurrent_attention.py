"""Score functions of attention in recurrent models: how well a decoder's state fits each encoder state.

Legend: B batch, K beams (1 in training), S source length, U recurrent units, A attention dim.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from flax_transformer.nn.linear import Linear, xavier_uniform
from flax_transformer.ops.attention import masked_softmax, weighted_sums

AttentionKind = Literal["additive", "dot", "general", "concat"]


@jax.checkpoint  # the backward pass recomputes [B, K, S, A], because storing it costs more
def _additive_scores(
    query: Float[Array, "B K A"], keys: Float[Array, "B S A"], vector: Float[Array, " A"]
) -> Float[Array, "B K S"]:
    inner = jnp.tanh(query[:, :, None, :] + keys[:, None, :, :])
    return jnp.einsum("bksa,a->bks", inner, vector, preferred_element_type=jnp.float32)


class AdditiveAttention(nnx.Module):
    """score(s, h) = v . tanh(W s + U h + b): a one-layer network over the decoder's and the encoder's state.

    Luong's "concat", v . tanh(W [s; h]), is the same function. Luong's W is W and U here, side by side. The two papers
    use different decoder states s (see `models/recurrent_decoder.py`).

    Example:
        >>> float32 = jnp.dtype("float32")
        >>> layer = AdditiveAttention(4, param_dtype=float32, compute_dtype=float32, rngs=nnx.Rngs(0))
        >>> layer.scores(jnp.ones((1, 2, 4)), layer.keys(jnp.ones((1, 5, 4)))).shape
        (1, 2, 5)

    References:
        Bahdanau et al. 2015, appendix A.1.2; Luong et al. 2015, equation 8, "concat".
    """

    def __init__(self, units: int, *, param_dtype: jnp.dtype, compute_dtype: jnp.dtype, rngs: nnx.Rngs):
        self.compute_dtype = compute_dtype
        dtypes = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
        self.query = Linear((units,), (units,), ("recurrent", "mlp"), use_bias=False, **dtypes, rngs=rngs)
        self.key = Linear((units,), (units,), ("recurrent", "mlp"), **dtypes, rngs=rngs)
        vector = xavier_uniform(rngs.params(), (units,), (1,), param_dtype)[:, 0]
        self.vector = nnx.Param(vector, logical_axes=("mlp",))

    def keys(self, states: Float[Array, "B S U"]) -> Float[Array, "B S A"]:
        """Returns the encoder's part of the scores, computed once for each sentence."""
        return self.key(states)

    def scores(self, query: Float[Array, "B K U"], keys: Float[Array, "B S A"]) -> Float[Array, "B K S"]:
        """Returns float32 scores of each decoder state against each encoder state."""
        return _additive_scores(self.query(query), keys, self.vector[...].astype(self.compute_dtype))


class MultiplicativeAttention(nnx.Module):
    """score(s, h) = s . h ("dot"), or s . W h ("general").

    Example:
        >>> float32 = jnp.dtype("float32")
        >>> dtypes = {"param_dtype": float32, "compute_dtype": float32}
        >>> layer = MultiplicativeAttention(2, general=False, **dtypes, rngs=nnx.Rngs(0))
        >>> states = jnp.array([[[1.0, 0.0], [0.0, 2.0]]])
        >>> layer.scores(jnp.array([[[1.0, 1.0]]]), layer.keys(states)).tolist()
        [[[1.0, 2.0]]]

    References:
        Luong et al. 2015, equation 8.
    """

    def __init__(self, units: int, *, general: bool, param_dtype: jnp.dtype, compute_dtype: jnp.dtype, rngs: nnx.Rngs):
        if general:
            dtypes = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
            self.key = Linear((units,), (units,), ("recurrent", "mlp"), use_bias=False, **dtypes, rngs=rngs)
        else:
            self.key = None

    def keys(self, states: Float[Array, "B S U"]) -> Float[Array, "B S A"]:
        """Returns the encoder's part of the scores, computed once for each sentence."""
        return states if self.key is None else self.key(states)

    def scores(self, query: Float[Array, "B K U"], keys: Float[Array, "B S A"]) -> Float[Array, "B K S"]:
        """Returns float32 scores of each decoder state against each encoder state."""
        return jnp.einsum("bka,bsa->bks", query, keys, preferred_element_type=jnp.float32)


def make_attention(
    kind: AttentionKind, units: int, *, param_dtype: jnp.dtype, compute_dtype: jnp.dtype, rngs: nnx.Rngs
) -> AdditiveAttention | MultiplicativeAttention:
    """Returns the score function that `kind` names."""
    dtypes = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
    if kind in ("additive", "concat"):
        return AdditiveAttention(units, **dtypes, rngs=rngs)
    return MultiplicativeAttention(units, general=kind == "general", **dtypes, rngs=rngs)


def attend(
    scores: Float[Array, "B K S"], states: Float[Array, "B S U"], mask: Bool[Array, "B S"]
) -> tuple[Float[Array, "B K U"], Float[Array, "B K S"]]:
    """Returns context vectors and weights.

    A context is the sum of the encoder's states with the softmax of the scores as weights.

    Example:
        >>> states = jnp.array([[[1.0], [3.0], [9.0]]])
        >>> context, weights = attend(jnp.zeros((1, 1, 3)), states, jnp.array([[True, True, False]]))
        >>> context.tolist(), weights.tolist()
        ([[[2.0]]], [[[0.5, 0.5, 0.0]]])

    References:
        Bahdanau et al. 2015, equations 5 and 6.
    """
    weights = masked_softmax(scores, jnp.broadcast_to(mask[:, None, :], scores.shape))
    return weighted_sums(weights, states), weights
