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
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from flax_transformer.models.parameters import GraphDef, Params
from flax_transformer.nn.embedding import Embedding
from flax_transformer.nn.layer_stack import LayerStack
from flax_transformer.nn.linear import Linear
from flax_transformer.ops.int8_product import Int8Weights, quantize
from flax_transformer.ops.vocabulary import fold_bias_into_kernel
from flax_transformer.parallel.mesh import replicated_sharding
from flax_transformer.parallel.sharding_rules import partition_spec

# "int8": weights are 8-bit integers, and products are integer products. "bfloat16": activations and products are
# bfloat16, and the parameters of the run keep their dtype.
Quantize = Literal["none", "int8", "bfloat16"]


class InferenceParams(NamedTuple):
    """A model as a search reads it. An ensemble's parameters have a leading model axis.

    Attributes:
        graphdef: the model without its parameters.
        params: its parameters; `nnx.merge(graphdef, params)` gives the model.
    """

    graphdef: GraphDef
    params: Params


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="sharded")
def prepare_for_inference(
    graphdef: GraphDef, num_models: int, params: Params, sharded: bool = False
) -> InferenceParams:
    """Returns the parameters as a search reads them on the platform of the mesh in context.

    Args:
        graphdef: graph of the model.
        num_models: number of an ensemble's models. The parameters of several are stacked on a leading axis.
        params: parameters of the model or ensemble as a training keeps them, or quantised.
        sharded: see `prepared_model`.
    """

    def prepare(params: Params) -> InferenceParams:
        return InferenceParams(*nnx.split(prepared_model(nnx.merge(graphdef, params), sharded)))

    return prepare(params) if num_models == 1 else jax.vmap(prepare)(params)


def prepared_shardings(prepared: InferenceParams, mesh: Mesh | AbstractMesh) -> InferenceParams:
    """Returns the sharding of each prepared parameter, in the structure of `prepared`.

    Weights are split over their logical axes, and leading axes of models or layers are not. Scales of 8-bit integers
    and the bias of a projection are small, so every device has them whole.

    Args:
        prepared: result of `prepare_for_inference` with `sharded`, or its shapes.
        mesh: the devices. It divides the parameters (see `parallel.sharding_rules.parameter_shardings`).
    """

    def of(parameter: nnx.Variable) -> nnx.Variable:
        value, spec = parameter.get_value(), partition_spec(parameter.get_metadata("logical_axes"))
        most = max(leaf.ndim for leaf in jax.tree.leaves(value))
        weights = NamedSharding(mesh, jax.P(*(None,) * (most - len(spec)), *spec))
        beside = replicated_sharding(mesh)
        return parameter.replace(jax.tree.map(lambda leaf: weights if leaf.ndim == most else beside, value))

    params = jax.tree.map(of, prepared.params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return InferenceParams(prepared.graphdef, params)


def prepared_model(model: Any, sharded: bool = False) -> Any:
    """Returns a copy of a model with its parameters laid out for a search. Results change only by rounding.

    Kernels of `Linear` have the compute dtype. XLA for CPU would not move their casts out of a search's loop
    (docs/lab_book.md, "Casts of kernels in the loop of a search"). Layers are unstacked. Where it is faster, kernel
    and bias of the output projection are one array.

    Args:
        model: the model.
        sharded: whether the parameters are split over the devices of a mesh. Then kernel and bias stay apart, since a
            mesh would not divide the width of both.
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
    projection = plain if kernel is plain.kernel else dataclasses.replace(plain, kernel=kernel)
    projection = projection if sharded else fold_bias_into_kernel(projection)
    if projection is not plain or model.zeroes_output_row:  # otherwise the model uses its embedding table
        model.prepared_projection = nnx.data(nnx.Param(projection, logical_axes=("vocab", "embed")))
    return model


def _cast(weights: Any, dtype: jnp.dtype) -> Any:
    """Returns weights in another dtype; integers stay unchanged."""
    return weights if isinstance(weights, Int8Weights) or weights.dtype == dtype else weights.astype(dtype)


def quantized_params(graphdef: GraphDef, num_models: int, params: Params) -> Params:
    """Returns parameters with 8-bit integers for the weights of every `Linear` and `Embedding`.

    Biases, norms, positions, and the gates of recurrent cells stay floats. An embedding table has a scale for each
    token. The arguments are those of `prepare_for_inference`.
    """

    def of_model(params: Params) -> Params:
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


def is_quantized(params: Params) -> bool:
    """Returns whether any parameter is an array of 8-bit integers."""
    return any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(params))
