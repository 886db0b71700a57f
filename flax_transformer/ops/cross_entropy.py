"""Masked, label-smoothed cross entropy, from hidden vectors and the output projection.

The logits hidden @ kernel.T have B * T * V elements. That is far more than any other array has when V >> D. The fused
form computes them in blocks of target tokens, so no [B, T, V] array ever exists. The loss is one number, so its
gradient is known up to a factor. The forward pass therefore computes each block's gradient at once, and logits are
computed only once. On a CPU padding is sorted behind all other tokens, and the loop ends before the padding.

An accelerator is bound by the memory traffic of the logits. There the logits of a training step have the compute type.
One pass over a block finds the highest logit and the sum of exponentials, and a second one writes the gradient.

The tests compare both forms with each other, so they share a file.

Legend: B batch, T target length, D model dim, V vocabulary rows, X shares of the rows, t target tokens of a block.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flax_transformer import backend
from flax_transformer.ops.int8_product import Int8Weights
from flax_transformer.ops.product import accumulation_dtype
from flax_transformer.ops.vocabulary import OutputProjection
from flax_transformer.parallel.sharding_rules import constrain, num_shards
from flax_transformer.shapes import MASKED

# Elements of the logits of one block. On a CPU a block stays in the cache, and blocks of padding alone are skipped.
# A GPU asks the host before each turn of a loop of unknown length. Each turn also updates the kernel's gradient in
# device memory. So an accelerator gets few blocks, and their number is fixed.
CPU_BLOCK_BYTES = 1 << 23
ACCELERATOR_BLOCK_BYTES = 1 << 28


class LossSums(NamedTuple):
    """Sums over the target tokens of a batch. Add them over batches, then divide once by `count`.

    Attributes:
        loss: label-smoothed cross entropy, nats.
        negative_log_likelihood: cross entropy without smoothing, nats; exp(sum / count) is the perplexity.
        correct: tokens whose reference has the highest logit, or one that equals it. In a training step in bfloat16
            more logits are equal.
        count: tokens that are not padding.

    Example:
        >>> first, second = LossSums(6.0, 5.0, 1.0, 2.0), LossSums(2.0, 1.0, 2.0, 2.0)
        >>> total = jax.tree.map(lambda a, b: a + b, first, second)
        >>> total.loss / total.count
        2.0
    """

    loss: Float[Array, ""]
    negative_log_likelihood: Float[Array, ""]
    correct: Float[Array, ""]
    count: Float[Array, ""]


# --- the reference


def reference_cross_entropy(
    hidden: Float[Array, "B T D"],
    projection: OutputProjection,
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    label_smoothing: float,
    divergence_weight: float = 0.0,
) -> LossSums:
    """Returns `cross_entropy` in its plain form: all logits at once, differentiated by JAX."""
    logits = projection.logits(hidden)
    log_probs = jax.nn.log_softmax(logits)
    of_target = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    smooth = jnp.mean(log_probs[..., : projection.num_real_rows], axis=-1)
    loss = -(1.0 - label_smoothing) * of_target - label_smoothing * smooth
    if divergence_weight:
        loss = loss + divergence_weight / 2 * _reference_divergence(log_probs[..., : projection.num_real_rows])
    target_logit = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    correct = target_logit >= jnp.max(logits, axis=-1)

    def total(terms: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(mask, terms.astype(jnp.float32), 0.0))

    return LossSums(total(loss), total(-of_target), total(correct), total(jnp.ones_like(loss)))


def _reference_divergence(log_probs: Float[Array, "B T V"]) -> Float[Array, "B T"]:
    """Returns KL(p || q) for each token, where q is the prediction of the other pass over the same row."""
    pairs = log_probs.reshape(-1, 2, *log_probs.shape[1:])
    other = jnp.flip(pairs, axis=1).reshape(log_probs.shape)
    return jnp.sum(jnp.exp(log_probs) * (log_probs - other), axis=-1)


# --- the choice


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

    Padding rows of the vocabulary get no probability and no share of the smoothing. `loss` alone is differentiable, by
    hidden, kernel and bias. The other sums have no gradient.

    With a `divergence_weight`, rows 2i and 2i + 1 must be two passes over the same targets with different dropout. They
    predict p and q. Their divergence is added to the loss, once for each pair of tokens:

        divergence_weight * (KL(p || q) + KL(q || p)) / 2

    Args:
        hidden: the decoder's output.
        projection: map to logits.
        targets: reference ids, each below `projection.num_real_rows`.
        mask: False for padding.
        label_smoothing: e in [0, 1).
        divergence_weight: at least 0; with 0 rows are independent.

    Raises:
        TypeError: the projection holds integers, which have no gradient.

    Example:
        >>> projection = OutputProjection(jnp.eye(2), bias=None, num_real_rows=2)
        >>> hidden, targets, mask = jnp.zeros((1, 3, 2)), jnp.zeros((1, 3), int), jnp.array([[True, True, False]])
        >>> sums = cross_entropy(hidden, projection, targets, mask, label_smoothing=0.0)
        >>> round(float(sums.loss / sums.count), 4)  # log 2
        0.6931

    References:
        Szegedy et al. 2016, section 7; Vaswani et al. 2017, section 5.4. The divergence: Liang et al. 2021, "R-Drop",
        equations 2 to 4 (alpha is `divergence_weight`).
    """
    if isinstance(projection.kernel, Int8Weights):
        raise TypeError("the loss needs weights that are not quantised: integers have no gradient.")
    platform = backend.platform()
    if platform is None:
        return reference_cross_entropy(hidden, projection, targets, mask, label_smoothing, divergence_weight)
    on_cpu = platform == "cpu"
    blocking = Blocking(CPU_BLOCK_BYTES if on_cpu else ACCELERATOR_BLOCK_BYTES, on_cpu, not on_cpu)
    terms = LossTerms(projection.num_real_rows, label_smoothing, divergence_weight)
    return fused_cross_entropy(hidden, projection, targets, mask, terms, blocking)


