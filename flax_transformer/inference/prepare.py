"""Parameters as inference reads them: cast, unstacked, folded, or rounded to 8-bit integers.

A training keeps parameters in float32, with all layers in one stack. A search reads them at every step. Work that is
needed only once is done here, before the program of the search runs.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flax_transformer.nn.embedding import Embedding
from flax_transformer.nn.layer_stack import LayerStack
from flax_transformer.nn.linear import Linear
from flax_transformer.ops.int8_product import Int8Weights, quantize
from flax_transformer.ops.vocabulary import fold_bias_into_kernel

# "int8": weights are 8-bit integers, and products are integer products. "bfloat16": activations and products are
# bfloat16, and the parameters of the run keep their dtype.
Quantize = Literal["none", "int8", "bfloat16"]


class InferenceParams(NamedTuple):
    """A model as a search reads it. An ensemble's parameters have a leading model axis.

    Attributes:
        graphdef: the model without its parameters.
        params: its parameters; `nnx.merge(graphdef, params)` gives the model.
    """

    graphdef: Any
    params: Any


@functools.partial(jax.jit, static_argnums=(0, 1))
def prepare_for_inference(graphdef: Any, num_models: int, params: Any) -> InferenceParams:
    """Returns the parameters as a search reads them on the platform of the mesh in context.

    Args:
        graphdef: graph of the model.
        num_models: number of an ensemble's models. The parameters of several are stacked on a leading axis.
        params: parameters of the model or ensemble as a training keeps them, or quantised.
    """

    def prepare(params: Any) -> InferenceParams:
        return InferenceParams(*nnx.split(prepared_model(nnx.merge(graphdef, params))))

    return prepare(params) if num_models == 1 else jax.vmap(prepare)(params)


def prepared_model(model: Any) -> Any:
    """Returns a copy of a model with its parameters laid out for a search. Results change only by rounding.

    Kernels of `Linear` have the compute dtype. XLA for CPU would not move their casts out of a search's loop
    (docs/lab_book.md, "Casts of kernels in the loop of a search"). Layers are unstacked. Where it is faster, kernel
    and bias of the output projection are one array.
    """
    model = nnx.clone(model)
    for _, module in list(nnx.iter_modules(model)):
        if isinstance(module, Linear):
            module.kernel.set_value(_cast(module.kernel.get_value(), module.compute_dtype))
    for _, module in list(nnx.iter_modules(model)):
        if isinstance(module, LayerStack):
            module.layers = nnx.List(module.unstacked())
    plain = model.output_projection()
    kernel = _cast(plain.kernel, jnp.dtype(model.config.compute_dtype))
    projection = fold_bias_into_kernel(plain if kernel is plain.kernel else dataclasses.replace(plain, kernel=kernel))
    if projection is not plain or model.zeroes_output_row:  # otherwise the model uses its embedding table
        model.prepared_projection = nnx.data(nnx.Param(projection))
    return model


def _cast(weights: Any, dtype: jnp.dtype) -> Any:
    """Returns weights in another dtype; integers stay unchanged."""
    return weights if isinstance(weights, Int8Weights) or weights.dtype == dtype else weights.astype(dtype)


def quantized_params(graphdef: Any, num_models: int, params: Any) -> Any:
    """Returns parameters with 8-bit integers for the weights of every `Linear` and `Embedding`.

    Biases, norms, positions, and the gates of recurrent cells stay floats. An embedding table has a scale for each
    token. The arguments are those of `prepare_for_inference`.
    """

    def of_model(params: Any) -> Any:
        model: Any = nnx.merge(graphdef, params)
        for _, module in list(nnx.iter_modules(model)):
            if isinstance(module, Linear):
                # A stacked kernel has a leading layer axis that its logical axes do not name.
                stacked = module.kernel[...].ndim - len(module.kernel.get_metadata("logical_axes"))
                in_axes = tuple(range(stacked, stacked + module.num_in_dims))
                module.kernel.set_value(quantize(module.kernel[...], in_axes))  # type: ignore[arg-type]  # any tree
            elif isinstance(module, Embedding):
                module.table.set_value(quantize(module.table[...], (1,)))  # type: ignore[arg-type]
        return nnx.to_pure_dict(nnx.state(model))

    return of_model(params) if num_models == 1 else jax.vmap(of_model)(params)


def is_quantized(params: Any) -> bool:
    """Returns whether any parameter is an array of 8-bit integers."""
    return any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(params))
