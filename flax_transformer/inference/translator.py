"""Text to text: tokenise, group by length, search inside XLA, and put everything back in order."""

import dataclasses
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from flax_transformer.config import DecodingConfig
from flax_transformer.data.tokenizer_pair import TokenizerPair
from flax_transformer.decoding.beam_search import BeamSearchConfig, num_awaited
from flax_transformer.decoding.hypotheses import Hypotheses
from flax_transformer.decoding.length_penalty import LengthPenalty
from flax_transformer.decoding.rules import ANY
from flax_transformer.errors import ConfigError, DivergenceError, RunFolderError, did_you_mean
from flax_transformer.inference.alignment import word_numbers
from flax_transformer.inference.chunks import Chunk, Shape, cut_into_chunks, length_bucket, run_on_workers
from flax_transformer.inference.demands import Demands, holds
from flax_transformer.inference.minimum_bayes_risk import expected_utilities
from flax_transformer.inference.quantize import Quantize, is_quantized, quantized_ensemble
from flax_transformer.inference.search_program import SearchInputs, SearchSpec, for_search, jit_search
from flax_transformer.inference.translation import EMPTY, Hypothesis, Translation
from flax_transformer.models.build import ModelConfig, vocabulary_info
from flax_transformer.parallel.memory import compiled_within_memory
from flax_transformer.parallel.mesh import (
    MeshConfig,
    all_devices_sharding,
    make_mesh,
    replicated_sharding,
    search_meshes,
)
from flax_transformer.run_folder import RunFolder
from flax_transformer.shapes import MASKED
from flax_transformer.training.checkpoint import Checkpoints, Choice
from flax_transformer.training.state import abstract_model

# Sentences that are searched by one call of a program, as a multiple of those that are searched at the same time. At
# its end slots fall empty, so the more the better; results bound them, above all where they hold attention.
SENTENCES_A_ROW = 64
SENTENCES_A_ROW_WITH_ATTENTION = 8
# Empty slots are refilled when they are this share of all: 1 / REFILL_SHARE.
REFILL_SHARE = 16
# Fields of section 'decoding' that may leave no token to go on with.
BANNING = ("min_length", "no_repeat_ngram", "ban_unknown", "banned_phrases", "banned_tokens")
# Of a sentence that an error names.
SHOWN_CHARACTERS = 80


