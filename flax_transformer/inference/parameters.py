"""The parameters of a translator: as a training keeps them, and as searches read them."""

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from flax_transformer.inference.prepare import InferenceParams, is_quantized, prepare_for_inference, quantized_params
from flax_transformer.parallel.placement import fetch, replicated

Value = TypeVar("Value")


class Once(Generic[Value]):
    """A value that is made on the first request. Several threads may ask for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: list[Value] = []

    def get(self, make: Callable[[], Value]) -> Value:
        """Returns the value. The first call makes it by `make`."""
        with self._lock:
            if not self._made:
                self._made.append(make())
            return self._made[0]


@dataclass(frozen=True, eq=False)
class Parameters:
    """The parameters of a model or ensemble on the devices of a mesh.

    Attributes:
        graphdef: graph of the model.
        num_models: number of an ensemble's models; their parameters are stacked.
        params: parameters with a copy on every device, or their shapes to compile for.
        mesh: all devices.
        search_meshes: one mesh whose devices run each search together, or several that search side by side.
        programs: compiled programs by their settings and shapes. All copies of a translator share them.
    """

    graphdef: Any = field(repr=False)
    num_models: int
    params: Any = field(repr=False)
    mesh: Mesh
    search_meshes: tuple[Mesh, ...]
    programs: dict[Any, Any] = field(default_factory=dict, repr=False)
    # `dataclasses.replace` makes a new one.
    _prepared: Once[list[InferenceParams]] = field(default_factory=Once, init=False, repr=False)

    @property
    def are_quantized(self) -> bool:
        """Whether weights are 8-bit integers."""
        return is_quantized(self.params)

    def quantized(self) -> Any:
        """Returns `params` with 8-bit integers for weights."""
        return quantized_params(self.graphdef, self.num_models, self.params)

    @functools.cached_property
    def are_finite(self) -> bool:
        """Whether all parameters are finite numbers."""
        return all(bool(np.isfinite(fetch(leaf)).all()) for leaf in jax.tree.leaves(self.params))

    @functools.cached_property
    def num_bytes(self) -> int:
        """Number of bytes of `params` on each device."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.params))

    def prepared(self) -> list[InferenceParams]:
        """Returns the parameters as a search reads them, for each search mesh. If `params` are shapes, so are these.

        The first call makes them. They are kept beside `params`.
        """
        return self._prepared.get(self._prepare)

    def _prepare(self) -> list[InferenceParams]:
        key = "prepare", shapes_of(self.params)
        if key not in self.programs:
            with jax.set_mesh(self.mesh):
                lowered = prepare_for_inference.lower(self.graphdef, self.num_models, self.params)
            self.programs[key] = lowered.compile()
        make = self.programs[key]
        abstract = isinstance(jax.tree.leaves(self.params)[0], jax.ShapeDtypeStruct)
        graphdef, params = make.out_info if abstract else make(self.params)
        if len(self.search_meshes) > 1 and not abstract:
            params = jax.tree.map(np.asarray, params)  # all devices then read the same memory without a copy
        return [InferenceParams(graphdef, replicated(params, mesh)) for mesh in self.search_meshes]


def shapes_of(tree: Any) -> Any:
    """Returns the structure, shapes and dtypes of `tree`, for which a program is compiled."""
    return jax.tree.structure(tree), tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree))
