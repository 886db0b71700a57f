"""The search of a model some steps at a time, for a caller that has something to do between steps."""

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from flax_transformer.decoding import beam_search
from flax_transformer.decoding.beam_search import BeamSearchConfig
from flax_transformer.decoding.beam_state import BeamState
from flax_transformer.decoding.hypotheses import Hypotheses
from flax_transformer.errors import ConfigError
from flax_transformer.inference.programs import Programs
from flax_transformer.inference.requests import Request
from flax_transformer.inference.search_program import (
    SearchConfig,
    SearchInputs,
    decoder_functions,
    make_processors,
    model_functions,
    scoring,
)
from flax_transformer.models.parameters import GraphDef, Params
from flax_transformer.parallel.sharding_rules import stationary_weights


@dataclass(frozen=True, eq=False)
class SteppedSearch:
    """A beam search of some requests, which the caller drives. Searches of equal shapes share compiled programs.

    Attributes:
        mesh: devices that search.
        sharded: whether the parameters are split over these devices.
        graphdef: graph of the model, as `prepare_for_inference` gives it.
        spec: static settings of the search.
        params: parameters of `prepare_for_inference`.
        inputs: input arrays of the search; request n is in row n.

    Example:
        >>> from flax_transformer import Translator
        >>> from flax_transformer.decoding.beam_search import is_running
        >>> from flax_transformer.parallel.mesh import MeshConfig, make_mesh
        >>> translator = Translator.load("runs/number_words", make_mesh(MeshConfig(data=1)))
        >>> reader = translator.requests
        >>> search = SteppedSearch.of(translator.programs(reader), [reader.read("one"), reader.read("two")])
        >>> state = search.start()
        >>> while is_running(state):
        ...     state = search.advance(state, 8)
        >>> found = search.finish(state)
        >>> bool(found.lengths[0, 0] > 0), bool(found.lengths[1, 0] > 0)
        (True, True)
    """

    mesh: Mesh
    sharded: bool
    graphdef: GraphDef
    spec: SearchConfig
    params: Params
    inputs: SearchInputs

    @classmethod
    def of(cls, programs: Programs, requests: Sequence[Request]) -> "SteppedSearch":
        """Returns the search of requests.

        Args:
            programs: settings and parameters, of a translator on one device or with parameters that are split.
            requests: one to `programs.num_sentences` requests of one shape, none of them empty.

        Raises:
            ConfigError: too many requests, requests of several shapes, or an empty one. Or another method than beam
                search, or devices that search side by side or each by itself.
        """
        parameters, shapes = programs.parameters, {request.shape for request in requests}
        if len(shapes) != 1:
            raise ConfigError(f"a search in steps needs requests of one shape, got {sorted(shapes)}.")
        if len(requests) > programs.num_sentences or not all(request.source for request in requests):
            raise ConfigError(
                f"a search in steps takes up to {programs.num_sentences} requests with a token each, got "
                f"{len(requests)}, of which {sum(not request.source for request in requests)} are empty."
            )
        if len(parameters.search_meshes) > 1 or parameters.num_loops > 1:
            raise ConfigError(
                f"a search in steps is one loop, and {parameters.mesh.size} devices search by themselves here. Load "
                "the translator with a mesh of one device."
            )
        (shape,), (mesh,) = shapes, parameters.search_meshes
        if not isinstance((spec := programs.spec(shape)).method, BeamSearchConfig):
            raise ConfigError("a search in steps is a beam search, got decoding.method: sampling. Set it to beam.")
        graphdef, params = parameters.prepared()[0]
        return cls(mesh, parameters.sharded, graphdef, spec, params, programs.inputs(requests, shape, mesh))

    def start(self) -> BeamState:
        """Returns the state before the first step (see `beam_search.start`)."""
        with jax.set_mesh(self.mesh):
            return _start(self.sharded, self.graphdef, self.spec, self.params, self.inputs)

    def advance(self, state: BeamState, max_steps: int) -> BeamState:
        """Returns the state after at most `max_steps` steps (see `beam_search.advance`). The given one is deleted."""
        with jax.set_mesh(self.mesh):
            steps = jnp.int32(max_steps)
            return _advance(self.sharded, self.graphdef, self.spec, self.params, self.inputs, state, steps)

    def finish(self, state: BeamState) -> Hypotheses:
        """Returns the outputs so far, as arrays of NumPy (see `beam_search.finish`). The state stays."""
        with jax.set_mesh(self.mesh):
            found = _finish(self.spec, state)
        found = found if self.spec.keep_attention else dataclasses.replace(found, auxiliary=None)
        return jax.tree.map(np.asarray, found)


def _activations(sharded: bool) -> contextlib.AbstractContextManager[None]:
    """Shards activations as `sharded_search` does, if the parameters are split."""
    return stationary_weights() if sharded else contextlib.nullcontext()


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _start(sharded: bool, graphdef: GraphDef, spec: SearchConfig, params: Params, inputs: SearchInputs) -> BeamState:
    with _activations(sharded):
        functions, empty = decoder_functions(model_functions(graphdef, params, spec), spec, inputs)
        processors = make_processors(spec, inputs)
        return beam_search.start(functions, _beam(spec), empty, inputs.max_lengths, processors, *scoring(spec, inputs))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def _advance(
    sharded: bool,
    graphdef: GraphDef,
    spec: SearchConfig,
    params: Params,
    inputs: SearchInputs,
    state: BeamState,
    max_steps: Int[Array, ""],
) -> BeamState:
    with _activations(sharded):
        functions, _ = decoder_functions(model_functions(graphdef, params, spec), spec, inputs)
        return beam_search.advance(functions, _beam(spec), state, max_steps)


@functools.partial(jax.jit, static_argnums=0)
def _finish(spec: SearchConfig, state: BeamState) -> Hypotheses:
    return beam_search.finish(_beam(spec), state)


def _beam(spec: SearchConfig) -> BeamSearchConfig:
    assert isinstance(spec.method, BeamSearchConfig), "`SteppedSearch.of` refuses sampling"
    return spec.method
