"""Translation from text to text: requests, programs that search, and answers in the order of the sentences."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import chex
from jax.sharding import Mesh

from flax_transformer.config.recipe import DecodingConfig, Method
from flax_transformer.data.tokenizer_pair import TokenizerPair
from flax_transformer.errors import ConfigError, check_type, did_you_mean, shown
from flax_transformer.inference.constraints import Constraints
from flax_transformer.inference.ensemble import open_ensemble, restore_ensemble
from flax_transformer.inference.parameters import Parameters, must_be_sharded, stacked_shardings
from flax_transformer.inference.prepare import Quantize
from flax_transformer.inference.programs import ProgramOptions, Programs, rounded_up
from flax_transformer.inference.requests import Request, RequestReader, check_call
from flax_transformer.inference.results import ResultReader
from flax_transformer.inference.translation import NoTranslation, Translation
from flax_transformer.models.build import ModelConfig, vocabulary_info
from flax_transformer.models.parameters import Params
from flax_transformer.object_storage import AnyPath
from flax_transformer.parallel.mesh import search_meshes
from flax_transformer.parallel.placement import local_mesh, placed, replicated
from flax_transformer.parallel.sharding_rules import parameter_shardings
from flax_transformer.training.checkpoint import Choice
from flax_transformer.training.state import abstract_model


@dataclass(frozen=True, eq=False)
class Translator:
    """Translates lists of sentences with a trained model. Threads may share one.

    Attributes:
        model: configuration of the model.
        tokenizers: tokenizers of both sides.
        decoding: settings of the search.
        parameters: parameters of the model or ensemble, on their devices.
        options: sizes of the search programs.

    Example:
        >>> translator = Translator.load("runs/number_words")
        >>> found = translator.translate(["twenty-one", ""], beam_size=3, num_hypotheses=2)
        >>> len(found), found[1].text
        (2, '')
    """

    model: ModelConfig
    tokenizers: TokenizerPair
    decoding: DecodingConfig
    parameters: Parameters
    options: ProgramOptions = ProgramOptions()

    @classmethod
    def from_params(
        cls,
        model: ModelConfig,
        tokenizers: TokenizerPair,
        params: Params,
        decoding: DecodingConfig,
        mesh: Mesh,
        num_models: int = 1,
        side_by_side: bool = False,
        sharded: bool | None = None,
        reserved_bytes: int = 0,
    ) -> "Translator":
        """Returns the translator of parameters.

        Args:
            model: configuration of the model.
            tokenizers: tokenizers of both sides.
            params: parameters of the model; those of an ensemble's models are stacked.
            decoding: settings of the search.
            mesh: devices. If they belong to several processes, all of these make the same calls, and each searches its
                share of the sentences.
            num_models: number of an ensemble's models; 1 for a single model.
            side_by_side: whether each CPU device searches by itself (see `search_meshes`). Compilation then takes
                longer, and long texts run faster. Sharded parameters exclude it.
            sharded: whether the parameters are split over the axes "fsdp" and "tensor" of the mesh, and all devices
                search together. None does so if they are too large for a copy on every device.
            reserved_bytes: bytes on each device that other arrays take.

        Raises:
            ConfigError: the parameters are split, and an axis does not divide a dimension.
        """
        graphdef, abstract_params = abstract_model(model, vocabulary_info(tokenizers))
        if sharded is None:
            sharded = must_be_sharded(params, mesh, reserved_bytes=reserved_bytes)
        if sharded:
            shardings = stacked_shardings(parameter_shardings(abstract_params, mesh), num_models)
            parameters = Parameters(graphdef, num_models, placed(params, shardings), mesh, (mesh,), sharded=True)
            return cls(model, tokenizers, decoding, parameters)
        local = local_mesh(mesh)
        meshes = tuple(search_meshes(local)) if side_by_side else (local,)
        parameters = Parameters(graphdef, num_models, replicated(params, mesh), mesh, meshes)
        return cls(model, tokenizers, decoding, parameters)

    @classmethod
    def load(
        cls,
        run: AnyPath | str | Sequence[AnyPath | str],
        mesh: Mesh | None = None,
        checkpoint: Choice = "best",
        quantize: Quantize = "none",
        sharded: bool | None = None,
    ) -> "Translator":
        """Returns the translator of a run folder, or of several as an ensemble.

        An ensemble averages its models' probabilities at every step. Its runs need the same section `model` and the
        same tokenizers. The first run gives the settings of the search.

        Args:
            run: a run folder, or several.
            mesh: devices; None uses all. If the parameters are split, None chooses the mesh that splits them most.
            checkpoint: "best" is the best one on validation text, "last" the newest.
            quantize: "int8" makes weights 8-bit integers. It is faster on a CPU with instructions for them. "bfloat16"
                computes in bfloat16. It is faster on an accelerator, and on a CPU with matrix instructions (AMX).
            sharded: see `from_params`. No device ever has all of the parameters that are split.

        Raises:
            RunFolderError: not a run folder, or one whose tokenizer or checkpoint is missing or damaged. Or the runs do
                not form an ensemble.
            ConfigError: no run at all, or an unknown `checkpoint` or `quantize`. Or the parameters are split, and an
                axis of `mesh` does not divide a dimension.
        """
        check_type("quantize", quantize, Quantize)
        folders = open_ensemble(run)
        config = folders[0].read_config()
        params, mesh, sharded = restore_ensemble(folders, mesh, checkpoint, sharded)
        model = dataclasses.replace(config.model, compute_dtype="bfloat16") if quantize == "bfloat16" else config.model
        of_run = model, folders[0].tokenizers(), params, config.decoding, mesh
        made = cls.from_params(*of_run, len(folders), side_by_side=True, sharded=sharded)
        return made.quantized() if quantize == "int8" else made

    def with_params(self, params: Params) -> "Translator":
        """Returns a translator with other parameters of the same shapes. It shares the compiled programs."""
        chex.assert_trees_all_equal_shapes_and_dtypes(params, self.params)  # merging a model does not check
        return dataclasses.replace(self, parameters=self.parameters.with_params(params))

    def quantized(self) -> "Translator":
        """Returns a translator whose weights are 8-bit integers; itself if they are already."""
        if self.parameters.are_quantized:
            return self
        params = self.parameters.quantized()
        return dataclasses.replace(self, parameters=dataclasses.replace(self.parameters, params=params))

    def with_decoding(self, decoding: DecodingConfig) -> "Translator":
        """Returns a translator with other settings. It shares the parameters and compiled programs."""
        return dataclasses.replace(self, decoding=decoding)

    @property
    def params(self) -> Params:
        """The parameters, with a copy on every device or split over them. Those of an ensemble's models are stacked."""
        return self.parameters.params

    @property
    def mesh(self) -> Mesh:
        """All devices."""
        return self.parameters.mesh

    @property
    def batch_size(self) -> int:
        """The number of sentences searched at the same time, rounded up to a multiple of the number of devices."""
        return rounded_up(self.decoding.batch_size, self.mesh)

    @property
    def requests(self) -> RequestReader:
        """The reader that makes and checks the request of each sentence."""
        constraints = Constraints(self.tokenizers.target, self.decoding, self.model.max_target_length - 1)
        return RequestReader(self.tokenizers.source, constraints, self.model.max_source_length)

    def programs(self, requests: RequestReader, num_hypotheses: int = 1, attention: bool = False) -> Programs:
        """Returns the search programs for a reader's requests. For the other arguments see `translate`."""
        return Programs(self.parameters, requests.constraints, num_hypotheses, attention, self.options)

    def translate(
        self,
        sentences: Iterable[Any],
        *,
        num_hypotheses: int = 1,
        prefixes: Iterable[Any] | None = None,
        required: Iterable[Any] | None = None,
        attention: bool = False,
        **changes: Any,
    ) -> list[Translation | NoTranslation]:
        """Returns the answer for each sentence, in order: its translation, or the reason why it has none.

        A sentence has no translation if its prefix or a required phrase is impossible, or if the search finds no
        output. Other sentences are not affected. An empty sentence has an empty translation.

        Args:
            sentences: raw text, in any iterable such as a list, a generator, or a column of a table. Of a text that is
                too long for the model only the beginning is translated.
            num_hypotheses: most outputs for each sentence: the best of the beam, or samples.
            prefixes: beginning of each sentence's outputs: text, or a list of piece names (see `Hypothesis.tokens`),
                such as a token for the language of the output.
            required: phrases that the outputs of each sentence must contain. Each phrase is tokenised by itself. An
                output that reaches the maximum length first lists the phrases that it lacks.
            attention: whether hypotheses have their attention over the source.
            **changes: fields of `DecodingConfig` that replace the run's own, such as `beam_size=1`.

        Raises:
            ConfigError: a setting is out of range, unknown or contradicts another. Or an argument is a string instead
                of a list, a list of the wrong length, or has an item that is no text. Or a search needs more memory
                than a device has; nothing has been searched then.
        """
        if changes:
            other = self.with_decoding(changed(self.decoding, changes))
            return other.translate(
                sentences, num_hypotheses=num_hypotheses, prefixes=prefixes, required=required, attention=attention
            )
        check_call(self.model, self.decoding, num_hypotheses, attention, required is not None)
        reader = self.requests
        requests = reader.read_all(sentences, prefixes, required)
        results = ResultReader(self.tokenizers, self.decoding, num_hypotheses, self.parameters)
        answers = [each if isinstance(each, NoTranslation) else results.empty(each) for each in requests]
        waiting = {n: each for n, each in enumerate(requests) if isinstance(each, Request) and each.source}
        for found in self.programs(reader, num_hypotheses, attention).search(waiting):
            answers[found.index] = results.read(waiting[found.index], found.hypotheses, found.row)
        return answers

    def compile(self, sentences: Iterable[Any], reserved_bytes: int = 0) -> None:
        """Compiles all programs of `translate(sentences)`, for every device. A lack of memory is then found now.

        Without this call, `translate` compiles a program for a device when that device first needs it.

        Args:
            sentences: raw text; only the lengths matter.
            reserved_bytes: bytes on each device that other arrays take.

        Raises:
            ConfigError: a search needs more memory than a device has.
        """
        reader = self.requests
        requests = [each for each in reader.read_all(sentences) if isinstance(each, Request) and each.source]
        self.programs(reader).compile({request.shape for request in requests}, reserved_bytes)


def changed(decoding: DecodingConfig, changes: dict[str, Any]) -> DecodingConfig:
    """Returns a configuration with some fields replaced. A value of None leaves a field as it is.

    Raises:
        ConfigError: an unknown field, or a value out of range or of another type.
    """
    known = {f.name for f in dataclasses.fields(decoding)}
    for name in changes:
        if name not in known:
            raise ConfigError(f"unknown decoding option {shown(name)}.{did_you_mean(name, known)}")
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in changes.items() if value is not None
    }
    if "method" in given:  # drops settings of the other method
        check_type("decoding.method", given["method"], Method)
        decoding = decoding.with_method(given["method"])
    return dataclasses.replace(decoding, **given)
