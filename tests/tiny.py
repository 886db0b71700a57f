"""Small models and batches that several test files share."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_transformer.models.build import VocabularyInfo, build_model
from flax_transformer.models.transformer_config import TransformerConfig
from flax_transformer.shapes import Batch

VOCABULARY = VocabularyInfo(source_size=21, target_size=19, start_token=1)


def config(**changes: Any) -> TransformerConfig:
    values: dict[str, Any] = {
        "model_dim": 16,
        "num_heads": 4,
        "feed_forward_dim": 32,
        "num_encoder_layers": 2,
        "num_decoder_layers": 3,
        "max_source_length": 32,
        "max_target_length": 24,
        "share_embeddings": "target_output",
    }
    return TransformerConfig(**(values | changes))


def randomised(abstract: Any, seed: int) -> Any:
    """The module with every parameter random, so that no zero bias and no unit scale hides a mistake."""
    graphdef, state = nnx.split(abstract)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        around = 1.0 if "scale" in name else 0.0
        return jnp.asarray(around + rng.normal(size=leaf.shape) * 0.3, leaf.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(draw, state))


def transformer(seed: int = 0, **changes: Any) -> Any:
    """A `Transformer` whose every parameter is random; nothing is compiled to make it."""
    return randomised(nnx.eval_shape(lambda: build_model(config(**changes), VOCABULARY, rngs=nnx.Rngs(0))), seed)


def side(rng: np.random.Generator, lengths: list[int], width: int, vocab: int) -> tuple[jax.Array, ...]:
    """Tokens, positions and segments of random sentences, one a row."""
    columns = np.arange(width)[None, :]
    real = columns < np.asarray(lengths)[:, None]
    tokens = np.where(real, rng.integers(3, vocab, real.shape), 0)
    return tuple(jnp.asarray(a, jnp.int32) for a in (tokens, np.where(real, columns, 0), real))


def batch(source_lengths: list[int], target_lengths: list[int], seed: int = 0, source=9, target=8) -> Batch:
    rng = np.random.default_rng(seed)
    return Batch(
        *side(rng, source_lengths, source, VOCABULARY.source_size),
        *side(rng, target_lengths, target, VOCABULARY.target_size),
    )


def with_padding_tokens(of: Batch, token: int) -> Batch:
    """The batch with a token at all places of padding."""
    return of._replace(
        source_tokens=jnp.asarray(np.where(np.asarray(of.source_segments) > 0, of.source_tokens, token)),
        target_tokens=jnp.asarray(np.where(np.asarray(of.target_segments) > 0, of.target_tokens, token)),
    )


def rows(of: Batch, *indices: int) -> Batch:
    return Batch(*(jnp.asarray(np.asarray(a)[list(indices)]) for a in of))
