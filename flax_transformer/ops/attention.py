"""Scaled dot-product attention: the mask, the reference form, and the choice of a form.

Legend: B batch, T query length, S key length, N query heads, M key-value heads (N is a multiple of M), H head dim.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from flax_transformer.ops.dropout import dropout
from flax_transformer.ops.product import accumulation_dtype
from flax_transformer.parallel.sharding_rules import constrain
from flax_transformer.shapes import MASKED, array_tree, static_field

# --- the mask


@array_tree
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """Says which keys each query may attend to. A key is allowed if every given part allows it.

    Only the reference form reads the mask as an array, which `materialize` makes. A fused kernel reads the parts:
    lengths, a flag, a window.

    Attributes:
        key_segments: [B, S], 0 for padding, which no query attends to; None if all keys are real.
        query_segments: [B, T]; a query attends to the keys of its own segment. None if a row holds one pair.
        query_offsets: [B], position among the keys of each row's first query; None means zeros.
        causal: whether a query attends to no later position than its own.
        window: number of earlier positions that a query sees, and of later ones if not causal; None for all.
        array: result of `materialize`, if it exists already; see `shared`. It is valid for these parts only: drop it
            when one of them is replaced.
    """

    key_segments: Int[Array, "B S"] | None = None
    query_segments: Int[Array, "B T"] | None = None
    query_offsets: Int[Array, "B"] | None = None
    causal: bool = static_field(default=False)
    window: int | None = static_field(default=None)
    array: Bool[Array, "#B 1 #T S"] | None = None

    def __post_init__(self):
        if self.query_segments is not None and self.key_segments is None:
            raise ValueError("query_segments need key_segments to be compared with; give both.")
        if self.window is not None and self.window < 0:
            raise ValueError(f"window must be at least 0, got {self.window}.")

    @property
    def is_padding_only(self) -> bool:
        """Whether the mask excludes padding alone, so that a kernel may use the rows' lengths instead."""
        return self.query_segments is None and not self.causal and self.window is None

    def shared(self, query_length: int, key_length: int) -> "AttentionMask":
        """Returns the mask with its array, so that all layers read the same one.

        Otherwise a loop over layers or decoding steps would make or carry an array for each layer. If no layer reads
        the array, XLA removes it.
        """
        return dataclasses.replace(self, array=self.materialize(query_length, key_length))

    def materialize(self, query_length: int, key_length: int) -> Bool[Array, "#B 1 #T S"]:
        """Returns True where a query may attend to a key.

        Example: causal self-attention over segments [1, 1, 2, 0].

            1 0 0 0
            1 1 0 0
            0 0 1 0
            0 0 0 0
        """
        if self.array is not None:
            shape = self.array.shape[2:]
            if shape != (1, key_length) and shape != (query_length, key_length):
                raise ValueError(
                    f"a mask that was made for {shape[0]} queries and {shape[1]} keys cannot serve {query_length} and "
                    f"{key_length}; make another by `shared`."
                )
            return self.array
        allowed = jnp.ones((1, 1, 1, key_length), bool)
        if self.query_segments is not None and self.key_segments is not None:
            same = self.query_segments[:, :, None] == self.key_segments[:, None, :]
            allowed = (same & (self.key_segments > 0)[:, None, :])[:, None]
        elif self.key_segments is not None:
            allowed = (self.key_segments > 0)[:, None, None, :]
        if not self.causal and self.window is None:
            return allowed
        near = self._near(jnp.arange(query_length)[:, None], jnp.arange(key_length)[None, :])
        return allowed & (near[None, None] if self.query_offsets is None else near)

    def _near(self, query: Int[Array, "T 1"], key: Int[Array, "1 S"]) -> Bool[Array, "T S"] | Bool[Array, "B 1 T S"]:
        """Returns whether each query position may attend to each key position, by `causal` and `window`."""
        if self.query_offsets is not None:
            query, key = query[None, None] + self.query_offsets[:, None, None, None], key[None, None]
        in_window = True if self.window is None else jnp.abs(query - key) <= self.window
        return (query >= key) & in_window if self.causal else jnp.broadcast_to(in_window, (query - key).shape)


# --- the reference


def scale_query(query: Float[Array, "*rows H"], scale: float | None = None) -> Float[Array, "*rows H"]:
    """Returns queries times `scale`, by default 1 / sqrt(H), in their own dtype."""
    return query * jnp.asarray(query.shape[-1] ** -0.5 if scale is None else scale, query.dtype)


