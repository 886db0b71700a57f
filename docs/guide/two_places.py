"""A task for one attention layer that asks for two places: the token before, and the token after."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from flax_transformer.nn.attention import MultiHeadAttention
from flax_transformer.nn.positions import sinusoidal_table
from flax_transformer.ops.attention import attention_weights
from flax_transformer.ops.attention_mask import AttentionMask

LENGTH, KINDS, DIM, ROWS = 12, 8, 32, 64


@dataclasses.dataclass(frozen=True)
class TwoPlaces:
    """A trained attention layer.

    Attributes:
        accuracy: [steps, 2], share of neighbours before and after that are named correctly.
        weights: [N, T, S], attention weights of one row.
    """

    accuracy: np.ndarray
    weights: np.ndarray


def train_two_places(num_heads: int, steps: int = 400, seed: int = 0) -> TwoPlaces:
    """Returns a layer of `num_heads` heads, trained to name both neighbours of each token."""
    float32 = jnp.dtype("float32")
    rngs = nnx.Rngs(seed)
    layer = MultiHeadAttention(DIM, num_heads, dropout_rate=0.0, param_dtype=float32, compute_dtype=float32, rngs=rngs)
    graphdef, layer_params = nnx.split(layer)
    scale = DIM**-0.5
    params = {
        "layer": nnx.to_pure_dict(layer_params),
        "table": rngs.params.normal((KINDS, DIM)),
        "names": rngs.params.normal((DIM, 2 * KINDS)) * scale,
    }
    positions = jnp.asarray(sinusoidal_table(LENGTH, DIM))

    def inputs(params: Any, tokens: jax.Array) -> jax.Array:
        return params["table"][tokens] + positions

    def loss(params: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        tokens = jax.random.randint(key, (ROWS, LENGTH), 0, KINDS)
        x = inputs(params, tokens)
        made = nnx.merge(graphdef, params["layer"])(x, x, AttentionMask())
        logits = (made @ params["names"]).reshape(ROWS, LENGTH, 2, KINDS)[:, 1:-1]
        neighbours = jnp.stack([tokens[:, :-2], tokens[:, 2:]], axis=-1)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, neighbours)
        return nll.mean(), (logits.argmax(-1) == neighbours).mean((0, 1))

    optimizer = optax.adam(1e-2)

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        params, state = carry
        gradient, accuracy = jax.grad(loss, has_aux=True)(params, key)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), accuracy

    keys = jax.random.split(jax.random.key(seed), steps)
    (params, _), accuracy = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))((params, optimizer.init(params)))
    tokens = jax.random.randint(jax.random.key(1), (1, LENGTH), 0, KINDS)
    x = inputs(params, tokens)
    trained = nnx.merge(graphdef, params["layer"])
    weights = attention_weights(trained.query(x), trained.key(x), AttentionMask())[0]
    return TwoPlaces(np.asarray(accuracy), np.asarray(weights))