# --- the fused form


@dataclasses.dataclass(frozen=True)
class LossTerms:
    """The constants of the loss; see `cross_entropy`.

    Attributes:
        num_real_rows: rows of the vocabulary that are not padding.
        label_smoothing: in [0, 1).
        divergence_weight: at least 0.
    """

    num_real_rows: int
    label_smoothing: float
    divergence_weight: float


@dataclasses.dataclass(frozen=True)
class Blocking:
    """How the logits are computed block by block.

    On a CPU the loop ends before the blocks that hold only padding, and the kernel is read as [D, V]. Elsewhere XLA
    multiplies either order, and passes over the logits count (docs/lab_book.md, "Loss in two passes over its logits").

    Attributes:
        num_bytes: most bytes of the logits of one block.
        for_cpu: which of the two forms.
        narrow: whether the logits of a training step have the type of `hidden`, in place of float32. Sums over them are
            float32 all the same.
    """

    num_bytes: int
    for_cpu: bool
    narrow: bool

    def logits_dtype(self, hidden: jax.Array) -> jnp.dtype:
        """Returns the type of the logits."""
        return hidden.dtype if self.narrow else jnp.dtype(jnp.float32)

    @property
    def kernel_axes(self) -> str:
        """The order of the kernel's axes in products with logits."""
        return "dv" if self.for_cpu else "vd"

    def constrain_kernel(self, kernel: jax.Array, *leading: str) -> jax.Array:
        """Returns a kernel in that order, or a stack of them, with its vocabulary split over devices."""
        return constrain(kernel, *leading, *("vocab" if axis == "v" else None for axis in self.kernel_axes))


def fused_cross_entropy(
    hidden: Float[Array, "B T D"],
    projection: OutputProjection,
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    terms: LossTerms,
    blocking: Blocking,
) -> LossSums:
    """Returns the sums of `cross_entropy`, computed in blocks; see `LossTerms` and `Blocking`."""
    bias = None if projection.bias is None else projection.bias.astype(jnp.float32)
    if terms.divergence_weight:
        hidden, targets, mask = (_side_by_side(x) for x in (hidden, targets, mask))
    return _fused_sums((terms, blocking), hidden, projection.kernel, bias, targets, mask)


