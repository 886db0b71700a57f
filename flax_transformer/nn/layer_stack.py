"""A stack of equal layers, whose parameters have a leading layer axis.

So each parameter of a stack has one name, whatever the depth. A list of layers would get integer keys. A checkpoint
that is restored without a target brings those back in the order 0, 1, 10, 11, 2.

Legend: B batch, T length, D model dim, L layers.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray


class LayerStack(nnx.Module):
    """L layers in sequence.

    Attributes:
        layers: one module whose parameters all have a leading layer axis, or an `nnx.List` of modules.
        num_layers: L.

    Example:
        >>> stack = LayerStack(
        ...     lambda rngs: nnx.Linear(4, 4, rngs=rngs), 3, scan=False, rematerialize=False, rngs=nnx.Rngs(0)
        ... )
        >>> stack.run(lambda layer, x, key: layer(x), jnp.ones((1, 2, 4)), [None] * 3).shape
        (1, 2, 4)
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
        """Makes L layers, each initialised from its own key.

        Args:
            make_layer: returns one layer, given random numbers for its parameters.
            num_layers: L.
            scan: whether `run` is a loop that is compiled once. Otherwise each layer is compiled.
            rematerialize: whether `run` keeps only each layer's input for the backward pass.
            rngs: random numbers for the parameters.
        """
        self.num_layers = num_layers
        self.scan = scan
        self.rematerialize = rematerialize
        keys = jax.random.split(rngs.params(), num_layers)
        self.layers: Any = jax.vmap(lambda key: make_layer(nnx.Rngs(params=key)))(keys)

    def unstacked(self) -> list[Any]:
        """Returns the layers one by one. The gradient of a parameter is one concatenation over layers."""
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
        """Returns the output of the last layer. The first layer reads `x`; each other layer reads the output before it.

        Args:
            apply: function of one layer, (layer, x, key).
            x: input of the first layer.
            keys: random keys of dropout, one for each layer.
        """
        if self.rematerialize:
            # In a loop XLA cannot merge forward and backward pass. Elsewhere barriers prevent it.
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
