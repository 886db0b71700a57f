"""The programs of a search: static settings, input arrays, compilation, and the devices that run them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from flax_transformer.config.recipe import DecodingConfig
from flax_transformer.data.tokenizer import SpecialIds
from flax_transformer.decoding.beam_search import BeamSearchConfig
from flax_transformer.decoding.hypotheses import Hypotheses
from flax_transformer.decoding.length_penalty import LengthPenalty
from flax_transformer.decoding.logits_processors import ANY
from flax_transformer.decoding.sampling import SamplingConfig
from flax_transformer.inference.chunks import Chunk, Shape, cut_into_chunks, largest_shapes, run_on_workers
from flax_transformer.inference.constraints import Constraints
from flax_transformer.inference.padding import padded_sentences
from flax_transformer.inference.parameters import Parameters, shapes_of
from flax_transformer.inference.requests import Request, num_awaited, num_beams
from flax_transformer.inference.search_program import SearchConfig, SearchInputs, traced_search
from flax_transformer.inference.shares import Found, exchange_results, own_share
from flax_transformer.parallel.memory import compile_checked
from flax_transformer.parallel.mesh import all_devices_sharding, replicated_sharding
from flax_transformer.parallel.placement import put, spans_processes


@dataclass(frozen=True)
class ProgramOptions:
    """Sizes of a search's programs. They change no result.

    Attributes:
        sentences_per_row: most sentences of one call for each slot. Slots are empty near the end of a call, so larger
            calls waste fewer steps. The memory for their results is the limit.
        sentences_per_row_with_attention: the same for results with attention, which are larger.
        refill_share: slots are refilled once 1 / `refill_share` of them are empty.
    """

    sentences_per_row: int = 64
    sentences_per_row_with_attention: int = 8
    refill_share: int = 16

    def refill_at(self, num_slots: int) -> int:
        """Returns the number of empty slots at which they are refilled."""
        return max(1, num_slots // self.refill_share)


def beam_search_config(
    decoding: DecodingConfig,
    special: SpecialIds,
    num_hypotheses: int,
    num_slots: int,
    max_length: int,
    options: ProgramOptions,
) -> BeamSearchConfig:
    """Returns the static settings of a translator's beam search.

    Args:
        decoding: settings of the search.
        special: special ids of the target.
        num_hypotheses: most outputs for each sentence.
        num_slots, max_length: see `BeamSearchConfig`.
        options: sizes of the program.
    """
    return BeamSearchConfig(
        beam_size=decoding.beam_size,
        num_slots=num_slots,
        max_length=max_length,
        start_token=special.start,
        end_token=special.end,
        length_penalty=LengthPenalty.parse(decoding.length_penalty),
        stop=decoding.stop,
        num_awaited=num_awaited(decoding, num_hypotheses),
        refill_at=options.refill_at(num_slots),
        excluded=tuple(sorted(special.never_in_outputs)),
    )


@dataclass(frozen=True)
class Programs:
    """The search programs for one set of settings.

    Attributes:
        parameters: parameters of the model on its devices, with the programs compiled so far.
        constraints: settings, tokenizer and limits of the outputs.
        num_hypotheses: most outputs for each sentence.
        attention: whether the attention over the source is returned.
        options: sizes of the programs.
    """

    parameters: Parameters
    constraints: Constraints
    num_hypotheses: int
    attention: bool
    options: ProgramOptions = ProgramOptions()

    @property
    def batch_size(self) -> int:
        """Number of sentences that each search mesh searches at the same time."""
        mesh, search_mesh = self.parameters.mesh, self.parameters.search_meshes[0]
        return rounded_up(self.constraints.decoding.batch_size, mesh) * search_mesh.size // mesh.size

    @property
    def num_sentences(self) -> int:
        """Most sentences of one call of a program."""
        decoding, options = self.constraints.decoding, self.options
        if decoding.method == "sampling":
            return self.batch_size
        keeps_attention = self.attention or decoding.coverage_penalty > 0
        multiple = options.sentences_per_row_with_attention if keeps_attention else options.sentences_per_row
        return self.batch_size * multiple

    def spec(self, shape: Shape) -> SearchConfig:
        """Returns the static settings of a search for requests of one shape."""
        constraints, decoding = self.constraints, self.constraints.decoding
        return SearchConfig(
            method=self._method(constraints.max_length(shape.source, shape.prefix + shape.phrases * shape.phrase)),
            no_repeat_ngram=decoding.no_repeat_ngram,
            repetition_penalty=decoding.repetition_penalty,
            suppress_sequences=tuple(tuple(phrase) for phrase in constraints.suppress_sequences.values()),
            force_eos=decoding.force_eos,
            coverage_penalty=decoding.coverage_penalty,
            keep_attention=self.attention,
            num_models=self.parameters.num_models,
        )

    def _method(self, max_length: int) -> BeamSearchConfig | SamplingConfig:
        """Returns the settings of a beam search or of sampling, for outputs of at most `max_length` tokens."""
        decoding, special = self.constraints.decoding, self.constraints.target.special
        if decoding.sampling is None:
            slots = self.batch_size // self.parameters.num_loops
            return beam_search_config(decoding, special, self.num_hypotheses, slots, max_length, self.options)
        return SamplingConfig(
            num_samples=num_beams(decoding, self.num_hypotheses),
            max_length=max_length,
            start_token=special.start,
            end_token=special.end,
            length_penalty=LengthPenalty.parse(decoding.length_penalty),
            token=decoding.sampling,
            excluded=tuple(sorted(special.never_in_outputs)),
        )

    def inputs(self, requests: Sequence[Request], shape: Shape, mesh: Mesh) -> SearchInputs:
        """Returns the inputs of a search for requests of one shape, in the rows of `places`; other rows are padding.

        Args:
            requests: at most `num_sentences`.
            shape: shape of each request.
            mesh: devices that run the search.
        """
        rows, decoding = self.num_sentences, self.constraints.decoding
        order = places(len(requests), rows, self.parameters.num_loops)
        tokens, _, segments = padded_sentences([request.source for request in requests], rows, shape.source, order)
        max_lengths, min_lengths = np.zeros((2, rows), np.int32)
        seeds = np.zeros(rows, np.int32)
        prefixes = np.full((rows, shape.prefix), ANY, np.int32)
        required = np.full((rows, shape.phrases, shape.phrase), ANY, np.int32)
        for row, request in zip(order, requests, strict=True):
            max_lengths[row] = request.max_length
            min_lengths[row] = decoding.min_length + 1
            seeds[row] = request.seed
            prefixes[row, : len(request.prefix)] = request.prefix
            for number, phrase in enumerate(request.phrases):
                required[row, number, : len(phrase)] = phrase
        everywhere = replicated_sharding(mesh)
        split = everywhere if self.parameters.sharded else all_devices_sharding(mesh)
        return SearchInputs(
            tokens=put(tokens, split),
            segments=put(segments, split),
            max_lengths=put(max_lengths, split),
            min_lengths=put(min_lengths if decoding.min_length else min_lengths[:0], split),
            prefixes=put(prefixes, split),
            required=put(required, split),
            seeds=put(seeds, split),
            suppressed=put(self._suppressed(), everywhere),
        )

    def _suppressed(self) -> np.ndarray:
        """Returns [vocabulary], True for tokens that no output may contain; an empty array if all are allowed."""
        target, decoding = self.constraints.target, self.constraints.decoding
        ids = set(self.constraints.suppress_tokens.values())
        if decoding.suppress_unknown and target.special.unknown is not None:
            ids.add(target.special.unknown)
        suppressed = np.zeros(target.vocab_size if ids else 0, bool)
        suppressed[list(ids)] = True
        return suppressed

    def compiled(self, spec: SearchConfig, inputs: SearchInputs, number: int, reserved_bytes: int = 0) -> Any:
        """Returns the search for inputs of these shapes, compiled for one mesh.

        Args:
            spec: static settings of the search.
            inputs: arrays of the shapes to compile for.
            number: number of the mesh.
            reserved_bytes: bytes on each device that other arrays take.

        Raises:
            ConfigError: the search needs more memory than a device has.
        """
        parameters = self.parameters
        num_rows = rounded_up(self.constraints.decoding.batch_size, parameters.mesh)
        mesh, sharded = parameters.search_meshes[number], parameters.sharded
        graphdef, params = parameters.prepared()[number]
        arguments = params, inputs
        key = number, spec, shapes_of(arguments)
        if key not in parameters.programs:
            parameters.programs[key] = compile_checked(
                traced_search(graphdef, spec, mesh, *arguments, sharded=sharded).lower(),
                parameters.mesh,
                f"a search of {num_rows} sentences at a time, with {spec.num_beams} hypotheses of at most "
                f"{spec.method.max_length} tokens for each,",
                "Lower decoding.beam_size (of sampling: the number of samples), decoding.batch_size, or the limits on "
                "the length, decoding.max_length_factor and max_length_offset.",
                reserved_bytes=reserved_bytes + parameters.num_bytes,
            )
        return parameters.programs[key]

    def compile(self, shapes: Iterable[Shape], reserved_bytes: int = 0) -> None:
        """Compiles the searches for requests of some shapes, for every mesh.

        Args:
            shapes: shapes of the requests.
            reserved_bytes: bytes on each device that other arrays take.

        Raises:
            ConfigError: a search needs more memory than a device has.
        """
        for shape in sorted(set(shapes)):
            for number, mesh in enumerate(self.parameters.search_meshes):
                self.compiled(self.spec(shape), self.inputs([], shape, mesh), number, reserved_bytes)

    def launch(self, requests: Sequence[Request], shape: Shape, number: int) -> Hypotheses:
        """Starts the search for requests of one shape on mesh `number`. Returns its results without waiting."""
        inputs = self.inputs(requests, shape, self.parameters.search_meshes[number])
        program = self.compiled(self.spec(shape), inputs, number)
        return program(self.parameters.prepared()[number].params, inputs)

    def chunks(self, requests: Mapping[int, Request]) -> list[Chunk]:
        """Returns the chunks of all requests, in the order in which their searches start."""
        groups: dict[Shape, list[int]] = {}
        for index, request in requests.items():
            groups.setdefault(request.shape, []).append(index)
        for members in groups.values():
            # The longest come first, so only short ones are left near the end, when slots are empty.
            members.sort(key=lambda index: -requests[index].num_tokens)
        return cut_into_chunks(groups, len(self.parameters.search_meshes), self.batch_size, self.num_sentences)

    def search(self, requests: Mapping[int, Request]) -> Iterator[Found]:
        """Yields the results of each request as soon as they are available.

        If the mesh spans processes, each process searches its share, and results come when all are there. With sharded
        parameters all processes search all requests together.

        Raises:
            ConfigError: a search needs more memory than a device has. Nothing has been searched then.
        """
        if spans_processes(self.parameters.mesh) and not self.parameters.sharded:
            return exchange_results(self._search(own_share(requests)))
        return self._search(requests)

    def _search(self, requests: Mapping[int, Request]) -> Iterator[Found]:
        def launch(number: int, chunk: Chunk) -> Hypotheses:
            return self.launch([requests[index] for index in chunk.members], chunk.shape, number)

        meshes, chunks = self.parameters.search_meshes, self.chunks(requests)
        self._compile_largest(chunks)
        for chunk, hypotheses in run_on_workers(chunks, len(meshes), launch):
            rows = places(len(chunk.members), self.num_sentences, self.parameters.num_loops)
            for row, index in zip(rows, chunk.members, strict=True):
                yield Found(index, hypotheses, row)

    def _compile_largest(self, chunks: Sequence[Chunk]) -> None:
        """Compiles the searches that may need the most memory, for the mesh that probably gets their first chunk."""
        meshes, workers = self.parameters.search_meshes, {}
        for turn, chunk in enumerate(chunks):
            workers.setdefault(chunk.shape, turn % len(meshes))
        for shape in largest_shapes(workers)[1:]:  # the very first chunk has the first one
            number = workers[shape]
            self.compiled(self.spec(shape), self.inputs([], shape, meshes[number]), number)


def rounded_up(num_rows: int, mesh: Mesh) -> int:
    """Returns `num_rows` rounded up to a multiple of the number of devices."""
    return -(-num_rows // mesh.size) * mesh.size


def places(num_sentences: int, rows: int, loops: int) -> list[int]:
    """Returns the row of each sentence. Loops get sentences in turn, so the padding of each loop is at its end."""
    return [(n % loops) * (rows // loops) + n // loops for n in range(num_sentences)]
