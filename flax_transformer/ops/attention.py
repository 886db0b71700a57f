"""Scaled dot-product attention: the reference form, what fused forms are given, and the choice of a form.

The softmax is computed in two ways. Both subtract the largest score of a row, and both compute in float32.

- All scores of a row at once. So do `masked_softmax` and the kernel for short rows (`short_attention.py`). The
  reference, cached cross-attention and recurrent models use `masked_softmax`.
- Online, one block of keys after another. So do cached self-attention (`cached_attention.py`) and its kernel
  (`decode_attention.py`), the splash kernels of a TPU (`splash_attention.py`), and cuDNN.

Legend: B batch, T query length, S key length, N query heads, M key-value heads (N is a multiple of M), H head dim.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from flax_transformer import backend
from flax_transformer.ops.attention_mask import AttentionMask
from flax_transformer.ops.dropout import dropout, keep_threshold, random_words
from flax_transformer.ops.int8_product import Int8Weights
from flax_transformer.ops.product import accumulation_dtype, add_bias, product
from flax_transformer.ops.splash_attention import splash_attention, splash_serves
from flax_transformer.parallel.sharding_rules import constrain, num_shards
from flax_transformer.shapes import MASKED

# Kernel and bias of the projection to queries, keys or values.
Projection = tuple[Float[Array, "D _ H"] | Int8Weights, Float[Array, "_ H"]]

SHORTEST_FOR_CUDNN = 128  # attention over more tokens is left to cuDNN on a GPU
SHORTEST_FOR_SPLASH = 512  # attention over so many tokens is left to JAX's splash kernels on a TPU

# --- the reference


def score_scale(head_dim: int, scale: float | None = None) -> float:
    """Returns the factor on the products of queries and keys: `scale`, or 1 / sqrt(H) when None."""
    return head_dim**-0.5 if scale is None else scale


def scale_query(query: Float[Array, "*rows H"], scale: float | None = None) -> Float[Array, "*rows H"]:
    """Returns queries times `score_scale`, in their own dtype."""
    return query * jnp.asarray(score_scale(query.shape[-1], scale), query.dtype)


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

    Example:
        >>> masked_softmax(jnp.array([[5.0, 5.0, 9.0]]), jnp.array([[True, True, False]])).tolist()
        [[0.5, 0.5, 0.0]]
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
    """Returns softmax(cap(scale query key^T) + bias) in float32; see `attention` for the arguments.

    Example:
        >>> weights = attention_weights(jnp.zeros((1, 2, 1, 4)), jnp.zeros((1, 2, 1, 4)), AttentionMask(causal=True))
        >>> weights[0, 0].tolist()
        [[1.0, 0.0], [0.5, 0.5]]
    """
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


# --- what the fused forms are given


def _cudnn_mask(mask: AttentionMask, query_length: int, key_length: int) -> dict[str, Any]:
    """Returns the arguments that give cuDNN a mask: none, a flag, or an array with a row for each query.

    cuDNN would also take the lengths of rows. But a mask of padding alone does not say that padding comes last.
    """
    if mask.is_padding_only and mask.key_segments is None:
        return {}
    is_order_alone = mask.key_segments is None and mask.window is None and mask.query_offsets is None
    if is_order_alone and query_length == key_length:
        return {"is_causal": True}
    allowed = mask.materialize(query_length, key_length)
    return {"mask": jnp.broadcast_to(allowed, (*allowed.shape[:2], query_length, key_length))}


def _cudnn_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask, scale: float
) -> jax.Array:
    """Returns attention by cuDNN."""
    told = _cudnn_mask(mask, query.shape[1], key.shape[1])
    return jax.nn.dot_product_attention(query, key, value, **told, scale=scale, implementation="cudnn")


def _segments(mask: AttentionMask, query: jax.Array, key: jax.Array) -> tuple[Int[Array, "B T"], Int[Array, "B S"]]:
    """Returns segments of queries and keys that say together what the mask's own say."""
    keys = jnp.ones(key.shape[:2], jnp.int32) if mask.key_segments is None else mask.key_segments
    if mask.query_segments is not None:
        return mask.query_segments, keys
    return jnp.ones(query.shape[:2], jnp.int32), (keys > 0).astype(jnp.int32)


