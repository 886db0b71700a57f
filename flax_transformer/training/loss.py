"""Masked, label-smoothed cross entropy, fused with the output projection.

Legend: B batch, T target length, D model dim, V vocabulary rows, X shares of the rows, t target tokens of a chunk.

The product hidden @ kernel.T has B * T * V elements, far more than anything else when V >> D. It is made here in chunks
of target tokens that stay in cache, and the forward pass of a training step already turns each chunk into its
gradients: the loss is one number, so its gradient is known up to a factor before the backward pass begins. Logits are
made once, and no [B, T, V] array ever exists. Tokens that are padding are put behind all others; on a CPU the loop ends
before them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flax_transformer.nn.embedding import OutputProjection
from flax_transformer.nn.quantization import Int8Weights
from flax_transformer.parallel.layout import backend, product_type
from flax_transformer.parallel.rules import constrain, num_shards
from flax_transformer.shapes import MASKED

# Logits held at one time, in elements; 4 bytes each. On a CPU they stay in the cache, and chunks of padding alone are
# left out. An accelerator would wait for the host before each turn of a loop whose length is not known to the compiler,
# and adds the kernel's gradient up in its main memory in each: there chunks are few, and their number is fixed.
CHUNK_ELEMENTS = 1 << 21
ACCELERATOR_CHUNK_ELEMENTS = 1 << 26


class LossSums(NamedTuple):
    """Sums over the target tokens of a batch, to be merged over batches and divided once by `count`.

    Attributes:
        loss: label-smoothed cross entropy, nats.
        negative_log_likelihood: of the reference, nats; exp(sum / count) is the perplexity.
        correct: tokens whose reference has the highest logit.
        count: tokens that are not padding.
    """

    loss: Float[Array, ""]
    negative_log_likelihood: Float[Array, ""]
    correct: Float[Array, ""]
    count: Float[Array, ""]


def cross_entropy(
    hidden: Float[Array, "B T D"],
    projection: OutputProjection,
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    label_smoothing: float,
    divergence_weight: float = 0.0,
) -> LossSums:
    """Returns the loss of predicting `targets` from `hidden`, summed over the positions where `mask` holds.

        loss = -(1 - e) log p(target) - e / V_real * sum over real v of log p(v),      e = label_smoothing

    Padding rows of the vocabulary get no probability and no share of the smoothing. Differentiable by hidden, kernel
    and bias through `loss` alone; the other sums are for reading.

    With a `divergence_weight` rows 2i and 2i + 1 must be two passes over the same targets, by different dropout, and
    predict p and q. What they disagree on is added to the loss, once for each pair of tokens:

        divergence_weight * (KL(p || q) + KL(q || p)) / 2

    Args:
        hidden: the decoder's output.
        projection: map to logits.
        targets: reference ids, each below `projection.num_real_rows`.
        mask: False for padding.
        label_smoothing: e in [0, 1).
        divergence_weight: at least 0; 0 means that rows have nothing to do with each other.

    References:
        Szegedy et al. 2016, section 7; Vaswani et al. 2017, section 5.4. The divergence: Liang et al. 2021, "R-Drop",
        equations 2 to 4 (alpha is `divergence_weight`).
    """
    bias = projection.bias
    if isinstance(projection.kernel, Int8Weights):
        raise TypeError("the loss needs weights that are not quantised: integers have no gradient.")
    static = (projection.num_real_rows, label_smoothing, divergence_weight)
    bias = None if bias is None else bias.astype(jnp.float32)
    if divergence_weight:
        hidden, targets, mask = (_side_by_side(x) for x in (hidden, targets, mask))
    return _fused_sums(static, hidden, projection.kernel, bias, targets, mask)


def _side_by_side(x: jax.Array) -> jax.Array:
    """Returns the tokens of rows 2i and 2i + 1 in turns, as one row: [B, T, ...] -> [B / 2, 2 T, ...]."""
    rows, length, *rest = x.shape
    return jnp.swapaxes(x.reshape(rows // 2, 2, length, *rest), 1, 2).reshape(rows // 2, 2 * length, *rest)


class _Chunks(NamedTuple):
    """The target tokens of a batch for a loop over chunks of them: first those that are not padding, then padding.

    Each share of the rows, of which every device has one (X of them), is ordered by itself, so that no token moves to
    another device.

    Attributes:
        hidden: [X, M, D], M tokens of a share, in whole chunks.
        targets, mask: [X, M].
        places: [X, M], where in its share each token came from.
        size: tokens of a share in a chunk.
        needed: chunks to compute; on a CPU those that hold a token which is not padding, in some share.
    """

    hidden: jax.Array
    targets: jax.Array
    mask: jax.Array
    places: jax.Array
    size: int
    needed: jax.Array | int

    def take(self, number: jax.Array) -> tuple[jax.Array, ...]:
        """Returns hidden, targets and mask of one chunk."""
        cut = (self.hidden, self.targets, self.mask)
        return tuple(jax.lax.dynamic_slice_in_dim(x, number * self.size, self.size, axis=1) for x in cut)


def _chunks(hidden: jax.Array, targets: jax.Array, mask: jax.Array, vocab: int, together: int = 1) -> _Chunks:
    """Returns the tokens of [B, T] in chunks of about so many logits as above, cut at multiples of `together`."""
    on_cpu = backend() == "cpu"
    shares = num_shards("batch")
    shares = shares if targets.shape[0] % shares == 0 else 1
    tokens = targets.size // shares
    most = max((CHUNK_ELEMENTS if on_cpu else ACCELERATOR_CHUNK_ELEMENTS) // (vocab // num_shards("vocab")), 1)
    number = -(-tokens // most)
    size = together * -(-tokens // (number * together))
    mask = constrain(mask.reshape(shares, tokens), "batch", None)
    places = jnp.argsort(~mask, axis=1)  # stable
    places = jnp.pad(places, ((0, 0), (0, number * size - tokens)), constant_values=tokens)  # beyond all: zeros

    def ordered(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [X, M, ...]
        x = x.reshape(shares, tokens, *x.shape[2:])
        taken = jax.vmap(lambda rows, order: rows.at[order].get(mode="fill", fill_value=0))(x, places)
        return constrain(taken, "batch", *(None,) * (taken.ndim - 1))

    needed = jnp.max(-(-jnp.sum(mask, axis=1) // size)) if on_cpu else number
    return _Chunks(ordered(hidden), ordered(targets), ordered(mask), places, size, needed)


def _of_other_pass(x: jax.Array) -> jax.Array:
    """Returns the neighbour's vector for each token, those of 2i and 2i + 1 exchanged: [X t, V] -> [X t, V]."""
    return jnp.flip(x.reshape(len(x) // 2, 2, x.shape[1]), axis=1).reshape(x.shape)


def _flat(x: jax.Array) -> jax.Array:
    """Returns [X, t, ...] as [X t, ...]: with the tokens of all shares in one row, XLA for CPU makes faster loops."""
    return constrain(x.reshape(-1, *x.shape[2:]), "batch", *(None,) * (x.ndim - 2))


def _chunk_terms(static, mean_row, kernel, bias, hidden, targets, mask):
    """Returns the sums of one chunk [X]; exp(logits - highest) [X t, V], and its sum over V [X t, 1].

    With a divergence between two passes that predict p and q from logits y and z, two more follow, else None twice:
    y - z [X t, V], and its mean under p, sum over V of p (y - z), [X t, 1]. In these, divergence and gradient are

        J = (KL(p || q) + KL(q || p)) / 2 = (sum of p (y - z) + sum of q (z - y)) / 2
        dJ / dy = (p (1 + y - z - sum of p (y - z)) - q) / 2

    Args:
        static: number of real rows, label smoothing, weight of the divergence.
        mean_row: [D], mean of the real rows of the kernel.
        kernel: [D, V], its padding columns included.
        bias: [V], or None.
        hidden: [X, t, D].
        targets, mask: [X, t].
    """
    num_real_rows, smoothing, divergence_weight = static
    hidden, targets = _flat(hidden), _flat(targets)
    logits = jnp.einsum("td,dv->tv", hidden, kernel, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + jnp.broadcast_to(bias, logits.shape)
    if num_real_rows < kernel.shape[1]:
        logits = jnp.where(jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) < num_real_rows, logits, MASKED)
    highest = jnp.max(logits, axis=-1, keepdims=True)
    exponentials = jnp.exp(logits - highest)
    total = jnp.sum(exponentials, axis=-1, keepdims=True)
    log_normaliser = (jnp.log(total) + highest)[:, 0]
    target_logit = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    nll = log_normaliser - target_logit
    # The mean of the real logits is linear in hidden: one product with the mean row in place of a pass over V.
    mean_logit = jnp.einsum("td,d->t", hidden.astype(jnp.float32), mean_row)
    mean_logit = mean_logit if bias is None else mean_logit + jnp.mean(bias[:num_real_rows])
    loss = (1.0 - smoothing) * nll + smoothing * (log_normaliser - mean_logit)
    apart = mean_apart = None
    if divergence_weight:
        apart = logits - _of_other_pass(logits)
        mean_apart = jnp.sum(exponentials * apart, axis=-1, keepdims=True) / total
        loss = loss + divergence_weight / 2 * mean_apart[:, 0]  # both tokens of a pair together: J
    correct = (target_logit >= highest[:, 0]).astype(jnp.float32)
    weight = mask.astype(jnp.float32)
    sums = LossSums(
        *(jnp.sum(x.reshape(mask.shape) * weight, axis=1) for x in (loss, nll, correct, jnp.ones_like(nll)))
    )
    return sums, exponentials, total, apart, mean_apart


def _zero_sums(shares: int) -> LossSums:
    return LossSums(*(constrain(jnp.zeros((shares,), jnp.float32), "batch") for _ in LossSums._fields))


def _sum_shares(tree):
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), tree)


