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
from flax_transformer.nn.layer_stack import LayerStack
from flax_transformer.ops.int8_product import Int8Weights, quantize
from flax_transformer.ops.vocabulary import OutputProjection, fold_bias_into_kernel
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
    whole = replicated_sharding(mesh)

    def of(parameter: nnx.Variable) -> nnx.Variable:
        value, spec = parameter.get_value(), partition_spec(parameter.get_metadata("logical_axes"))
        weights = _weights(value)
        split = NamedSharding(mesh, jax.P(*(None,) * (weights.ndim - len(spec)), *spec))
        return parameter.replace(jax.tree.map(lambda leaf: split if leaf is weights else whole, value))

    params = jax.tree.map(of, prepared.params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return InferenceParams(prepared.graphdef, params)


def _weights(value: Any) -> Any:
    """Returns the array whose axes are the logical axes of a prepared parameter, without what is kept beside it."""
    kernel = value.kernel if isinstance(value, OutputProjection) else value
    return kernel.values if isinstance(kernel, Int8Weights) else kernel


def prepared_model(model: Any, sharded: bool = False) -> Any:
    """Returns a copy of a model with its parameters laid out for a search. Results change only by rounding.

    1. Cast: kernels, which have `num_in_dims`, and the output projection get the compute dtype. XLA for CPU would not
       move their casts out of a search's loop (docs/lab_book.md, "Casts of kernels in the loop of a search").
    2. Unstack: the layers of a stack become a list.
    3. Fold: where it is faster, kernel and bias of the output projection are one array.

    Args:
        model: a `Seq2Seq`.
        sharded: whether the parameters are split over the devices of a mesh. Then kernel and bias stay apart, since a
            mesh would not divide the width of both.
    """
    model = nnx.clone(model)
    table = _weights(model.parameter_roles().output_table.get_value())
    for parameter in _params(model):
        if "num_in_dims" in parameter.get_metadata():
            parameter.set_value(_cast(parameter.get_value(), model.compute_dtype))
    for _, module in list(nnx.iter_modules(model)):
        if isinstance(module, LayerStack):
            module.layers = nnx.List(module.unstacked())
    projection = model.output_projection()
    projection = dataclasses.replace(projection, kernel=_cast(projection.kernel, model.compute_dtype))
    projection = projection if sharded else fold_bias_into_kernel(projection)
    if _weights(projection) is not table:  # otherwise the model reads its table at each step
        model.set_prepared_projection(projection)
    return model


def _params(model: Any) -> list[nnx.Param]:
    """Returns all parameters of a model."""
    return [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Param)]


def _cast(weights: Any, dtype: jnp.dtype) -> Any:
    """Returns weights in another dtype; integers stay unchanged."""
    return weights if isinstance(weights, Int8Weights) or weights.dtype == dtype else weights.astype(dtype)


def quantized_params(graphdef: GraphDef, num_models: int, params: Params) -> Params:
    """Returns parameters with 8-bit integers for all weights that have `int8_axes`: kernels and embedding tables.

    Biases, norms, positions, and the gates of recurrent cells stay floats. An embedding table has a scale for each
    token. The arguments are those of `prepare_for_inference`.
    """

    def of_model(params: Params) -> Params:
        model: Any = nnx.merge(graphdef, params)
        for parameter in _params(model):
            axes = parameter.get_metadata().get("int8_axes")
            if axes is not None:
                weights = parameter.get_value()
                # A stacked kernel has a leading layer axis that its logical axes do not name.
                stacked = weights.ndim - len(parameter.get_metadata("logical_axes"))
                parameter.set_value(quantize(weights, tuple(stacked + axis for axis in axes)))  # type: ignore[arg-type]
        return nnx.to_pure_dict(nnx.state(model))

    return of_model(params) if num_models == 1 else jax.vmap(of_model)(params)


def is_quantized(params: Params) -> bool:
    """Returns whether any parameter has the form of 8-bit integers."""

    def is_int8(leaf: Any) -> bool:
        return isinstance(leaf, Int8Weights)

    return any(is_int8(leaf) for leaf in jax.tree.leaves(params, is_leaf=is_int8))
