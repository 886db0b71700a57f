"""Masks drawn by hand."""

import jax.numpy as jnp
import numpy as np
from flax_transformer.nn.masks import causal_mask, segment_mask


def drawn(*rows: str) -> np.ndarray:
    return np.array([[c == "1" for c in row] for row in rows])


def test_causal_mask():
    expected = drawn("1000", "1100", "1110", "1111")
    np.testing.assert_array_equal(causal_mask(4), expected[None, None])


def test_segment_mask_hides_padding_and_other_segments():
    queries = jnp.array([[1, 1, 2, 0]])
    keys = jnp.array([[1, 2, 2, 0, 0]])
    expected = drawn("10000", "10000", "01100", "00000")
    np.testing.assert_array_equal(segment_mask(queries, keys), expected[None, None])