def _for_products(static, hidden, kernel):
    """Returns the kernel in the type of `hidden`; the mean of its real rows, in float32; and the kernel as [D, V].

    Both products with logits are made with V as the last axis, or XLA copies the logits transposed for each.
    """
    kernel = constrain(kernel.astype(hidden.dtype), "vocab", None)  # whole rows, once, before the loop
    return kernel, jnp.mean(kernel[: static[0]].astype(jnp.float32), axis=0), constrain(kernel.T, None, "vocab")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused_sums(static, hidden, kernel, bias, targets, mask) -> LossSums:
    kernel, mean_row, columns = _for_products(static, hidden, kernel)
    chunks = _chunks(hidden, targets, mask, kernel.shape[0], 2 if static[2] else 1)

    def body(number, total):
        sums, *_ = _chunk_terms(static, mean_row, columns, bias, *chunks.take(number))
        return jax.tree.map(jnp.add, total, sums)

    return _sum_shares(jax.lax.fori_loop(0, chunks.needed, body, _zero_sums(len(chunks.mask))))


def _forward(static, hidden, kernel, bias, targets, mask):
    """Returns the sums; the gradient of `loss` by hidden, and in float32 by kernel and bias; and the kernel's type."""
    num_real_rows, smoothing, divergence_weight = static
    like_kernel = jnp.zeros((), kernel.dtype)
    kernel, mean_row, columns = _for_products(static, hidden, kernel)
    chunks = _chunks(hidden, targets, mask, kernel.shape[0], 2 if divergence_weight else 1)
    shares = len(chunks.mask)

    def body(number, carry):
        total, column_gradient, bias_gradient, by_hidden = carry
        h, t, m = chunks.take(number)
        sums, exponentials, normaliser, apart, mean_apart = _chunk_terms(static, mean_row, columns, bias, h, t, m)
        weight = _flat(m).astype(jnp.float32)[:, None]
        row = jax.lax.broadcasted_iota(jnp.int32, exponentials.shape, 1)
        wanted = jnp.where(row == _flat(t)[:, None], 1.0 - smoothing, 0.0)
        wanted = wanted + jnp.where(row < num_real_rows, smoothing / num_real_rows, 0.0)
        probabilities = exponentials / normaliser
        by_logits = probabilities - wanted
        if apart is not None and mean_apart is not None:
            by_divergence = probabilities * (1.0 + apart - mean_apart) - _of_other_pass(probabilities)
            by_logits = by_logits + divergence_weight / 2 * by_divergence
        by_logits = by_logits * weight
        if bias_gradient is not None:
            bias_gradient = bias_gradient + jnp.sum(by_logits.reshape(*m.shape, -1), axis=1)
        by_logits = by_logits.astype(h.dtype)  # products run in the compute type, their sums in float32
        by_logits = by_logits.reshape(*m.shape, -1)  # [X t, V] -> [X, t, V]
        by_tokens = jnp.einsum("xtv,vd->xtd", by_logits, kernel, preferred_element_type=product_type(h.dtype))
        by_tokens = by_tokens.astype(h.dtype)
        by_hidden = jax.lax.dynamic_update_slice_in_dim(by_hidden, by_tokens, number * chunks.size, axis=1)
        # Each device sums up its own share; the sum over devices is made once, after the loop.
        by_columns = jnp.einsum("xtd,xtv->xdv", h, by_logits, preferred_element_type=jnp.float32)
        column_gradient = constrain(column_gradient + by_columns, "batch", None, "vocab")
        return jax.tree.map(jnp.add, total, sums), column_gradient, bias_gradient, by_hidden

    start = (
        _zero_sums(shares),
        constrain(jnp.zeros((shares, *columns.shape), jnp.float32), "batch", None, "vocab"),
        None if bias is None else constrain(jnp.zeros((shares, *bias.shape), jnp.float32), "batch", "vocab"),
        jnp.zeros_like(chunks.hidden),  # padding has no gradient
    )
    total, column_gradient, bias_gradient, by_hidden = jax.lax.fori_loop(0, chunks.needed, body, start)
    total, column_gradient, bias_gradient = _sum_shares((total, column_gradient, bias_gradient))
    # Back to where each token came from; what fills up the last chunk came from nowhere.
    tokens = targets.size // shares
    back = jax.vmap(lambda rows, order: jnp.zeros((tokens, rows.shape[1]), rows.dtype).at[order].set(rows, mode="drop"))
    by_hidden = constrain(back(by_hidden, chunks.places), "batch", None, None).reshape(hidden.shape)
    return total, (by_hidden, column_gradient.T, bias_gradient, like_kernel)


def _backward(static, gradients, cotangents: LossSums):
    by_hidden, by_kernel, by_bias, like_kernel = gradients
    scale = cotangents.loss
    return (
        by_hidden * scale.astype(by_hidden.dtype),
        constrain(by_kernel * scale, "vocab", None).astype(like_kernel.dtype),
        None if by_bias is None else by_bias * scale,
        None,
        None,
    )


_fused_sums.defvjp(_forward, _backward)
