"""Metadata of each parameter of a model: its axes, and the vectors that it multiplies.

A layer sets the axes when it creates a parameter: `logical_axes` names them, and `num_in_dims` is the number of a
kernel's input axes. A parameter with `int8_axes` may become 8-bit integers for a search. These axes then share a scale.
A model declares the vectors by `parameter_roles`.
"""

import dataclasses
import math
from typing import Any, Literal, TypeAlias

from flax import nnx

from flax_transformer.models.seq2seq import Seq2Seq
from flax_transformer.parallel.sharding_rules import logical_axes_of

# A model without its parameters. `nnx.merge(graphdef, params)` gives the model.
GraphDef: TypeAlias = nnx.GraphDef[Any]
# Parameters as a tree of arrays, or of their shapes. Those of an ensemble's models are stacked.
Params: TypeAlias = Any

# Which vectors a parameter multiplies: one for each source token, each target token, or each sentence.
MultipliedWith = Literal["source_token", "target_token", "sentence"]


@dataclasses.dataclass(frozen=True)
class ParameterInfo:
    """Metadata of one parameter.

    Attributes:
        shape: dimensions.
        logical_axes: name of each dimension; the first is "layers" if the parameter is a stack of layers.
        num_in_dims: number of a kernel's input dimensions, without "layers"; None for other parameters.
        multiplied_with: which vectors it multiplies in a matrix product. None for a parameter that is added, scales, or
            is looked up.
    """

    shape: tuple[int, ...]
    logical_axes: tuple[str | None, ...]
    num_in_dims: int | None = None
    multiplied_with: MultipliedWith | None = None

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def stacked(self) -> bool:
        """Whether it stacks the parameters of all layers along its first axis."""
        return self.logical_axes[:1] == ("layers",)

    @property
    def matrix_axes(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """The input axes and the output axes of a kernel, without the layer axis; None for other parameters.

        A kernel is a matrix once each of the two groups is flattened.

        Example:
            >>> ParameterInfo((6, 512, 8, 64), ("layers", "embed", "heads", "head_dim"), num_in_dims=1).matrix_axes
            ((1,), (2, 3))
        """
        if self.num_in_dims is None:
            return None
        own = tuple(range(int(self.stacked), len(self.shape)))
        return own[: self.num_in_dims], own[self.num_in_dims :]


def parameter_info(model: Seq2Seq) -> dict[str, Any]:
    """Returns a nested dict with the `ParameterInfo` of each parameter, in the form of `nnx.to_pure_dict`.

    Args:
        model: a model that holds arrays or shapes.

    Raises:
        ValueError: a parameter has no `logical_axes`, or `parameter_roles` leaves out a kernel. Both are defects of a
            layer or model, never of the user's input.
    """
    nodes = dict(nnx.iter_graph(model))
    paths = {id(node): path for path, node in nodes.items()}
    roles = model.parameter_roles()
    modules_of: dict[MultipliedWith, tuple[nnx.Module, ...]] = {
        "source_token": roles.per_source_token,
        "target_token": roles.per_target_token,
        "sentence": roles.per_sentence,
    }
    named = {paths[id(module)]: role for role, modules in modules_of.items() for module in modules}
    output_table = paths[id(roles.output_table)]

    def info(path: tuple[Any, ...], parameter: nnx.Param) -> ParameterInfo:
        num_in_dims, multiplied_with = parameter.get_metadata().get("num_in_dims"), None
        if path == output_table:
            multiplied_with = "target_token"
        elif num_in_dims is not None:
            around = [path[:length] for length in reversed(range(len(path))) if path[:length] in named]
            if not around:
                raise ValueError(
                    f"{type(model).__name__}.parameter_roles must say how often the kernel {'/'.join(map(str, path))} "
                    "is used: name a module that holds it."
                )
            multiplied_with = named[around[0]]
        shape = parameter.get_value().shape
        return ParameterInfo(shape, logical_axes_of(path, parameter), num_in_dims, multiplied_with)

    found = {path: info(path, node) for path, node in nodes.items() if isinstance(node, nnx.Param)}
    return nnx.to_pure_dict(nnx.from_flat_state(found))