def _short_attention(
    sources: tuple[tuple[jax.Array, int], ...],
    projections: Any,
    mask: AttentionMask,
    compute_dtype: jnp.dtype,
    dropout_rate: float,
    dropout_key: PRNGKeyArray | None,
) -> jax.Array:
    """Returns attention by the kernel for short rows. Each source has its number of projections.

    Kernels and biases are arrays here: `_suits_short` refuses others.
    """
    from flax_transformer.ops import short_attention

    kernels, vectors = ([pair[i] for pair in projections] for i in range(2))
    batch, heads, head_dim = len(sources[0][0]), *vectors[0].shape
    length, key_length = sources[0][0].shape[1], sources[-1][0].shape[1]
    projected, biases = [], []
    for source, number in sources:
        kernel = jnp.stack(kernels[:number], axis=1)  # [D, P, N, H]
        projected.append(constrain(product(source, kernel, 1, compute_dtype), "batch", "length", None, "heads", None))
        biases.append(jnp.stack(vectors[:number]))
        kernels, vectors = kernels[number:], vectors[number:]
    queries, keys = _segments(mask, sources[0][0], sources[-1][0])
    threshold = 256 if dropout_key is None or dropout_rate == 0.0 else keep_threshold(dropout_rate)
    words = jnp.zeros((batch, heads, 1, 1), jnp.uint32)
    if threshold < 256 and dropout_key is not None:
        words = random_words(dropout_key, (batch, heads, length, key_length))
    settings = short_attention.Settings(mask.causal, score_scale(head_dim), threshold)
    return short_attention.short_attention(settings, tuple(projected), tuple(biases), queries, keys, words)


# --- the choice
#
# `projected_attention` chooses the kernel for short rows, or calls `attention`. That chooses cuDNN, splash kernels or
# the reference. Each function `_suits_...` says what its form takes. A decoding step chooses in `cached_attention.py`.


def _suits_short(
    x: jax.Array, encoded: jax.Array, projections: Any, mask: AttentionMask, compute_dtype: jnp.dtype
) -> bool:
    """Returns whether the kernel for short rows computes this attention."""
    from flax_transformer.ops import short_attention  # Pallas takes time to import; only a GPU needs it

    kernels = [kernel for kernel, _ in projections]
    if mask.window is not None or mask.query_offsets is not None or any(isinstance(k, Int8Weights) for k in kernels):
        return False
    _, heads, head_dim = kernels[0].shape
    divides = x.shape[0] % num_shards("batch") == 0 and heads % num_shards("heads") == 0
    equal = all(kernel.shape == kernels[0].shape for kernel in kernels)
    narrow = compute_dtype.itemsize == 2  # Triton would round float32 for its products
    return narrow and divides and equal and short_attention.serves(x.shape[1], encoded.shape[1], head_dim)


def _suits_cudnn(query: jax.Array, key: jax.Array, value: jax.Array) -> bool:
    """Returns whether cuDNN's attention is used for these sizes (docs/lab_book.md, "Attention by cuDNN")."""
    lengths, head_dim = (query.shape[1], key.shape[1]), query.shape[3]
    sizes_fit = min(lengths) > SHORTEST_FOR_CUDNN and all(n % 8 == 0 for n in (*lengths, head_dim)) and head_dim <= 128
    narrow = query.dtype == key.dtype == value.dtype and query.dtype.itemsize == 2
    return sizes_fit and narrow and cudnn_is_there()


@functools.cache
def cudnn_is_there() -> bool:
    """Returns whether JAX finds cuDNN. It looks for it while attention is traced."""
    query = jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.bfloat16)
    try:
        jax.eval_shape(lambda x: jax.nn.dot_product_attention(x, x, x, implementation="cudnn"), query)
    except RuntimeError:
        return False
    return True


