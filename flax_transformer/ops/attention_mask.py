"""Which keys each query may attend to, as a structure that a fused kernel can read in parts.

Legend: B batch, T query length, S key length.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from flax_transformer.shapes import array_tree, derived_field, static_field, with_derived


@array_tree
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """Says which keys each query may attend to. A key is allowed if every given part allows it.

    The reference form reads the mask as an array, which `materialize` makes. A fused kernel reads the parts: segments,
    a flag, a window. cuDNN gets a flag where that says all, and the array otherwise.

    Attributes:
        key_segments: [B, S], 0 for padding, which no query attends to; None if all keys are real.
        query_segments: [B, T]; a query attends to the keys of its own segment. None if a row holds one pair.
        query_offsets: [B], position among the keys of each row's first query; None means zeros.
        causal: whether a query attends to no later position than its own.
        window: number of earlier positions that a query sees, and of later ones if not causal; None for all.
        array: result of `materialize`, if `shared` made it; None otherwise, and in the result of `dataclasses.replace`.

    Raises:
        ValueError: query segments without key segments, or a window below 0.

    Example:
        >>> AttentionMask(causal=True).materialize(3, 3)[0, 0].astype(int).tolist()
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    """

    key_segments: Int[Array, "B S"] | None = None
    query_segments: Int[Array, "B T"] | None = None
    query_offsets: Int[Array, "B"] | None = None
    causal: bool = static_field(default=False)
    window: int | None = static_field(default=None)
    array: Bool[Array, "#B 1 #T S"] | None = derived_field()

    def __post_init__(self):
        if self.query_segments is not None and self.key_segments is None:
            raise ValueError("query_segments need key_segments to be compared with; give both.")
        if self.window is not None and self.window < 0:
            raise ValueError(f"window must be at least 0, got {self.window}.")

    @property
    def is_padding_only(self) -> bool:
        """Whether the mask excludes padding alone, which is known while a program is traced.

        Then all queries of a row see the same keys, and the array has one row for them. A form may read the key
        segments alone.
        """
        return self.query_segments is None and not self.causal and self.window is None

    def shared(self, query_length: int, key_length: int) -> "AttentionMask":
        """Returns the mask with its array, so that all layers read the same one.

        Otherwise a loop over layers or decoding steps would make or carry an array for each layer. If no layer reads
        the array, XLA removes it.
        """
        return with_derived(self, array=self.materialize(query_length, key_length))

    def materialize(self, query_length: int, key_length: int) -> Bool[Array, "#B 1 #T S"]:
        """Returns True where a query may attend to a key, in one row for all queries if `is_padding_only`.

        Example: causal self-attention over segments [1, 1, 2, 0].

            1 0 0 0
            1 1 0 0
            0 0 1 0
            0 0 0 0

        Raises:
            ValueError: `shared` made the array for other lengths.
        """
        if self.array is not None:
            rows = 1 if self.is_padding_only else query_length
            if self.array.shape[2:] != (rows, key_length):
                made_for = f"{self.array.shape[2]} queries and {self.array.shape[3]} keys"
                raise ValueError(
                    f"a mask that was made for {made_for} cannot serve {query_length} and {key_length}; make another "
                    f"by `shared`."
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
