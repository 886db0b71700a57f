"""Our attention beside cuDNN's fused one, forward and backward: time, and distance from float32."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from harness import Report, spread

from accelerator.measurement import Measurement, seconds_of_calls, short

Shape = tuple[int, int, int, int]

SHAPES: tuple[Shape, ...] = ((400, 64, 8, 64), (64, 512, 8, 64), (16, 2048, 16, 64))
DROPOUT = 0.1


@dataclass(frozen=True)
class FusedAttention(Measurement):
    """Our attention beside cuDNN's fused attention, in bfloat16, forward and backward.

    Padding is a random number of keys of each row, at most half of it. Distances are Frobenius norms relative to that
    of our attention in float32 on the same inputs.

    Attributes:
        dropout: whether the first shape is also measured with dropout, where cuDNN is called by a private function.
    """

    dropout: bool = True

    def measure(self, report: Report) -> None:
        """Adds a row for each shape, mask and form."""
        columns = [
            "[B, T, N, H]",
            "mask",
            "form",
            "forward ms",
            "forward and backward ms",
            "output off",
            "gradients off",
        ]
        report.table(columns, self.rows())

    def rows(self) -> Iterator[list[str]]:
        """Yields the rows."""
        shapes: tuple[Shape, ...] = ((2, 16, 2, 8), (1, 32, 2, 8)) if self.tiny else SHAPES
        for number, shape in enumerate(shapes):
            for mask in ("none", "padding", "causal")[number > 0 :]:
                for form in ("ours", "cudnn"):
                    yield self.row(shape, mask, form, 0.0)
        for form in ("ours", "cudnn") if self.dropout else ():
            yield self.row(shapes[0], "padding", form, DROPOUT)

    def row(self, shape: Shape, mask: str, form: str, rate: float) -> list[str]:
        """Returns the row of one form, which says why if it cannot run."""
        said = [str(list(shape)), mask + (f", dropout {rate}" if rate else ""), form]
        try:
            forward, both, off = self.measured(shape, mask, form, rate)
        except Exception as error:  # other forms can still be measured
            self.note("attention", shape=shape, mask=mask, form=form, dropout=rate, error=short(error))
            return [*said, short(error, 150).replace("|", "/"), "", "", ""]
        self.note("attention", shape=shape, mask=mask, form=form, dropout=rate, forward=forward, both=both, off=off)
        times = [spread([1e3 * value for value in seconds], 4) for seconds in (forward, both)]
        return [*said, *times, *(f"{value:.2e}" for value in off), *[""] * (2 - len(off))]

    def measured(self, shape: Shape, mask: str, form: str, rate: float) -> tuple[list[float], list[float], list[float]]:
        """Returns seconds of the forward pass, of both passes, and distances of output and gradients from float32."""
        import jax
        import jax.numpy as jnp

        keys = jax.random.split(jax.random.key(0), 5)
        inputs = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:4]]
        batch, length = shape[:2]
        lengths = jax.random.randint(keys[4], (batch,), length // 2, length + 1)
        function = functools.partial(FORMS[form], mask=mask, rate=rate)
        calls = 2 if self.tiny else 30
        forward, both = compiled(function, inputs, lengths)
        wait = jax.block_until_ready
        times = [seconds_of_calls(call, wait, calls, self.rounds) for call in (forward, both)]
        return times[0], times[1], [] if rate else distances(both, inputs, lengths, mask)


def compiled(function: Any, inputs: list[Any], lengths: Any) -> tuple[Any, Any]:
    """Returns the forward pass, and the output with its gradients for one cotangent, as functions of no argument."""
    import jax

    def both(query: Any, key: Any, value: Any, cotangent: Any) -> Any:
        output, backward = jax.vjp(lambda q, k, v: function(q, k, v, lengths), query, key, value)
        return output, backward(cotangent)

    forward_program = jax.jit(lambda query, key, value: function(query, key, value, lengths))
    both_program = jax.jit(both)
    return lambda: forward_program(*inputs[:3]), lambda: both_program(*inputs)


def distances(both: Any, inputs: list[Any], lengths: Any, mask: str) -> list[float]:
    """Returns the distances of an output, and of its gradients together, from those of ours in float32."""
    import jax
    import jax.numpy as jnp

    with jax.default_matmul_precision("highest"):
        function = functools.partial(ours, mask=mask, rate=0.0)
        exact = compiled(function, [x.astype(jnp.float32) for x in inputs], lengths)[1]()
    found = []
    for made, right in zip(both(), exact, strict=True):
        pairs = list(zip(jax.tree.leaves(made), jax.tree.leaves(right), strict=True))
        square = sum(jnp.sum((a.astype(jnp.float32) - b) ** 2) for a, b in pairs)
        found.append(float(jnp.sqrt(square / sum(jnp.sum(b**2) for _, b in pairs))))
    return found


def ours(query: Any, key: Any, value: Any, lengths: Any, mask: str, rate: float) -> Any:
    """Returns our attention."""
    import jax
    import jax.numpy as jnp

    from flax_transformer.ops.attention import attention
    from flax_transformer.ops.attention_mask import AttentionMask

    real = (jnp.arange(key.shape[1])[None] < lengths[:, None]).astype(jnp.int32)
    parts = AttentionMask(key_segments=real if mask == "padding" else None, causal=mask == "causal")
    dropout_key = jax.random.key(0) if rate else None
    return attention(query, key, value, parts, dropout_rate=rate, dropout_key=dropout_key)


def cudnn(query: Any, key: Any, value: Any, lengths: Any, mask: str, rate: float) -> Any:
    """Returns cuDNN's fused attention, by JAX's public function unless there is dropout."""
    import jax
    import jax.numpy as jnp

    whole = jnp.full_like(lengths, query.shape[1])
    if rate:
        from jax._src.cudnn import fused_attention_stablehlo as private

        return private.dot_product_attention(
            query, key, value, q_seqlen=whole, kv_seqlen=lengths, scale=query.shape[-1] ** -0.5,
            mask_type=private.MaskType.PADDING, dropout_rate=rate, seed=42,
        )  # fmt: skip
    padded = mask == "padding"
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        is_causal=mask == "causal",
        query_seq_lengths=whole if padded else None,
        key_value_seq_lengths=lengths if padded else None,
        implementation="cudnn",
    )


FORMS = {"ours": ours, "cudnn": cudnn}
