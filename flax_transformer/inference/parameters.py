"""The parameters of a translator, in the form of scores and conversions, and in the form of searches."""

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from flax_transformer.inference.prepare import InferenceParams, is_quantized, prepare_for_inference, quantized_params
from flax_transformer.parallel.mesh import replicated_sharding

Value = TypeVar("Value")


class Once(Generic[Value]):
    """A value that is made once, on the first request, whichever thread asks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: list[Value] = []

    def get(self, make: Callable[[], Value]) -> Value:
        """Returns the value, which `make` makes if it is not there yet."""
        with self._lock:
            if not self._made:
                self._made.append(make())
            return self._made[0]


@dataclass(frozen=True, eq=False)
class Parameters:
    """A model's parameters on the devices of a mesh, and, once a search asks for them, as searches read them.

    Attributes:
        graphdef: graph of the model.
        num_models: number of an ensemble's models; their parameters are stacked.
        params: with a copy on every device; or the shapes of some, to compile for.
        mesh: all devices.
        search_meshes: the devices that search together; one mesh, or several that search side by side.
        programs: what has been compiled, by what it is compiled for. All copies of a translator share it.
    """

    graphdef: Any = field(repr=False)
    num_models: int
    params: Any = field(repr=False)
    mesh: Mesh
    search_meshes: tuple[Mesh, ...]
    programs: dict[Any, Any] = field(default_factory=dict, repr=False)
    # Each object has its own, also one that `dataclasses.replace` makes.
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
        """Whether every one of them is a finite number."""
        return all(bool(np.isfinite(np.asarray(leaf)).all()) for leaf in jax.tree.leaves(self.params))

    @functools.cached_property
    def num_bytes(self) -> int:
        """Bytes that `params` take up on each device."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.params))

    def prepared(self) -> list[InferenceParams]:
        """Returns the parameters as a search reads them, for each of its meshes; of shapes, the shapes.

        They are made for the first search, and kept beside `params`.
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
            params = jax.tree.map(np.asarray, params)  # no device makes a copy of it: all read the same memory
        return [InferenceParams(graphdef, replicated(params, mesh)) for mesh in self.search_meshes]


def shapes_of(tree: Any) -> Any:
    """Returns the structure, shapes and dtypes of `tree`, for which a program is compiled."""
    return jax.tree.structure(tree), tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree))


def replicated(params: Any, mesh: Mesh) -> Any:
    """Returns parameters, or the shapes of some, with a copy on every device."""
    sharding = replicated_sharding(mesh)

    def place(leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.device_put(leaf, sharding)

    return jax.tree.map(place, params)