def _side_by_side(x: jax.Array) -> jax.Array:
    """Returns rows 2i and 2i + 1 interleaved token by token: [B, T, ...] -> [B / 2, 2 T, ...]."""
    rows, length, *rest = x.shape
    return jnp.swapaxes(x.reshape(rows // 2, 2, length, *rest), 1, 2).reshape(rows // 2, 2 * length, *rest)


class _Blocks(NamedTuple):
    """The target tokens of a batch, for a loop over blocks.

    Each device has its own share of the rows (there are X shares). No token moves between devices. On a CPU each
    share is sorted: real tokens first, then padding.

    Attributes:
        hidden: [X, M, D], the M tokens of each share, filled up to whole blocks.
        targets, mask: [X, M].
        places: [X, M], the index in its share that each token came from; None if tokens are not sorted.
        size: tokens of one share in a block.
        needed: number of blocks to compute; on a CPU only those with a real token in some share.
    """

    hidden: jax.Array
    targets: jax.Array
    mask: jax.Array
    places: jax.Array | None
    size: int
    needed: jax.Array | int

    def take(self, number: jax.Array) -> tuple[jax.Array, ...]:
        """Returns hidden, targets and mask of one block."""
        cut = (self.hidden, self.targets, self.mask)
        return tuple(jax.lax.dynamic_slice_in_dim(x, number * self.size, self.size, axis=1) for x in cut)

    def put_back(self, made: jax.Array, like: jax.Array) -> jax.Array:
        """Returns [X, M, D] in the shape of `like`, [B, T, D], each token at its own place."""
        tokens = like.shape[0] * like.shape[1] // made.shape[0]
        if self.places is None:
            made = made[:, :tokens]
        else:  # rows that fill up the last block are dropped
            empty = jnp.zeros((tokens, made.shape[2]), made.dtype)
            made = jax.vmap(lambda rows, order: empty.at[order].set(rows, mode="drop"))(made, self.places)
        return constrain(made, "batch", None, None).reshape(like.shape)


def _block_sizes(tokens: int, most: int, together: int, for_cpu: bool) -> tuple[int, int]:
    """Returns number and size of the blocks of one share.

    Args:
        tokens: tokens of the share.
        most: most tokens of a block, unless `together` is more.
        together: number that divides the size.
        for_cpu: whether tokens are sorted, so that filling the last block costs nothing.
    """
    number = -(-tokens // most)
    # Blocks that divide the tokens need no filling, which would copy all hidden vectors.
    whole = [] if for_cpu else [n for n in range(number, 2 * number) if tokens % (n * together) == 0]
    number = whole[0] if whole else number
    return number, together * -(-tokens // (number * together))


def _blocks(static, hidden: jax.Array, targets: jax.Array, mask: jax.Array, vocab: int) -> _Blocks:
    """Returns the tokens of [B, T] in blocks. Both passes over a token are in the same block."""
    terms, blocking = static
    shares = num_shards("batch")
    shares = shares if targets.shape[0] % shares == 0 else 1
    tokens = targets.size // shares
    row_bytes = blocking.logits_dtype(hidden).itemsize * vocab // num_shards("vocab")
    most, together = max(blocking.num_bytes // row_bytes, 1), 2 if terms.divergence_weight else 1
    number, size = _block_sizes(tokens, most, together, blocking.for_cpu)
    mask = constrain(mask.reshape(shares, tokens), "batch", None)
    missing = number * size - tokens
    places = None
    if blocking.for_cpu:
        places = jnp.argsort(~mask, axis=1)  # stable
        places = jnp.pad(places, ((0, 0), (0, missing)), constant_values=tokens)  # beyond all: zeros

    def ordered(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [X, M, ...]
        x = x.reshape(shares, tokens, *x.shape[2:])
        if places is None:
            taken = jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)))
        else:
            taken = jax.vmap(lambda rows, order: rows.at[order].get(mode="fill", fill_value=0))(x, places)
        return constrain(taken, "batch", *(None,) * (taken.ndim - 1))

    needed = jnp.max(-(-jnp.sum(mask, axis=1) // size)) if blocking.for_cpu else number
    return _Blocks(ordered(hidden), ordered(targets), ordered(mask), places, size, needed)


def _of_other_pass(x: jax.Array) -> jax.Array:
    """Returns the rows with 2i and 2i + 1 exchanged: [X t, V] -> [X t, V]."""
    return jnp.flip(x.reshape(len(x) // 2, 2, x.shape[1]), axis=1).reshape(x.shape)


def _flat(x: jax.Array) -> jax.Array:
    """Returns [X, t, ...] as [X t, ...]: over one axis of tokens XLA for CPU makes faster loops."""
    return constrain(x.reshape(-1, *x.shape[2:]), "batch", *(None,) * (x.ndim - 2))


class _BlockTerms(NamedTuple):
    """The sums of one block, and the arrays that its gradient needs.

    With a divergence the two passes predict p and q, from logits y and z.

    Attributes:
        sums: the four of `LossSums` over the tokens of each share, [4, X].
        exponentials: exp(logits - highest), [X t, V], in float32.
        total: their sum over V, [X t, 1].
        apart: y - z, [X t, V]; None without a divergence.
        mean_apart: the mean of `apart` under p, [X t, 1]; None without a divergence.
    """

    sums: jax.Array
    exponentials: jax.Array
    total: jax.Array
    apart: jax.Array | None
    mean_apart: jax.Array | None


def _statistics(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns highest logit, sum of exp(logit - highest) and the target's logit, each [X t] in float32, in one pass.

    Two parts of a row, with maxima m >= n and sums s and t, make the maximum m and the sum s + t exp(n - m).

    References:
        Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", algorithm 3.
    """

    def join(left, right):
        (m, s, y), (n, t, z) = left, right
        shrink = jnp.exp(-jnp.abs(m - n))
        return jnp.maximum(m, n), jnp.where(m >= n, s + t * shrink, s * shrink + t), y + z

    wide = logits.astype(jnp.float32)
    of_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == targets[:, None]
    terms = (wide, jnp.ones_like(wide), jnp.where(of_target, wide, 0.0))
    zeros = (jnp.float32(MASKED), jnp.float32(0.0), jnp.float32(0.0))
    return jax.lax.reduce(terms, zeros, join, (1,))


def _block_terms(static, mean_row, kernel, bias, hidden, targets, mask) -> _BlockTerms:
    """Returns the sums of one block, and the arrays that its gradient needs.

    The divergence is

        J = (KL(p || q) + KL(q || p)) / 2 = (sum of p (y - z) + sum of q (z - y)) / 2

    Args:
        static: constants of the loss, and the blocking.
        mean_row: [D], mean of the real rows of the kernel.
        kernel: as `_for_products` returns it.
        bias: [V], or None.
        hidden: [X, t, D].
        targets, mask: [X, t].
    """
    terms, blocking = static
    hidden, targets = _flat(hidden), _flat(targets)
    dtype = blocking.logits_dtype(hidden)
    logits = jnp.einsum(f"td,{blocking.kernel_axes}->tv", hidden, kernel, preferred_element_type=dtype)
    if bias is not None:
        logits = logits + jnp.broadcast_to(bias, logits.shape).astype(dtype)
    if terms.num_real_rows < logits.shape[1]:
        row = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        logits = jnp.where(row < terms.num_real_rows, logits, MASKED)
    if blocking.for_cpu:
        highest = jnp.max(logits, axis=-1, keepdims=True)
        exponentials = jnp.exp(logits - highest)
        total = jnp.sum(exponentials, axis=-1, keepdims=True)
        target_logit = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    else:
        highest, total, target_logit = _statistics(logits, targets)
        highest, total = highest[:, None], total[:, None]
        logits = logits.astype(jnp.float32)
        exponentials = jnp.exp(logits - highest)
    log_normaliser = (jnp.log(total) + highest)[:, 0]
    nll = log_normaliser - target_logit
    # The mean of the real logits is linear in hidden. So one product with the mean row replaces a pass over V.
    mean_logit = jnp.einsum("td,d->t", hidden.astype(jnp.float32), mean_row)
    mean_logit = mean_logit if bias is None else mean_logit + jnp.mean(bias[: terms.num_real_rows])
    loss = (1.0 - terms.label_smoothing) * nll + terms.label_smoothing * (log_normaliser - mean_logit)
    apart = mean_apart = None
    if terms.divergence_weight:
        apart = logits - _of_other_pass(logits)
        mean_apart = jnp.sum(exponentials * apart, axis=-1, keepdims=True) / total
        loss = loss + terms.divergence_weight / 2 * mean_apart[:, 0]  # both tokens of a pair together: J
    correct = (target_logit >= highest[:, 0]).astype(jnp.float32)
    sums = jnp.stack([loss, nll, correct, jnp.ones_like(nll)]).reshape(4, *mask.shape)
    sums = jnp.sum(sums * mask.astype(jnp.float32)[None], axis=2)
    return _BlockTerms(sums, exponentials, total, apart, mean_apart)


def _gradient_by_logits(terms: LossTerms, made: _BlockTerms, targets: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns the gradient [X t, V] of a block's loss.

    The divergence adds (names as in `_BlockTerms`)

        dJ / dy = (p (1 + y - z - sum of p (y - z)) - q) / 2

    Args:
        terms: constants of the loss.
        made: terms of the block.
        targets: [X t].
        weight: [X t, 1], 0 for padding.
    """
    num_real_rows, smoothing = terms.num_real_rows, terms.label_smoothing
    row = jax.lax.broadcasted_iota(jnp.int32, made.exponentials.shape, 1)
    wanted = jnp.where(row == targets[:, None], 1.0 - smoothing, 0.0)
    wanted = wanted + jnp.where(row < num_real_rows, smoothing / num_real_rows, 0.0)
    probabilities = made.exponentials / made.total
    by_logits = probabilities - wanted
    if made.apart is not None and made.mean_apart is not None:
        by_divergence = probabilities * (1.0 + made.apart - made.mean_apart) - _of_other_pass(probabilities)
        by_logits = by_logits + terms.divergence_weight / 2 * by_divergence
    return by_logits * weight


def _zero_sums(shares: int) -> jax.Array:
    return constrain(jnp.zeros((4, shares), jnp.float32), None, "batch")


def _over_shares(sums: jax.Array) -> LossSums:
    return LossSums(*jnp.sum(sums, axis=1))


def _for_products(static, hidden, kernel):
    """Returns the kernel in the type of `hidden`; the mean of its real rows, in float32; and the kernel by `Blocking`.

    On a CPU both products with logits have V as the last axis. Otherwise XLA would transpose the logits for each.
    """
    terms, blocking = static
    kernel = constrain(kernel.astype(hidden.dtype), "vocab", None)  # gathered to whole rows once, before the loop
    mean_row = jnp.mean(kernel[: terms.num_real_rows].astype(jnp.float32), axis=0)
    return kernel, mean_row, blocking.constrain_kernel(kernel.T if blocking.for_cpu else kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused_sums(static, hidden, kernel, bias, targets, mask) -> LossSums:
    terms, blocking = static
    static = (terms, dataclasses.replace(blocking, narrow=False))  # an evaluation is exact, and needs no gradient
    kernel, mean_row, table = _for_products(static, hidden, kernel)
    blocks = _blocks(static, hidden, targets, mask, kernel.shape[0])

    def body(number, total):
        return total + _block_terms(static, mean_row, table, bias, *blocks.take(number)).sums

    return _over_shares(jax.lax.fori_loop(0, blocks.needed, body, _zero_sums(len(blocks.mask))))


def _forward(static, hidden, kernel, bias, targets, mask):
    """Returns the sums; the gradient of `loss` by hidden, and in float32 by kernel and bias; and the kernel's type."""
    terms, blocking = static
    like_kernel = jnp.zeros((), kernel.dtype)  # carries only the dtype
    kernel, mean_row, table = _for_products(static, hidden, kernel)
    blocks = _blocks(static, hidden, targets, mask, kernel.shape[0])
    shares = len(blocks.mask)

    def body(number, carry):
        total, table_gradient, bias_gradient, by_hidden = carry
        h, t, m = blocks.take(number)
        made = _block_terms(static, mean_row, table, bias, h, t, m)
        by_logits = _gradient_by_logits(terms, made, _flat(t), _flat(m).astype(jnp.float32)[:, None])
        if bias_gradient is not None:
            bias_gradient = bias_gradient + jnp.sum(by_logits.reshape(*m.shape, -1), axis=1)
        by_logits = by_logits.astype(h.dtype)  # products run in the compute type, their sums in float32
        by_logits = by_logits.reshape(*m.shape, -1)  # [X t, V] -> [X, t, V]
        by_tokens = jnp.einsum("xtv,vd->xtd", by_logits, kernel, preferred_element_type=accumulation_dtype(h.dtype))
        by_tokens = by_tokens.astype(h.dtype)
        by_hidden = jax.lax.dynamic_update_slice_in_dim(by_hidden, by_tokens, number * blocks.size, axis=1)
        # Each device sums its own share. The sum over devices is taken once, after the loop.
        by_table = jnp.einsum(f"xtd,xtv->x{blocking.kernel_axes}", h, by_logits, preferred_element_type=jnp.float32)
        table_gradient = blocking.constrain_kernel(table_gradient + by_table, "batch")
        return total + made.sums, table_gradient, bias_gradient, by_hidden

    start = (
        _zero_sums(shares),
        blocking.constrain_kernel(jnp.zeros((shares, *table.shape), jnp.float32), "batch"),
        None if bias is None else constrain(jnp.zeros((shares, *bias.shape), jnp.float32), "batch", "vocab"),
        jnp.zeros_like(blocks.hidden),  # padding has no gradient
    )
    total, table_gradient, bias_gradient, by_hidden = jax.lax.fori_loop(0, blocks.needed, body, start)
    table_gradient, bias_gradient = jax.tree.map(lambda x: jnp.sum(x, axis=0), (table_gradient, bias_gradient))
    by_kernel = table_gradient.T if blocking.for_cpu else table_gradient
    return _over_shares(total), (blocks.put_back(by_hidden, hidden), by_kernel, bias_gradient, like_kernel)


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