class Translator:
    """Translates lists of sentences with a trained model.

    Example:
        translator = Translator.load("runs/number_words")
        translator.translate(["twenty-one"], beam_size=5, num_hypotheses=3)[0].text
    """

    def __init__(
        self,
        model: ModelConfig,
        tokenizers: TokenizerPair,
        params: Any,
        decoding: DecodingConfig,
        mesh: Mesh,
        num_models: int = 1,
        side_by_side: bool = False,
    ):
        """Makes a translator of parameters.

        Args:
            model: configuration of the model.
            tokenizers: of both sides.
            params: of the model, or of all models of an ensemble, stacked.
            decoding: settings of the search.
            mesh: devices.
            num_models: of an ensemble.
            side_by_side: whether devices take work one by one, each when it is free, where `search_meshes` does so;
                programs take longer to compile then, and long texts less time.
        """
        self.tokenizers = tokenizers
        self.decoding = decoding
        self.mesh = mesh
        self.max_source_length = model.max_source_length
        self.max_target_length = model.max_target_length
        self.has_attention = model.has_attention
        self.bans_start = model.may_output_start
        self.num_models = num_models
        self.graphdef, _ = abstract_model(model, vocabulary_info(tokenizers))
        self.params = _replicated(params, mesh)
        self.search_meshes = search_meshes(mesh) if side_by_side else [mesh]
        self._prepared: list[tuple[Any, Any]] = []  # see `_search_form`; copies with other settings share it
        self._preparing = threading.Lock()
        self._programs: dict[Any, Any] = {}

    @classmethod
    def load(
        cls,
        run: Path | str | Sequence[Path | str],
        mesh: Mesh | None = None,
        checkpoint: Choice = "best",
        quantize: Quantize = "none",
    ) -> "Translator":
        """Returns the translator of a run folder, or of several as an ensemble.

        The probabilities of an ensemble's models are averaged at every step; they must have the same sizes and the same
        vocabulary. Everything but the parameters is taken from the first.

        Args:
            run: the folder, or several.
            mesh: devices; all that there are when None.
            checkpoint: the one that was best on validation text, or the last.
            quantize: see `Quantize`; "int8" is faster on a CPU with instructions for it, "bfloat16" on an
                accelerator, and on a CPU with matrix instructions (AMX).

        Raises:
            RunFolderError: not a run folder, or one without tokenizer or checkpoint, or a damaged one; runs that do not
                make an ensemble.
        """
        paths = [run] if isinstance(run, Path | str) else list(run)
        folders = [RunFolder.open(path) for path in paths]
        config = folders[0].read_config()
        tokenizers = folders[0].tokenizers()
        mesh = make_mesh(MeshConfig()) if mesh is None else mesh
        _, abstract_params = abstract_model(config.model, vocabulary_info(tokenizers))
        replicated = replicated_sharding(mesh)
        target = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated), nnx.to_pure_dict(abstract_params)
        )
        restored = []
        for folder in folders:
            if folder.read_config().model != config.model or folder.tokenizers().fingerprint != tokenizers.fingerprint:
                raise RunFolderError(
                    f"{folder.path} and {folders[0].path} cannot be an ensemble: all need the same section 'model' and "
                    "the same tokenizers. Train them from one recipe, with other values of training.seed."
                )
            with Checkpoints(folder.checkpoints, tokenizers=tokenizers.fingerprint) as checkpoints:
                restored.append(checkpoints.restore_params(checkpoints.choose(checkpoint), target))
        params = restored[0] if len(restored) == 1 else jax.tree.map(lambda *leaves: jnp.stack(leaves), *restored)
        model = dataclasses.replace(config.model, compute_dtype="bfloat16") if quantize == "bfloat16" else config.model
        made = cls(model, tokenizers, params, config.decoding, mesh, len(restored), side_by_side=True)
        return made.quantized() if quantize == "int8" else made

    def with_params(self, params: Any) -> "Translator":
        """Returns a translator with other parameters, of the same shapes, that shares this one's compiled programs."""
        chex.assert_trees_all_equal_shapes_and_dtypes(params, self.params)  # merging a model does not check
        return self._copy(params=_replicated(params, self.mesh), _prepared=[])

    def quantized(self) -> "Translator":
        """Returns a translator with 8-bit integers for weights: itself if it has them."""
        if is_quantized(self.params):
            return self
        params = quantized_ensemble(self.graphdef, self.params, self.num_models)
        return self._copy(params=params, _prepared=[])

    def with_decoding(self, decoding: DecodingConfig) -> "Translator":
        """Returns a translator with other settings, that shares this one's parameters and compiled programs."""
        return self._copy(decoding=decoding)

    def _copy(self, **attributes: Any) -> "Translator":
        other = object.__new__(Translator)
        other.__dict__.update(self.__dict__ | attributes)
        return other

    @property
    def rows(self) -> int:
        """Sentences worked on at the same time; rounded up, so that a run can be used on any number of devices."""
        return -(-self.decoding.batch_rows // self.mesh.size) * self.mesh.size

    @property
    def demands(self) -> Demands:
        """What can be demanded of outputs beside the sentence."""
        return Demands(self.tokenizers.target, self.decoding, self.max_target_length - 1)

    def translate(
        self,
        sentences: Sequence[str],
        *,
        num_hypotheses: int = 1,
        prefixes: Sequence[str] | None = None,
        required: Sequence[Sequence[str]] | None = None,
        attention: bool = False,
        **changes: Any,
    ) -> list[Translation]:
        """Returns a translation for each sentence, in order; an empty sentence gives an empty one.

        Args:
            sentences: raw text.
            num_hypotheses: at most so many outputs for each sentence: the best of the beam, or as many as are drawn.
            prefixes: what each sentence's outputs begin with.
            required: phrases that each sentence's outputs hold, as the tokens that each is cut into by itself; a
                hypothesis that reached its maximum length first says which it lacks.
            attention: whether hypotheses carry their attention over the source.
            **changes: fields of `DecodingConfig` in place of the run's own, such as `beam_size=1`.

        Raises:
            ConfigError: a setting out of range, unknown or contradicted by another, or one string in place of a list;
                rules that leave a sentence without any output.
            InputError: a prefix or a required phrase that no output can have.
            DivergenceError: a sentence without any output, since the model's scores are not finite.
        """
        if isinstance(sentences, str):
            raise ConfigError("translate takes a list of sentences; put a single one into a list: translate([text]).")
        if changes:
            other = self.with_decoding(changed(self.decoding, changes))
            return other.translate(
                sentences, num_hypotheses=num_hypotheses, prefixes=prefixes, required=required, attention=attention
            )
        decoding, beams = self.decoding, self._num_beams(num_hypotheses)
        if 0 < decoding.mbr_samples < num_hypotheses:
            raise ConfigError(
                f"num_hypotheses ({num_hypotheses}) and decoding.mbr_samples ({decoding.mbr_samples}) contradict each "
                "other: hypotheses are chosen among the samples, so draw at least as many."
            )
        if not 1 <= num_hypotheses <= beams:
            raise ConfigError(
                f"num_hypotheses ({num_hypotheses}) must lie between 1 and beam_size ({beams}): a search finds no "
                "more hypotheses than it has beams."
            )
        if num_hypotheses > (awaited := num_awaited(beams, decoding.patience)):
            raise ConfigError(
                f"num_hypotheses ({num_hypotheses}) and decoding.patience ({decoding.patience}) contradict each other: "
                f"with so much of it, a search with {beams} beams waits for {awaited} finished hypotheses (beam_size * "
                "patience, rounded up). Ask for no more, or raise patience or beam_size."
            )
        if attention and not self.has_attention or decoding.coverage_penalty and not self.has_attention:
            what = "attention" if attention else f"decoding.coverage_penalty ({decoding.coverage_penalty})"
            raise ConfigError(f"{what} needs a model with attention, and this one has none (model.attention: none).")
        forced = self.demands.prefixes(prefixes, len(sentences))
        if required is None:
            phrases: list[list[list[int]]] = [[] for _ in sentences]
        else:
            if isinstance(required, str) or len(required) != len(sentences):
                raise ConfigError(f"required must be a list with one for each of the {len(sentences)} sentences.")
            phrases = self.demands.required_phrases(required, forced)

        encoded = self.tokenizers.source.encode(sentences)
        room = self.max_source_length - 1  # for the end token
        groups: dict[Shape, list[int]] = {}  # by what the shapes depend on: a sentence and what is asked of its outputs
        for index, ids in enumerate(encoded):
            if ids:
                groups.setdefault(self._shape(ids, forced[index], phrases[index]), []).append(index)

        results = [EMPTY] * len(sentences)
        for index, asked in enumerate(required or ()):
            if asked and not encoded[index]:  # an empty output lacks whatever is required
                nothing = dataclasses.replace(EMPTY.hypotheses[0], missing=list(asked))
                results[index] = Translation([nothing])
        for members in groups.values():
            # The longest first: what is left for the end, when slots fall empty, is short.
            members.sort(key=lambda index: -len(encoded[index]))
        workers, at_once = len(self.search_meshes), self._sentences_at_once(attention)

        def launch(worker: int, chunk: Chunk) -> Hypotheses:
            """Returns what one of the meshes finds for a chunk, before it has done so."""
            inputs = self._inputs(
                [encoded[i][:room] for i in chunk.members],
                [_seed(decoding.seed, sentences[i]) for i in chunk.members],
                [forced[i] for i in chunk.members],
                [phrases[i] for i in chunk.members],
                at_once,
                chunk.shape,
                decoding,
                self.search_meshes[worker],
            )
            program = self._program(self._spec(decoding, beams, chunk.shape, attention), inputs, worker)
            return program(self._search_form()[worker][1], inputs)

        chunks = cut_into_chunks(groups, workers, self.rows // workers, at_once)
        without_output: list[int] = []
        for chunk, found in run_on_workers(chunks, workers, launch):
            places = _places(len(chunk.members), at_once, self.search_meshes[0].size)
            for place, index in zip(places, chunk.members, strict=True):
                most = num_hypotheses if required is None else beams
                hypotheses = self._chosen(found, place, most, min(len(encoded[index]), room) + 1)
                if not hypotheses:
                    without_output.append(index)
                    continue
                if required is not None:  # one that was cut but holds more stands before one that holds less
                    named = list(zip(phrases[index], required[index], strict=True))
                    hypotheses = [self._with_missing(h, named) for h in hypotheses]
                    hypotheses.sort(key=lambda h: (not h.finished, len(h.missing)))
                    hypotheses = hypotheses[:num_hypotheses]
                tokenizer, sentence = self.tokenizers.source, sentences[index]
                source = tokenizer.pieces(encoded[index][:room])
                words = word_numbers(sentence, tokenizer.encoded_spans(sentence)[:room]) if attention else []
                results[index] = Translation(hypotheses, len(encoded[index]) > room, source, words)
        if without_output:
            first = min(without_output)
            error = self._without_output(first + 1, sentences[first])
            error.sentence = first
            raise error
        return results

    def _chosen(self, found: Hypotheses, row: int, num: int, source_length: int) -> list[Hypothesis]:
        """Returns at most `num` outputs of a sentence, best first; none if it has none."""
        if self.decoding.method == "beam":
            return self._hypotheses(found, row, num, source_length)
        hypotheses = self._hypotheses(found, row, found.lengths.shape[1], source_length)  # some are drawn twice
        if self.decoding.mbr_samples and hypotheses:
            utilities = expected_utilities(
                [h.text for h in hypotheses], [h.count for h in hypotheses], self.decoding.mbr_utility
            )
            order = sorted(range(len(hypotheses)), key=lambda number: -utilities[number])
            hypotheses = [dataclasses.replace(hypotheses[n], utility=utilities[n]) for n in order]
        return hypotheses[:num]

    def _with_missing(self, hypothesis: Hypothesis, phrases: list[tuple[list[int], str]]) -> Hypothesis:
        """Returns a hypothesis that says which phrases it lacks."""
        pieces = self.tokenizers.target.pieces
        missing = [text for ids, text in phrases if not holds(hypothesis.tokens, pieces(ids))]
        return dataclasses.replace(hypothesis, missing=missing)

    def _max_length(self, source_length: int, asked_length: int, decoding: DecodingConfig) -> int:
        """Returns the most target tokens for so many source and required tokens, end tokens included."""
        limit = int(decoding.max_length_factor * source_length) + decoding.max_length_offset
        return min(max(limit, decoding.min_length + 1, asked_length + 1), self.max_target_length)

    def _shape(self, ids: list[int], prefix: list[int], phrases: list[list[int]]) -> Shape:
        """Returns the shape of a sentence with what its outputs begin with and what they must hold."""
        longest = self.max_target_length
        return Shape(
            length_bucket(min(len(ids) + 1, self.max_source_length), self.max_source_length),
            _power_of_two(len(prefix), longest) if prefix else 0,
            1 << (len(phrases) - 1).bit_length() if phrases else 0,
            _power_of_two(max(map(len, phrases)), longest) if phrases else 0,
        )

    def _num_beams(self, num_hypotheses: int) -> int:
        """Returns how many hypotheses a search keeps, or draws, to find so many."""
        decoding = self.decoding
        return decoding.beam_size if decoding.method == "beam" else decoding.mbr_samples or num_hypotheses

    def _sentences_at_once(self, attention: bool) -> int:
        """Returns how many sentences a call of a program takes."""
        rows = self.rows // len(self.search_meshes)
        if self.decoding.method == "sampling":
            return rows
        keeps_attention = attention or self.decoding.coverage_penalty > 0
        return rows * (SENTENCES_A_ROW_WITH_ATTENTION if keeps_attention else SENTENCES_A_ROW)

    def _spec(self, decoding: DecodingConfig, beams: int, shape: Shape, attention: bool) -> SearchSpec:
        max_length = self._max_length(shape.source, shape.prefix + shape.phrases * shape.phrase, decoding)
        penalty = LengthPenalty.parse(decoding.length_penalty)
        slots = self.rows // self.mesh.size
        refill_at = max(1, slots // REFILL_SHARE)
        special = self.tokenizers.target.special
        return SearchSpec(
            BeamSearchConfig(
                beams,
                slots,
                max_length,
                special.start,
                special.end,
                penalty,
                decoding.stop,
                decoding.patience,
                refill_at,
            ),  # fmt: skip
            decoding.sampling,
            decoding.no_repeat_ngram,
            decoding.repetition_penalty,
            tuple(tuple(phrase) for phrase in self.demands.banned_phrases().values()),
            decoding.force_end,
            decoding.coverage_penalty,
            attention,
            self.num_models,
        )

    def _search_form(self) -> list[tuple[Any, Any]]:
        """Returns graph and parameters as a search takes them, for each of its meshes; of shapes, the shapes.

        Made by the first search, and kept beside the parameters, which scores and conversions read.
        """
        with self._preparing:  # the translator may be shared by threads
            if not self._prepared:
                key = "for_search", _shapes(self.params)
                if key not in self._programs:
                    self._programs[key] = for_search.lower(self.graphdef, self.num_models, self.params).compile()
                make = self._programs[key]
                abstract = isinstance(jax.tree.leaves(self.params)[0], jax.ShapeDtypeStruct)
                graphdef, params = make.out_info if abstract else make(self.params)
                if len(self.search_meshes) > 1 and not abstract:
                    params = jax.tree.map(np.asarray, params)  # no device makes a copy of it: all read the same memory
                self._prepared[:] = [(graphdef, _replicated(params, mesh)) for mesh in self.search_meshes]
        return self._prepared

    def _program(self, spec: SearchSpec, inputs: SearchInputs, number: int, held: int = 0) -> Any:
        """Returns the search for inputs of these shapes, compiled for the mesh of a number; `held` as for `compile`.

        Raises:
            ConfigError: it needs more memory than a device has.
        """
        graphdef, params = self._search_form()[number]
        arguments = params, inputs
        key = number, spec, _shapes(arguments)
        if key not in self._programs:
            beam = spec.beam
            self._programs[key] = compiled_within_memory(
                jit_search(graphdef, spec, self.search_meshes[number]).lower(*arguments),
                self.mesh,
                f"a search of {beam.num_slots * self.mesh.size} sentences at a time, with {beam.beam_size} hypotheses "
                f"of at most {beam.max_length} tokens for each,",
                "Lower decoding.beam_size (of sampling: the number of samples), decoding.batch_rows, or the limits on "
                "the length, decoding.max_length_factor and max_length_offset.",
                held=held + sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.params)),
            )
        return self._programs[key]

    def compile(self, sentences: Sequence[str], held: int = 0) -> None:
        """Compiles all that `translate(sentences)` needs, so that a lack of memory shows now and nothing waits later.

        After it no device has anything to compile, whichever of them takes which sentences; a call of `translate`
        compiles on those alone that took some.

        Args:
            sentences: of which the lengths matter.
            held: bytes on each device that others keep beside it.

        Raises:
            ConfigError: a search needs more memory than a device has.
        """
        encoded = self.tokenizers.source.encode(sentences)
        at_once = self._sentences_at_once(False)
        for shape in sorted({self._shape(ids, [], []) for ids in encoded if ids}):
            spec = self._spec(self.decoding, self._num_beams(1), shape, attention=False)
            for number, mesh in enumerate(self.search_meshes):
                padding = self._inputs([], [], [], [], at_once, shape, self.decoding, mesh)
                self._program(spec, padding, number, held)

    def _inputs(
        self,
        sentences: list[list[int]],
        seeds: list[int],
        prefixes: list[list[int]],
        phrases: list[list[list[int]]],
        rows: int,
        shape: Shape,
        decoding: DecodingConfig,
        mesh: Mesh,
    ) -> SearchInputs:
        """Returns the inputs of a search, sentences in their `_places`, filled up with rows of padding.

        Args:
            sentences: ids, without the end token.
            seeds: of each.
            prefixes: of each.
            phrases: that are required of each.
            rows: how many sentences there is room for.
            shape: of one sentence.
            decoding: the settings.
            mesh: where it runs.
        """
        places = _places(len(sentences), rows, mesh.size)
        tokens, segments = np.zeros((2, rows, shape.source), np.int32)
        max_lengths, min_lengths = np.zeros((2, rows), np.int32)
        seeds_of_rows = np.zeros(rows, np.int32)
        forced = np.full((rows, shape.prefix), ANY, np.int32)
        required = np.full((rows, shape.phrases, shape.phrase), ANY, np.int32)
        for place, ids, seed, prefix, asked in zip(places, sentences, seeds, prefixes, phrases, strict=True):
            tokens[place, : len(ids) + 1] = [*ids, self.tokenizers.source.special.end]
            segments[place, : len(ids) + 1] = 1
            max_lengths[place] = self._max_length(len(ids) + 1, len(prefix) + sum(map(len, asked)), decoding)
            min_lengths[place] = decoding.min_length + 1
            seeds_of_rows[place] = seed
            forced[place, : len(prefix)] = prefix
            for number, phrase in enumerate(asked):
                required[place, number, : len(phrase)] = phrase
        # No trained model finds padding or start probable enough for a beam, but what is drawn may be anything.
        target, bans = self.tokenizers.target, set(self.demands.banned_tokens().values())
        if decoding.method == "sampling" or self.bans_start:
            bans |= target.special.never_in_outputs
        if decoding.ban_unknown and target.special.unknown is not None:
            bans.add(target.special.unknown)
        banned = np.zeros(target.vocab_size if bans else 0, bool)
        banned[list(bans)] = True
        sharded = all_devices_sharding(mesh)
        return SearchInputs(
            tokens=jax.device_put(tokens, sharded),
            segments=jax.device_put(segments, sharded),
            max_lengths=jax.device_put(max_lengths, sharded),
            min_lengths=jax.device_put(min_lengths if decoding.min_length else min_lengths[:0], sharded),
            prefixes=jax.device_put(forced, sharded),
            required=jax.device_put(required, sharded),
            seeds=jax.device_put(seeds_of_rows, sharded),
            banned=jax.device_put(banned, replicated_sharding(mesh)),
        )

    def _hypotheses(self, found: Hypotheses, row: int, most: int, source_length: int) -> list[Hypothesis]:
        """Returns the different ones of the first `most` outputs of a sentence; none if it has none."""
        results: dict[tuple[int, ...], Hypothesis] = {}
        for beam in range(most):
            length, finished = int(found.lengths[row, beam]), bool(found.finished[row, beam])
            if length == 0 or not found.scores[row, beam] > MASKED / 2:  # fewer than beams, none allowed, or no number
                break
            ids = found.tokens[row, beam, : length - 1 if finished else length].tolist()
            if (before := results.get((*ids, finished))) is not None:  # drawn twice
                results[(*ids, finished)] = dataclasses.replace(before, count=before.count + 1)
                continue
            target = self.tokenizers.target
            text, attention, words = target.decode(ids), None, []
            if found.extras is not None:
                attention = found.extras["attention"][row, beam, :length, :source_length].copy()  # not the whole batch
                words = word_numbers(text, target.decoded_spans(ids))
            results[(*ids, finished)] = Hypothesis(
                text,
                target.pieces(ids),
                float(found.scores[row, beam]),
                finished,
                found.log_probs[row, beam, :length].tolist(),
                attention,
                words=words,
            )
        return list(results.values())

    def _without_output(self, number: int, sentence: str) -> ConfigError | DivergenceError:
        """Returns the error for a sentence without any output: the rules are why, if there is one without them."""
        shown = sentence if len(sentence) <= SHOWN_CHARACTERS else sentence[:SHOWN_CHARACTERS] + "..."
        problem = f"sentence {number} ({shown!r}): the search found no output at all"
        unset = DecodingConfig()
        rules = [name for name in BANNING if getattr(self.decoding, name) != getattr(unset, name)]
        if rules:
            free = dataclasses.replace(self.decoding, **{name: getattr(unset, name) for name in rules})
            named = ", ".join(f"decoding.{name}: {getattr(self.decoding, name)}" for name in rules)
            try:
                self.with_decoding(free).translate([sentence])
                return ConfigError(
                    f"{problem}, since the rules that are set ({named}) leave no token to go on with. Loosen one of "
                    "them, or leave this sentence out."
                )
            except DivergenceError:
                pass  # and so without rules
        return DivergenceError(
            f"{problem}, since the model's scores are not finite: the training has diverged. Train again with a lower "
            "learning rate."
        )


def changed(decoding: DecodingConfig, changes: dict[str, Any]) -> DecodingConfig:
    """Returns a configuration with some fields replaced; a value of None leaves a field as it is.

    Raises:
        ConfigError: an unknown field, or a value out of range.
    """
    known = {f.name for f in dataclasses.fields(decoding)}
    for name in changes:
        if name not in known:
            raise ConfigError(f"unknown decoding option {name!r}.{did_you_mean(name, known)}")
    given = {name: value for name, value in changes.items() if value is not None}
    if "method" in given:  # what was set for the other method is not asked of this one
        decoding = decoding.with_method(given["method"])
    return dataclasses.replace(decoding, **given)


def _seed(seed: int, sentence: str) -> int:
    """Returns a seed for a sentence from its text, so that neither its place nor its batch-mates matter."""
    return zlib.crc32(sentence.encode("utf-8", "surrogateescape"), seed) & 0x7FFFFFFF


def _places(num_sentences: int, rows: int, devices: int) -> list[int]:
    """Returns the row of each sentence: dealt out to the devices in turn, so that padding stands at the end of each."""
    return [(n % devices) * (rows // devices) + n // devices for n in range(num_sentences)]


def _power_of_two(number: int, most: int) -> int:
    """Returns the least of 8, 16, 32, 64, ... that is no less than `number`, but at most `most`."""
    return min(max(1 << (number - 1).bit_length(), 8), most)


def _shapes(tree: Any) -> Any:
    """Returns what a program that takes `tree` is compiled for."""
    return jax.tree.structure(tree), tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree))


def _replicated(params: Any, mesh: Mesh) -> Any:
    """Returns parameters, or the shapes of some, with a copy on every device."""
    sharding = replicated_sharding(mesh)

    def place(leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.device_put(leaf, sharding)

    return jax.tree.map(place, params)
