"""A stack of layers of one kind, whose parameters have a leading layer axis.

Stacked parameters have one name a stack, whatever its depth. A list of layers would get integer keys. A checkpoint that
is restored without a target brings those back in the order 0, 1, 10, 11, 2.

Legend: B batch, T length, D model dim, L layers.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray


class LayerStack(nnx.Module):
    """L layers, each reading what the one before it returns.

    Attributes:
        layers: one module whose every parameter has a leading layer axis, or an `nnx.List` of modules.
        num_layers: L.
    """

    def __init__(
        self,
        make_layer: Callable[[nnx.Rngs], nnx.Module],
        num_layers: int,
        *,
        scan: bool,
        rematerialize: bool,
        rngs: nnx.Rngs,
    ):
        """Makes L layers, each drawn from a key of its own.

        Args:
            make_layer: returns one layer, from its random numbers.
            num_layers: L.
            scan: whether `run` is a loop that is compiled once, rather than one layer after the other.
            rematerialize: whether `run` keeps only each layer's input for the backward pass.
            rngs: random numbers.
        """
        self.num_layers = num_layers
        self.scan = scan
        self.rematerialize = rematerialize
        keys = jax.random.split(rngs.params(), num_layers)
        self.layers: Any = jax.vmap(lambda key: make_layer(nnx.Rngs(params=key)))(keys)

    def unstacked(self) -> list[Any]:
        """Returns the layers one by one; differentiates into one concatenation a parameter."""
        if isinstance(self.layers, nnx.List):
            return list(self.layers)
        leaves, structure = jax.tree.flatten(self.layers)
        slices = [jax.lax.split(leaf, (1,) * self.num_layers, axis=0) for leaf in leaves]
        return [
            jax.tree.unflatten(structure, [jax.lax.squeeze(leaf[i], (0,)) for leaf in slices])
            for i in range(self.num_layers)
        ]

    def run(
        self,
        apply: Callable[[Any, Float[Array, "B T D"], PRNGKeyArray | None], Float[Array, "B T D"]],
        x: Float[Array, "B T D"],
        keys: list[PRNGKeyArray | None],
    ) -> Float[Array, "B T D"]:
        """Returns the output of the last layer, when the first reads `x` and each later one the output before it.

        Args:
            apply: of one layer, (layer, x, key).
            x: input of the first.
            keys: of dropout, one for each layer.
        """
        if self.rematerialize:
            # A loop keeps its passes apart by itself. Elsewhere barriers keep XLA from joining forward and backward.
            apply = jax.checkpoint(apply, prevent_cse=not self.scan)
        if not self.scan or isinstance(self.layers, nnx.List):
            for layer, key in zip(self.unstacked(), keys, strict=True):
                x = apply(layer, x, key)
            return x
        stacked_keys = None if keys[0] is None else jnp.stack([key for key in keys if key is not None])
        return jax.lax.scan(
            lambda x, layer_and_key: (apply(layer_and_key[0], x, layer_and_key[1]), None),
            x,
            (self.layers, stacked_keys),
        )[0]
