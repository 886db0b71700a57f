"""The best of a vocabulary, however logits lie in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer import backend
from flax_transformer.decoding.candidates import best_candidates
from flax_transformer.decoding.logits_processors import Progress
from flax_transformer.ops.vocabulary import best_of_vocabulary, log_probabilities


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("size", [7, 24, 1000, 1009])  # 7 and 1009 are prime: one block
def test_the_best_of_a_vocabulary_are_those_of_top_k_ties_included(size, platform):
    """However it lies in memory, and so are their log-probabilities."""
    logits = jnp.asarray(np.random.default_rng(size).integers(0, 12, (2, 3, size)).astype(np.float32))
    expected, expected_tokens = jax.lax.top_k(logits, 5)
    with backend.tracing_for(platform):
        best, tokens = jax.jit(best_of_vocabulary, static_argnums=1)(logits, 5)
    np.testing.assert_array_equal(best, expected)
    np.testing.assert_array_equal(tokens, expected_tokens)

    progress = Progress(jnp.zeros((2, 3, 1), jnp.int32), jnp.zeros(2, jnp.int32), jnp.arange(2))
    with backend.tracing_for(platform):
        found = jax.jit(best_candidates, static_argnums=2)(jnp.zeros((2, 3)), logits, 5, progress, ())
        np.testing.assert_allclose(jax.jit(log_probabilities)(logits), jax.nn.log_softmax(logits), rtol=1e-6, atol=1e-6)
    expected, flat = jax.lax.top_k(jax.nn.log_softmax(logits).reshape(2, -1), 5)
    np.testing.assert_allclose(found.scores, expected, rtol=1e-6)
    np.testing.assert_array_equal(found.scores, found.log_probs)
    np.testing.assert_array_equal(found.parents * size + found.tokens, flat)
