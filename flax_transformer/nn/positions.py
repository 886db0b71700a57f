"""Position encodings: sinusoidal (fixed) and learned."""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

PositionKind = Literal["sinusoidal", "learned"]


def sinusoidal_table(length: int, dim: int) -> np.ndarray:
    """Returns the float32 table [length, dim]: sines in the first half of the channels, cosines in the second.

        table[p, i]           = sin(p / 10000^(2i / dim))    for i < dim / 2
        table[p, dim / 2 + i] = cos(p / 10000^(2i / dim))

    The paper interleaves sines and cosines (sine in channel 2i, cosine in 2i + 1). Its code, Marian and this project
    put them side by side, with the paper's frequencies. The two layouts differ by a fixed permutation of the channels.
    The first projections can learn it.

    Example:
        >>> sinusoidal_table(2, 4)[0].tolist()
        [0.0, 0.0, 1.0, 1.0]

    References:
        Vaswani et al. 2017, section 3.5.
    """
    angles = np.arange(length)[:, None] / 10000.0 ** (2 * np.arange(dim // 2) / dim)[None, :]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


class SinusoidalPositions(nnx.Module):
    """Fixed sinusoids, without parameters.

    Example:
        >>> SinusoidalPositions(16, 4)(jnp.array([0])).tolist()
        [[0.0, 0.0, 1.0, 1.0]]
    """

    def __init__(self, max_length: int, dim: int):
        self.max_length = max_length
        self.dim = dim

    def __call__(self, positions: Int[Array, "*rows"]) -> Float[Array, "*rows D"]:
        """Returns the encodings of 0-based `positions`, in float32."""
        return jnp.take(jnp.asarray(sinusoidal_table(self.max_length, self.dim)), positions, axis=0, mode="clip")


class LearnedPositions(nnx.Module):
    """One learned vector for each position, initialised from N(0, 1/D) like the token embeddings.

    Example:
        >>> positions = LearnedPositions(16, 4, param_dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
        >>> positions(jnp.array([[0, 1, 2]])).shape
        (1, 3, 4)

    References:
        Gehring et al. 2017, section 3.1; Vaswani et al. 2017, table 3 row (E) finds it equal to sinusoids.
    """

    def __init__(self, max_length: int, dim: int, *, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        table = rngs.params.normal((max_length, dim), param_dtype) * dim**-0.5
        self.table = nnx.Param(table.astype(param_dtype), logical_axes=("position", "embed"))

    def __call__(self, positions: Int[Array, "*rows"]) -> Float[Array, "*rows D"]:
        """Returns the encodings of 0-based `positions`, in float32, so that gradients are summed in float32."""
        return jnp.take(self.table[...].astype(jnp.float32), positions, axis=0, mode="clip")
