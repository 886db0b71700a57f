"""A model that computes with fewer bits than it was trained with."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from flax_transformer.nn.embedding import Embedding
from flax_transformer.nn.linear import Linear
from flax_transformer.nn.quantization import quantized

# "int8": weights are 8-bit integers, and products those of integers. "bfloat16": activations and products are bfloat16,
# as `model.compute_dtype` makes them; the run's parameters stay as they are.
Quantize = Literal["none", "int8", "bfloat16"]


def quantized_params(graphdef: Any, params: Any) -> Any:
    """Returns parameters with integers for the weights of every `Linear` and `Embedding`; the rest stays as it is.

    What stays: biases, norms, positions, and the gates of recurrent cells. A table of embeddings has a scale for each
    token, as it is read and as an output projection.
    """
    model: Any = nnx.merge(graphdef, params)
    for _, module in list(nnx.iter_modules(model)):
        if isinstance(module, Linear):
            stacked = module.kernel[...].ndim - len(module.kernel.get_metadata("logical_axes"))  # a leading layer axis
            in_axes = tuple(range(stacked, stacked + module.num_in_dims))
            kernel: Any = quantized(module.kernel[...], in_axes)
            module.kernel.set_value(kernel)  # a parameter may hold any tree
        elif isinstance(module, Embedding):
            table: Any = quantized(module.table[...], (1,))
            module.table.set_value(table)
    return nnx.to_pure_dict(nnx.state(model))


def is_quantized(params: Any) -> bool:
    """Returns whether there are integers among the parameters."""
    return any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(params))


def quantized_ensemble(graphdef: Any, params: Any, num_models: int) -> Any:
    """Returns `quantized_params` of a model, or of several whose parameters are stacked."""
    if num_models == 1:
        return quantized_params(graphdef, params)
    return jax.vmap(lambda params: quantized_params(graphdef, params))(params)
