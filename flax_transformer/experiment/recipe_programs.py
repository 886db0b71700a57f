"""The train step and the search of a recipe, traced and compiled for hardware that may only be described.

They are made from shapes alone, by the functions that a training and a translator call. The search is a plain beam
search, without the recipe's logits processors.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.stages import Traced

from flax_transformer.config.recipe import Config
from flax_transformer.data.batching import BatchShape
from flax_transformer.data.tokenizer_pair import learnt_kind
from flax_transformer.inference.prepare import InferenceParams, prepare_for_inference, prepared_shardings
from flax_transformer.inference.programs import ProgramOptions, beam_search_config
from flax_transformer.inference.search_program import SearchConfig, SearchInputs, traced_search
from flax_transformer.models.build import VocabularyInfo
from flax_transformer.optim.optimizer import make_optimizer
from flax_transformer.optim.schedule import make_schedule
from flax_transformer.parallel.memory import compile_checked
from flax_transformer.parallel.mesh import all_devices_sharding, batch_sharding, check_rows, replicated_sharding
from flax_transformer.parallel.placement import placed
from flax_transformer.parallel.sharding_rules import parameter_shardings
from flax_transformer.parallel.topology import Program
from flax_transformer.shapes import Batch
from flax_transformer.training.state import abstract_model, describe_parameters, make_layout
from flax_transformer.training.step import Objective, jit_train_step


@dataclass(frozen=True)
class RecipePrograms:
    """The programs of a recipe on a mesh.

    Attributes:
        config: the recipe.
        vocabulary: sizes and start token of its tokenizers.
        mesh: mesh of devices that are present or described. Programs for an abstract mesh can be traced, not compiled.
    """

    config: Config
    vocabulary: VocabularyInfo
    mesh: Mesh | AbstractMesh

    def traced_train_step(self, shape: BatchShape) -> Traced:
        """Returns the train step on batches of one shape, before it is compiled.

        Raises:
            ConfigError: the mesh does not divide the rows.
        """
        config, mesh = self.config, self.mesh
        check_rows(shape.rows, mesh, ("data", "fsdp"), "a batch")
        schedule = make_schedule(config.optimizer, config.model.model_dim)
        optimizer = make_optimizer(config.optimizer, schedule, describe_parameters(config.model, self.vocabulary))
        layout = make_layout(config.model, self.vocabulary, optimizer, mesh, config.training.ema_decay)
        objective = Objective(config.training.label_smoothing, config.training.r_drop)
        step = jit_train_step(
            layout, schedule, objective, config.training.seed, mesh, config.batching.gradient_accumulation_steps
        )
        source, target = (
            jax.ShapeDtypeStruct((shape.rows, length), "int32", sharding=batch_sharding(mesh))
            for length in (shape.source_length, shape.target_length)
        )
        with jax.sharding.use_abstract_mesh(self._abstract_mesh):
            return step.trace(layout.abstract, Batch(source, source, source, target, target, target))

    def train_step(self, shape: BatchShape) -> Program:
        """Returns the train step on batches of one shape, compiled.

        Raises:
            ConfigError: the mesh does not divide the rows, or a device has too little memory.
        """
        return self._compiled("train step", self.traced_train_step(shape), "Lower batching.tokens_per_batch.")

    def prepared(self, sharded: bool = False) -> InferenceParams:
        """Returns the graph definition, and the shapes of the parameters, in the form that a search reads.

        Args:
            sharded: whether the parameters are split over the mesh. Otherwise every device has a copy.
        """
        graphdef, params = abstract_model(self.config.model, self.vocabulary)

        def prepare(params: Any) -> InferenceParams:
            return prepare_for_inference(graphdef, 1, params, sharded=sharded)

        with jax.sharding.use_abstract_mesh(self._abstract_mesh):
            prepared = jax.eval_shape(prepare, nnx.to_pure_dict(params))
        if sharded:
            parameter_shardings(params, self.mesh)  # raises
            return placed(prepared, prepared_shardings(prepared, self.mesh))
        return placed(prepared, jax.tree.map(lambda _: replicated_sharding(self.mesh), prepared))

    def traced_search(self, source_length: int, max_length: int, sharded: bool = False) -> Traced:
        """Returns the beam search of sentences of one length, before it is compiled.

        Args:
            source_length: number of tokens of each sentence, end token included.
            max_length: maximum number of tokens of an output, end token included.
            sharded: whether the parameters are split over the mesh, and its devices search together.

        Raises:
            ConfigError: the mesh does not divide the rows, or sharded parameters.
        """
        decoding, mesh, options = self.config.decoding, self.mesh, ProgramOptions()
        check_rows(decoding.batch_size, mesh, tuple(mesh.axis_names), "decoding.batch_size")
        slots = decoding.batch_size if sharded else decoding.batch_size // mesh.size
        special = learnt_kind(self.config.tokenizer).special_ids(self.config.tokenizer)
        special = replace(special, start=self.vocabulary.start_token)
        beam = beam_search_config(
            decoding, special, num_hypotheses=1, num_slots=slots, max_length=max_length, options=options
        )
        rows = replicated_sharding(mesh) if sharded else all_devices_sharding(mesh)
        inputs = self._inputs(options.sentences_per_row * decoding.batch_size, source_length, rows)
        graphdef, params = self.prepared(sharded)
        return traced_search(graphdef, SearchConfig(method=beam), mesh, params, inputs, sharded)

    def search(self, source_length: int, max_length: int, sharded: bool = False) -> Program:
        """Returns the beam search of sentences of one length, compiled. The arguments are those of `traced_search`.

        Raises:
            ConfigError: the mesh does not divide the rows or sharded parameters, or a device has too little memory.
        """
        traced = self.traced_search(source_length, max_length, sharded)
        return self._compiled("search", traced, "Lower decoding.batch_size.")

    @property
    def _abstract_mesh(self) -> AbstractMesh:
        return self.mesh.abstract_mesh if isinstance(self.mesh, Mesh) else self.mesh

    def _compiled(self, name: str, traced: Traced, advice: str) -> Program:
        mesh = self.mesh
        assert isinstance(mesh, Mesh), "of an abstract mesh programs are traced only: it has no devices to compile for"
        return Program.of(name, lambda: compile_checked(traced.lower(), mesh, f"the {name}", advice))

    def _inputs(self, num_sentences: int, source_length: int, sharding: NamedSharding) -> SearchInputs:
        """Returns the shapes of a plain search's inputs: no prefix, no required phrase, no suppressed token."""

        def rows(*shape: int, num: int = num_sentences) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((num, *shape), "int32", sharding=sharding)

        return SearchInputs(
            tokens=rows(source_length),
            segments=rows(source_length),
            max_lengths=rows(),
            min_lengths=rows(num=0),
            prefixes=rows(0),
            required=rows(0, 0),
            seeds=rows(),
            suppressed=jax.ShapeDtypeStruct((0,), "bool", sharding=replicated_sharding(self.mesh)),
        )
