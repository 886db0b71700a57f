"""Masked, label-smoothed cross entropy, fused with the output projection.

Legend: B batch, T target length, D model dim, V vocabulary rows.

The product hidden @ kernel.T has B * T * V elements, far more than anything else when V >> D. It is made here in chunks
of positions that stay in cache, and the forward pass of a training step already turns each chunk into its gradients:
the loss is one number, so its gradient is known up to a factor before the backward pass begins. Logits are made once,
and no [B, T, V] array ever exists.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flax_transformer.nn.embedding import OutputProjection
from flax_transformer.parallel.rules import constrain, num_shards

# Logits held at one time, in elements; 4 bytes each.
CHUNK_ELEMENTS = 1 << 21


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
) -> LossSums:
    """Returns the loss of predicting `targets` from `hidden`, summed over the positions where `mask` holds.

        loss = -(1 - e) log p(target) - e / V_real * sum over real v of log p(v),      e = label_smoothing

    Padding rows of the vocabulary get no probability and no share of the smoothing. Differentiable by hidden, kernel
    and bias through `loss` alone; the other sums are for reading.

    Args:
        hidden: the decoder's output.
        projection: map to logits.
        targets: reference ids, each below `projection.num_real_rows`.
        mask: False for padding.
        label_smoothing: e in [0, 1).

    References:
        Szegedy et al. 2016, section 7; Vaswani et al. 2017, section 5.4.
    """
    bias = projection.bias
    bias = jnp.zeros((projection.kernel.shape[0],), jnp.float32) if bias is None else bias
    kernel = constrain(projection.kernel.astype(hidden.dtype), "vocab", None)  # whole rows, once, before the loop
    static = (projection.num_real_rows, label_smoothing)
    return _fused_sums(static, hidden, kernel, bias.astype(jnp.float32), targets, mask)


def _num_chunks(batch: int, length: int, vocab: int) -> int:
    """Returns into how many equal pieces to cut the target length."""
    batch, vocab = batch // num_shards("batch"), vocab // num_shards("vocab")
    for chunks in range(1, length + 1):
        if length % chunks == 0 and batch * (length // chunks) * vocab <= CHUNK_ELEMENTS:
            return chunks
    return length


def _time_chunks(x: jax.Array, chunks: int) -> jax.Array:
    """[B, T, ...] -> [chunks, B, T / chunks, ...]; rows stay whole, since it is rows that are split over devices."""
    return jnp.moveaxis(x.reshape(x.shape[0], chunks, x.shape[1] // chunks, *x.shape[2:]), 1, 0)


def _chunk_terms(static, mean_row, hidden, kernel, bias, targets, mask):
    """Returns the sums of one chunk, its logits [B, t, V] and its log normalisers [B, t]."""
    num_real_rows, smoothing = static
    logits = OutputProjection(kernel, bias, num_real_rows).logits(hidden)  # [B, t, V]
    log_normaliser = jax.nn.logsumexp(logits, axis=-1)
    target_logit = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll = log_normaliser - target_logit
    # The mean of the real logits is linear in hidden: one product with the mean row in place of a pass over V.
    mean_logit = jnp.einsum("btd,d->bt", hidden.astype(jnp.float32), mean_row) + jnp.mean(bias[:num_real_rows])
    loss = (1.0 - smoothing) * nll + smoothing * (log_normaliser - mean_logit)
    correct = target_logit >= jnp.max(logits, axis=-1)
    weight = mask.astype(jnp.float32)
    sums = LossSums(
        jnp.sum(loss * weight),
        jnp.sum(nll * weight),
        jnp.sum(correct.astype(jnp.float32) * weight),
        jnp.sum(weight),
    )
    return sums, logits, log_normaliser


def _zero_sums() -> LossSums:
    return LossSums(*(jnp.zeros((), jnp.float32) for _ in LossSums._fields))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused_sums(static, hidden, kernel, bias, targets, mask) -> LossSums:
    mean_row = jnp.mean(kernel[: static[0]].astype(jnp.float32), axis=0)
    chunks = _num_chunks(targets.shape[0], targets.shape[1], kernel.shape[0])

    def body(total, chunk):
        sums, _, _ = _chunk_terms(static, mean_row, chunk[0], kernel, bias, *chunk[1:])
        return jax.tree.map(jnp.add, total, sums), None

    return jax.lax.scan(body, _zero_sums(), [_time_chunks(x, chunks) for x in (hidden, targets, mask)])[0]


def _forward(static, hidden, kernel, bias, targets, mask):
    """Returns the sums, and the gradient of `loss` by hidden, kernel and bias."""
    num_real_rows, smoothing = static
    mean_row = jnp.mean(kernel[: static[0]].astype(jnp.float32), axis=0)
    chunks = _num_chunks(targets.shape[0], targets.shape[1], kernel.shape[0])

    def body(carry, chunk):
        total, kernel_gradient, bias_gradient = carry
        h, t, m = chunk
        sums, logits, log_normaliser = _chunk_terms(static, mean_row, h, kernel, bias, t, m)
        probabilities = jnp.exp(logits - log_normaliser[..., None])
        row = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
        wanted = jnp.where(row == t[..., None], 1.0 - smoothing, 0.0)
        wanted = wanted + jnp.where(row < num_real_rows, smoothing / num_real_rows, 0.0)
        by_logits = jnp.where(m[..., None], probabilities - wanted, 0.0)
        bias_gradient = bias_gradient + jnp.sum(by_logits, axis=(0, 1))
        by_logits = by_logits.astype(h.dtype)  # products run in the compute type, their sums in float32
        by_hidden = jnp.einsum("btv,vd->btd", by_logits, kernel)
        by_kernel = jnp.einsum("btv,btd->vd", by_logits, h, preferred_element_type=jnp.float32)
        kernel_gradient = constrain(kernel_gradient + by_kernel, "vocab", None)
        return (jax.tree.map(jnp.add, total, sums), kernel_gradient, bias_gradient), by_hidden

    start = (_zero_sums(), jnp.zeros(kernel.shape, jnp.float32), jnp.zeros(bias.shape, jnp.float32))
    xs = [_time_chunks(x, chunks) for x in (hidden, targets, mask)]
    (total, kernel_gradient, bias_gradient), by_hidden = jax.lax.scan(body, start, xs)
    by_hidden = jnp.moveaxis(by_hidden, 0, 1).reshape(hidden.shape)
    return total, (by_hidden, kernel_gradient.astype(kernel.dtype), bias_gradient)


def _backward(static, gradients, cotangents: LossSums):
    by_hidden, by_kernel, by_bias = gradients
    scale = cotangents.loss
    return (
        by_hidden * scale.astype(by_hidden.dtype),
        by_kernel * scale.astype(by_kernel.dtype),
        by_bias * scale,
        None,
        None,
    )


_fused_sums.defvjp(_forward, _backward)