def _suits_splash(query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask) -> bool:
    """Returns whether splash kernels are used (docs/lab_book.md, "Attention over long rows on a TPU")."""
    narrow = query.dtype == key.dtype == value.dtype and query.dtype.itemsize == 2
    is_long = min(query.shape[1], key.shape[1]) >= SHORTEST_FOR_SPLASH
    simple = mask.window is None and mask.query_offsets is None
    return narrow and is_long and simple and splash_serves(query.shape, key.shape)


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
    weights is not in the paper. It is in the paper's code and in PyTorch's layers.

    Long rows of 16-bit numbers without dropout, bias and cap have fused kernels: cuDNN's on a GPU, and JAX's splash
    kernels on a TPU. Elsewhere the reference runs.

    Args:
        query: N heads.
        key, value: M heads; each serves N / M neighbouring query heads.
        mask: which keys each query may attend to.
        bias: added to the scores, such as a bias for relative positions.
        scale: factor on the products; 1 / sqrt(H) when None.
        soft_cap: bound on the size of scores, see `cap_scores`; None sets no bound.
        dropout_rate: probability that a weight is dropped.
        dropout_key: random key; None means evaluation.

    Example:
        >>> key = jnp.array([[[[1.0]], [[1.0]], [[9.0]]]])  # [B, S, M, H]
        >>> value = jnp.array([[[[2.0]], [[4.0]], [[7.0]]]])
        >>> attention(jnp.ones((1, 1, 1, 1)), key, value, AttentionMask(key_segments=jnp.array([[1, 1, 0]]))).tolist()
        [[[[3.0]]]]

    References:
        Vaswani et al. 2017, section 3.2.1, equation 1.
    """
    query = constrain(query, "batch", "length", "heads", "head_dim")

    def plain(query, key, value, mask, bias, dropout_key):
        options: Any = {"scale": scale, "soft_cap": soft_cap, "dropout_rate": dropout_rate}
        return reference_attention(query, key, value, mask, bias=bias, dropout_key=dropout_key, **options)

    def cudnn(query, key, value, mask, bias, dropout_key):
        return _cudnn_attention(query, key, value, mask, score_scale(query.shape[3], scale))

    def splash(query, key, value, mask, bias, dropout_key):
        return splash_attention(scale_query(query, scale), key, value, *_segments(mask, query, key), causal=mask.causal)

    # The program of a GPU or TPU may also be run elsewhere, in tests.
    arguments = (query, key, value, mask, bias, dropout_key)
    is_plain = bias is None and soft_cap is None and (dropout_key is None or dropout_rate == 0.0)
    if is_plain and backend.uses_kernels("gpu") and _suits_cudnn(query, key, value):
        return jax.lax.platform_dependent(*arguments, cuda=cudnn, default=plain)
    if is_plain and backend.uses_kernels("tpu") and _suits_splash(query, key, value, mask):
        return jax.lax.platform_dependent(*arguments, tpu=splash, default=plain)
    return plain(*arguments)


def projected_attention(
    x: Float[Array, "B T D"],
    encoded: Float[Array, "B S D"],
    projections: tuple[Projection, Projection, Projection],
    mask: AttentionMask,
    compute_dtype: jnp.dtype,
    *,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
) -> Float[Array, "B T N H"]:
    """Returns `attention` from each position of `x` over `encoded`, after their projections.

    On a GPU short rows are computed by one kernel (see `short_attention.py`), which adds the biases as it reads. The
    projections of one array are one product there.

    Args:
        x: source of the queries.
        encoded: source of the keys and values. For self-attention it is the same array as `x`.
        projections: kernel and bias of queries, keys and values.
        mask: which keys each query may attend to.
        compute_dtype: dtype of the products.
        dropout_rate, dropout_key: as for `attention`.
    """

    def plain(x, encoded, projections, dropout_key):
        sources = (x, encoded, encoded)
        query, key, value = (
            add_bias(product(source, kernel, 1, compute_dtype), bias)
            for source, (kernel, bias) in zip(sources, projections, strict=True)
        )
        return attention(query, key, value, mask, dropout_rate=dropout_rate, dropout_key=dropout_key)

    def fused(x, encoded, projections, dropout_key):
        sources = ((x, 3),) if itself else ((x, 1), (encoded, 2))
        return _short_attention(sources, projections, mask, compute_dtype, dropout_rate, dropout_key)

    itself = encoded is x
    arguments = (x, encoded, projections, dropout_key)
    if not backend.uses_kernels("gpu") or not _suits_short(x, encoded, projections, mask, compute_dtype):
        return plain(x, encoded, projections, dropout_key)
    # The program of a GPU may also be run elsewhere, in tests.
    return jax.lax.platform_dependent(*arguments, cuda=fused, default=plain)
