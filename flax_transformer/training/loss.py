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
from flax_transformer.nn.quantization import Int8Weights
from flax_transformer.parallel.rules import constrain, num_shards
from flax_transformer.shapes import MASKED

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
    if isinstance(projection.kernel, Int8Weights):
        raise TypeError("the loss needs weights that are not quantised: integers have no gradient.")
    kernel = constrain(projection.kernel.astype(hidden.dtype), "vocab", None)  # whole rows, once, before the loop
    static = (projection.num_real_rows, label_smoothing)
    bias = None if bias is None else bias.astype(jnp.float32)
    return _fused_sums(static, hidden, kernel, bias, targets, mask)


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
    """Returns the sums of one chunk; exp(logits - highest) [B, t, V], and its sum over V [B, t, 1].

    Args:
        static: number of real rows, label smoothing.
        mean_row: [D], mean of the real rows of the kernel.
        hidden: [B, t, D].
        kernel: [D, V], its padding columns included.
        bias: [V], or None.
        targets, mask: [B, t].
    """
    num_real_rows, smoothing = static
    logits = jnp.einsum("btd,dv->btv", hidden, kernel, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + jnp.broadcast_to(bias, logits.shape)
    if num_real_rows < kernel.shape[1]:
        logits = jnp.where(jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) < num_real_rows, logits, MASKED)
    highest = jnp.max(logits, axis=-1, keepdims=True)
    exponentials = jnp.exp(logits - highest)
    total = jnp.sum(exponentials, axis=-1, keepdims=True)
    log_normaliser = (jnp.log(total) + highest)[..., 0]
    target_logit = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll = log_normaliser - target_logit
    # The mean of the real logits is linear in hidden: one product with the mean row in place of a pass over V.
    mean_logit = jnp.einsum("btd,d->bt", hidden.astype(jnp.float32), mean_row)
    mean_logit = mean_logit if bias is None else mean_logit + jnp.mean(bias[:num_real_rows])
    loss = (1.0 - smoothing) * nll + smoothing * (log_normaliser - mean_logit)
    correct = target_logit >= highest[..., 0]
    weight = mask.astype(jnp.float32)
    sums = LossSums(
        jnp.sum(loss * weight),
        jnp.sum(nll * weight),
        jnp.sum(correct.astype(jnp.float32) * weight),
        jnp.sum(weight),
    )
    return sums, exponentials, total


def _zero_sums() -> LossSums:
    return LossSums(*(jnp.zeros((), jnp.float32) for _ in LossSums._fields))


def _chunked(static, hidden, kernel, targets, mask):
    """Returns what a scan over chunks needs: mean row, kernel [D, V], and the chunks."""
    mean_row = jnp.mean(kernel[: static[0]].astype(jnp.float32), axis=0)
    chunks = _num_chunks(targets.shape[0], targets.shape[1], kernel.shape[0])
    # Both products with logits are made with V as the last axis, or XLA copies [B, t, V] transposed for each.
    return mean_row, constrain(kernel.T, None, "vocab"), [_time_chunks(x, chunks) for x in (hidden, targets, mask)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused_sums(static, hidden, kernel, bias, targets, mask) -> LossSums:
    mean_row, columns, chunks = _chunked(static, hidden, kernel, targets, mask)

    def body(total, chunk):
        sums, _, _ = _chunk_terms(static, mean_row, chunk[0], columns, bias, *chunk[1:])
        return jax.tree.map(jnp.add, total, sums), None

    return jax.lax.scan(body, _zero_sums(), chunks)[0]


def _forward(static, hidden, kernel, bias, targets, mask):
    """Returns the sums, and the gradient of `loss` by hidden, kernel and bias."""
    num_real_rows, smoothing = static
    mean_row, columns, chunks = _chunked(static, hidden, kernel, targets, mask)

    def body(carry, chunk):
        total, column_gradient, bias_gradient = carry
        h, t, m = chunk
        sums, exponentials, normaliser = _chunk_terms(static, mean_row, h, columns, bias, t, m)
        weight = m.astype(jnp.float32)[..., None]
        row = jax.lax.broadcasted_iota(jnp.int32, exponentials.shape, 2)
        wanted = jnp.where(row == t[..., None], 1.0 - smoothing, 0.0)
        wanted = wanted + jnp.where(row < num_real_rows, smoothing / num_real_rows, 0.0)
        by_logits = exponentials * (weight / normaliser) - wanted * weight
        if bias_gradient is not None:
            bias_gradient = bias_gradient + jnp.sum(by_logits, axis=(0, 1))
        by_logits = by_logits.astype(h.dtype)  # products run in the compute type, their sums in float32
        by_hidden = jnp.einsum("btv,vd->btd", by_logits, kernel)
        by_columns = jnp.einsum("btd,btv->dv", h, by_logits, preferred_element_type=jnp.float32)
        column_gradient = constrain(column_gradient + by_columns, None, "vocab")
        return (jax.tree.map(jnp.add, total, sums), column_gradient, bias_gradient), by_hidden

    bias_start = None if bias is None else jnp.zeros(bias.shape, jnp.float32)
    start = (_zero_sums(), jnp.zeros(columns.shape, jnp.float32), bias_start)
    (total, column_gradient, bias_gradient), by_hidden = jax.lax.scan(body, start, chunks)
    by_hidden = jnp.moveaxis(by_hidden, 0, 1).reshape(hidden.shape)
    return total, (by_hidden, column_gradient.T.astype(kernel.dtype), bias_gradient)


def _backward(static, gradients, cotangents: LossSums):
    by_hidden, by_kernel, by_bias = gradients
    scale = cotangents.loss
    return (
        by_hidden * scale.astype(by_hidden.dtype),
        by_kernel * scale.astype(by_kernel.dtype),
        None if by_bias is None else by_bias * scale,
        None,
        None,
    )


_fused_sums.defvjp(_forward, _backward)