def cap_scores(scores: Float[Array, "..."], soft_cap: float | None) -> Float[Array, "..."]:
    """Returns soft_cap * tanh(scores / soft_cap), between -soft_cap and soft_cap; None caps nothing.

    References:
        Gemma Team 2024, "Gemma 2", section 2 (logit soft-capping).
    """
    return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)


def repeat_heads(x: Float[Array, "..."], num_heads: int, axis: int) -> Float[Array, "..."]:
    """Returns keys or values for every query head: each key-value head in `axis` is repeated for its query heads.

    References:
        Ainslie et al. 2023, "GQA", section 2.2.
    """
    return x if x.shape[axis] == num_heads else jnp.repeat(x, num_heads // x.shape[axis], axis=axis)


@jax.custom_vjp
def masked_softmax(scores: Float[Array, "..."], mask: Bool[Array, "..."]) -> Float[Array, "..."]:
    """Returns the float32 softmax over the last axis of the entries where `mask` holds; others are exactly 0.

    A row without an allowed entry is all zeros, neither uniform nor NaN, in value and in gradient. The gradient needs
    only the result: weights * (cotangent - sum(cotangent * weights)).

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
    return weights, (weights, jnp.zeros((), scores.dtype))  # an array that carries only the dtype


def _masked_softmax_backward(kept, cotangent):
    weights, like_scores = kept
    inner = jnp.sum(cotangent * weights, axis=-1, keepdims=True)
    return (weights * (cotangent - inner)).astype(like_scores.dtype), None


masked_softmax.defvjp(_masked_softmax_forward, _masked_softmax_backward)


def weighted_sums(weights: Float[Array, "B K S"], states: Float[Array, "B S U"]) -> Float[Array, "B K U"]:
    """Returns the weighted sums of the states, one for each row of weights, in the type of the states."""
    sums = jnp.einsum(
        "bks,bsu->bku", weights.astype(states.dtype), states, preferred_element_type=accumulation_dtype(states.dtype)
    )
    return sums.astype(states.dtype)


def attention_weights(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S M H"],
    mask: AttentionMask,
    *,
    bias: Float[Array, "#B #N #T S"] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "B N T S"]:
    """Returns softmax(cap(scale query key^T) + bias) in float32; see `attention` for the arguments."""
    key = repeat_heads(key, query.shape[2], 2)
    scores = jnp.einsum("btnh,bsnh->bnts", scale_query(query, scale), key, preferred_element_type=jnp.float32)
    scores = cap_scores(scores, soft_cap)
    if bias is not None:
        scores = scores + bias.astype(jnp.float32)
    return masked_softmax(scores, mask.materialize(query.shape[1], key.shape[1]))


def reference_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S M H"],
    value: Float[Array, "B S M H"],
    mask: AttentionMask,
    *,
    bias: Float[Array, "#B #N #T S"] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
) -> Float[Array, "B T N H"]:
    """Returns `attention` by the paper's equation; a query that may attend to no key gets zeros."""
    weights = attention_weights(query, key, mask, bias=bias, scale=scale, soft_cap=soft_cap)
    dropped = dropout(weights, dropout_rate, dropout_key).astype(value.dtype)
    value = repeat_heads(value, query.shape[2], 2)
    attended = jnp.einsum("bnts,bsnh->btnh", dropped, value, preferred_element_type=accumulation_dtype(value.dtype))
    return attended.astype(value.dtype)


# --- the choice


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S M H"],
    value: Float[Array, "B S M H"],
    mask: AttentionMask,
    *,
    bias: Float[Array, "#B #N #T S"] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
) -> Float[Array, "B T N H"]:
    """Returns softmax(cap(scale query key^T) + bias) value.

    If a query may attend to no key, its result is finite but unspecified. Nothing may depend on it. Dropout on the
    weights is not in the paper. It is in the paper's code and in PyTorch's layers. The reference is the only form so
    far; a fused kernel would be chosen here.

    Args:
        query: N heads.
        key, value: M heads; each serves N / M neighbouring query heads.
        mask: which keys each query may attend to.
        bias: added to the scores, such as a bias for relative positions.
        scale: factor on the products; 1 / sqrt(H) when None.
        soft_cap: bound on the size of scores, see `cap_scores`; None sets no bound.
        dropout_rate: probability that a weight is dropped.
        dropout_key: random key; None means evaluation.

    References:
        Vaswani et al. 2017, section 3.2.1, equation 1.
    """
    query = constrain(query, "batch", "length", "heads", "head_dim")
    return reference_attention(
        query,
        key,
        value,
        mask,
        bias=bias,
        scale=scale,
        soft_cap=soft_cap,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
    )
