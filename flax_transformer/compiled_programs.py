"""The programs of a recipe, the train step and the search, compiled for devices that may only be described.

They are made by the functions that a training and a translator call, from shapes alone. So what is read from them is
what the hardware would run.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from flax_transformer.config import Config
from flax_transformer.data.batching import BatchShape
from flax_transformer.data.tokenizer import END_ID
from flax_transformer.decoding.beam_search import BeamSearchConfig
from flax_transformer.decoding.length_penalty import LengthPenalty
from flax_transformer.inference.search_program import SearchInputs, SearchSpec, for_search, jit_search
from flax_transformer.inference.translator import SENTENCES_A_ROW
from flax_transformer.models.build import VocabularyInfo
from flax_transformer.parallel.memory import compiled_within_memory
from flax_transformer.parallel.mesh import all_devices_sharding, check_rows, replicated_sharding
from flax_transformer.parallel.topology import Program
from flax_transformer.training.loop import compile_steps
from flax_transformer.training.optimizer import make_optimizer, make_schedule
from flax_transformer.training.state import abstract_model, make_layout
from flax_transformer.training.step import Objective, jit_train_step


@dataclass(frozen=True)
class RecipePrograms:
    """Compiles what a recipe runs on a mesh.

    Attributes:
        config: the recipe.
        vocabulary: sizes and special ids, which its tokenizers would tell.
        mesh: of devices that are there, or only described.
    """

    config: Config
    vocabulary: VocabularyInfo
    mesh: Mesh

    def train_step(self, shape: BatchShape) -> Program:
        """Returns the train step on batches of one shape.

        Raises:
            ConfigError: rows that do not divide over the mesh, or a device's memory does not suffice.
        """
        config, mesh = self.config, self.mesh
        check_rows(shape.rows, mesh, ("data", "fsdp"), "a batch")
        schedule = make_schedule(config.optimizer, config.model.model_dim)
        optimizer = make_optimizer(config.optimizer, schedule)
        layout = make_layout(config.model, self.vocabulary, optimizer, mesh, config.training.ema_decay)
        objective = Objective(config.training.label_smoothing, config.training.r_drop)
        step = jit_train_step(layout, schedule, objective, config.training.seed, mesh, config.batching.micro_batches)
        return Program.of("train step", lambda: compile_steps(step, layout.abstract, [shape], mesh)[tuple(shape)])

    def search(self, source_length: int, max_length: int) -> Program:
        """Returns the beam search of sentences of one length.

        Args:
            source_length: tokens of each sentence, end token included.
            max_length: tokens of an output at most, end token included.

        Raises:
            ConfigError: rows that do not divide over the mesh, or a device's memory does not suffice.
        """
        decoding, mesh = self.config.decoding, self.mesh
        check_rows(decoding.batch_rows, mesh, tuple(mesh.axis_names), "decoding.batch_rows")
        beam = BeamSearchConfig(
            decoding.beam_size,
            decoding.batch_rows // mesh.size,
            max_length,
            self.vocabulary.start_token,
            END_ID,
            LengthPenalty.parse(decoding.length_penalty),
            decoding.stop,
        )
        graphdef, params = self._prepared()
        inputs = self._inputs(SENTENCES_A_ROW * decoding.batch_rows, source_length)

        def compile_search() -> Any:
            lowered = jit_search(graphdef, SearchSpec(beam), mesh).lower(params, inputs)
            return compiled_within_memory(lowered, mesh, "the search", "Lower decoding.batch_rows.")

        return Program.of("search", compile_search)

    def _prepared(self) -> tuple[Any, Any]:
        """Returns the graph, and the shapes of the parameters, as a search reads them: a copy on every device."""
        graphdef, params = abstract_model(self.config.model, self.vocabulary)
        make: Callable = functools.partial(for_search, graphdef, 1)
        graphdef, params = jax.eval_shape(make, nnx.to_pure_dict(params))
        sharding = replicated_sharding(self.mesh)
        return graphdef, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), params)

    def _inputs(self, num_sentences: int, source_length: int) -> SearchInputs:
        """Returns the shapes of a plain search's inputs: no prefix, no phrase, no token that is excluded."""

        def rows(*shape: int, num: int = num_sentences) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((num, *shape), "int32", sharding=all_devices_sharding(self.mesh))

        return SearchInputs(
            tokens=rows(source_length),
            segments=rows(source_length),
            max_lengths=rows(),
            min_lengths=rows(num=0),
            prefixes=rows(0),
            required=rows(0, 0),
            seeds=rows(),
            banned=jax.ShapeDtypeStruct((0,), "bool", sharding=replicated_sharding(self.mesh)),
        )
