"""The parameters of a translator: as a training keeps them, and as searches read them.

Every device has a copy of all parameters, if its memory has room for one. Then each device searches by itself.
Otherwise the parameters are split over the mesh, and all devices search together.
"""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from flax_transformer.errors import ConfigError
from flax_transformer.inference.prepare import (
    InferenceParams,
    is_quantized,
    prepare_for_inference,
    prepared_shardings,
    quantized_params,
)
from flax_transformer.models.parameters import GraphDef, Params
from flax_transformer.parallel import processes
from flax_transformer.parallel.memory import available_bytes, stored_bytes
from flax_transformer.parallel.mesh import MeshConfig, make_mesh
from flax_transformer.parallel.placement import fetch, placed, replicated, spans_processes
from flax_transformer.parallel.sharding_rules import parameter_shardings

Value = TypeVar("Value")

# Copies of the parameters may take this share of a device's free memory. The search takes the rest, mostly for caches.
COPIES_SHARE = 0.5


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
        params: parameters on the devices, or their shapes to compile for.
        mesh: all devices.
        search_meshes: one mesh whose devices run each search together, or several that search side by side.
        sharded: whether the parameters are split over the devices. Otherwise every device has a copy.
        programs: compiled programs by their settings and shapes. All copies of a translator share them.
    """

    graphdef: GraphDef = field(repr=False)
    num_models: int
    params: Params = field(repr=False)
    mesh: Mesh
    search_meshes: tuple[Mesh, ...]
    sharded: bool = False
    programs: dict[Any, Any] = field(default_factory=dict, repr=False)
    # `dataclasses.replace` makes a new one.
    _prepared: Once[list[InferenceParams]] = field(default_factory=Once, init=False, repr=False)

    @property
    def are_quantized(self) -> bool:
        """Whether weights are 8-bit integers."""
        return is_quantized(self.params)

    def quantized(self) -> Params:
        """Returns `params` with 8-bit integers for weights."""
        return quantized_params(self.graphdef, self.num_models, self.params)

    @functools.cached_property
    def are_finite(self) -> bool:
        """Whether all parameters are finite numbers."""
        return all(bool(fetch(jnp.isfinite(leaf).all())) for leaf in jax.tree.leaves(self.params))

    @functools.cached_property
    def num_bytes(self) -> int:
        """Number of bytes of `params` on each device."""
        return stored_bytes(self.params)

    @property
    def num_loops(self) -> int:
        """Number of loops that a search mesh runs: one on each device, or one on all devices together."""
        return 1 if self.sharded else self.search_meshes[0].size

    def with_params(self, params: Params) -> "Parameters":
        """Returns other parameters of the same shapes, in the same place. They share the compiled programs."""
        if self.sharded:
            params = placed(params, jax.tree.map(lambda leaf: leaf.sharding, self.params))
        else:
            params = replicated(params, self.mesh)
        return dataclasses.replace(self, params=params)

    def prepared(self) -> list[InferenceParams]:
        """Returns the parameters as a search reads them, for each search mesh. If `params` are shapes, so are these.

        The first call makes them. They are kept beside `params`.
        """
        return self._prepared.get(self._prepare)

    def _prepare(self) -> list[InferenceParams]:
        key = "prepare", shapes_of(self.params)
        if key not in self.programs:
            with jax.set_mesh(self.mesh):
                self.programs[key] = self._lowered_preparation().compile()
        make = self.programs[key]
        abstract = isinstance(jax.tree.leaves(self.params)[0], jax.ShapeDtypeStruct)
        graphdef, params = make.out_info if abstract else make(self.params)
        if self.sharded:
            return [InferenceParams(graphdef, placed(params, make.output_shardings.params))]
        if len(self.search_meshes) > 1 and not abstract:
            params = jax.tree.map(np.asarray, params)  # all devices then read the same memory without a copy
        return [InferenceParams(graphdef, replicated(params, mesh)) for mesh in self.search_meshes]

    def _lowered_preparation(self) -> Any:
        """Returns the program that prepares the parameters, lowered for the mesh in context."""
        if not self.sharded:
            return prepare_for_inference.lower(self.graphdef, self.num_models, self.params)
        prepare = functools.partial(prepare_for_inference, self.graphdef, self.num_models, sharded=True)
        shardings = prepared_shardings(jax.eval_shape(prepare, self.params), self.mesh)
        return jax.jit(prepare, out_shardings=shardings).lower(self.params)


def must_be_sharded(params: Params, mesh: Mesh, num_models: int = 1, reserved_bytes: int = 0) -> bool:
    """Returns whether parameters are too large for a copy on every device, and the mesh can split them.

    A device would have two copies: one as a training keeps them, and one as a search reads them.

    Args:
        params: parameters as a training keeps them, or their shapes.
        mesh: the devices.
        num_models: number of models that each have such parameters.
        reserved_bytes: bytes on each device that other arrays take.

    If the mesh spans processes, all of them must call this function, and the first one decides.
    """
    if mesh.shape["data"] == mesh.size:
        return False
    num_bytes = num_models * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))

    def is_too_large() -> bool:
        available = available_bytes(mesh)
        return available is not None and 2 * num_bytes > COPIES_SHARE * (available - reserved_bytes)

    # Hosts may differ in memory, and all must do the same.
    return processes.from_first(is_too_large) if spans_processes(mesh) else is_too_large()


def mesh_that_shards(abstract_params: Any, devices: list[jax.Device] | None = None) -> Mesh:
    """Returns the mesh that splits the parameters of a model over most devices.

    Among equals it is the one with most devices along "tensor", where devices exchange the fewest bytes.

    Args:
        abstract_params: the `nnx.State` of a model, with shapes.
        devices: devices of the mesh; None means all devices of JAX.
    """
    num = make_mesh(MeshConfig(), devices).size
    divisors = [n for n in range(num, 0, -1) if num % n == 0]
    for shards, tensor in ((a, b) for a in divisors for b in divisors if a % b == 0):
        mesh = make_mesh(MeshConfig(num // shards, shards // tensor, tensor), devices)
        with contextlib.suppress(ConfigError):  # an axis does not divide a dimension
            parameter_shardings(abstract_params, mesh)
            return mesh
    raise AssertionError("one shard divides every dimension")


def stacked_shardings(shardings: Any, num_models: int) -> Any:
    """Returns the shardings of an ensemble's parameters from those of one model. The axis of models is not split."""
    if num_models == 1:
        return shardings
    return jax.tree.map(lambda each: NamedSharding(each.mesh, jax.P(None, *each.spec)), shardings)


def shapes_of(tree: Any) -> Any:
    """Returns the structure, shapes and dtypes of `tree`, for which a program is compiled."""
    return jax.tree.structure(tree), tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree))
