"""Text to text: tokenise, group by length, search inside XLA, and put everything back in order."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from flax_transformer.config import DecodingConfig
from flax_transformer.data.tokenizer import END_ID, START_ID, TokenizerPair
from flax_transformer.decoding.beam_search import BeamSearchConfig, beam_search
from flax_transformer.decoding.hypotheses import Hypotheses
from flax_transformer.decoding.length_penalty import LengthPenalty
from flax_transformer.errors import ConfigError, DivergenceError
from flax_transformer.models.build import ModelConfig, VocabularyInfo
from flax_transformer.models.seq2seq import reorder_beams
from flax_transformer.parallel.mesh import (
    MeshConfig,
    all_devices_sharding,
    make_mesh,
    replicated_sharding,
)
from flax_transformer.run_folder import RunFolder
from flax_transformer.training.checkpoint import Checkpoints, Choice
from flax_transformer.training.state import abstract_model

ALL_AXES = ("data", "fsdp", "tensor")


@dataclass(frozen=True)
class Hypothesis:
    """One output for a sentence.

    Attributes:
        text: detokenised.
        tokens: target pieces, without the end token.
        score: log-probability (nats, end token included) divided by the length penalty; at most 0.
        finished: False when it was cut at the maximum length.
    """

    text: str
    tokens: list[str]
    score: float
    finished: bool


@dataclass(frozen=True)
class Translation:
    """The outputs for a sentence, best first.

    Attributes:
        hypotheses: at least one, at most as many as asked for.
        truncated: whether the source was longer than the model takes and was cut.
    """

    hypotheses: list[Hypothesis]
    truncated: bool = False

    @property
    def text(self) -> str:
        """Text of the best hypothesis."""
        return self.hypotheses[0].text

    @property
    def score(self) -> float:
        """Score of the best hypothesis."""
        return self.hypotheses[0].score

    @property
    def tokens(self) -> list[str]:
        """Target pieces of the best hypothesis."""
        return self.hypotheses[0].tokens


EMPTY = Translation([Hypothesis(text="", tokens=[], score=0.0, finished=True)])


def length_bucket(length: int, longest: int) -> int:
    """Returns the padded length for a sentence: 8, 16, 24, 32, 48, 64, 96, 128, ... but at most `longest`.

    It depends on the sentence alone, so that its batch-mates do not change the program that translates it.
    """
    for base in (8, 16, 24):
        if length <= base:
            return min(base, longest)
    bucket = 32
    while bucket < length:
        bucket = bucket * 3 // 2 if bucket & (bucket - 1) == 0 else bucket * 4 // 3
    return min(bucket, longest)


def vocabulary_info(tokenizers: TokenizerPair) -> VocabularyInfo:
    """Returns what a model must know of the tokenizers."""
    return VocabularyInfo(tokenizers.source.vocab_size, tokenizers.target.vocab_size, START_ID)


def _search(graphdef: Any, config: BeamSearchConfig, params: Any, tokens, segments, max_lengths) -> Hypotheses:
    """Encodes the sentences of one device and searches; all of it is one XLA program."""
    model = nnx.merge(graphdef, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    state = model.init_decode_state(model.encode(tokens, positions, segments), config.beam_size, config.max_length)

    def step(previous, decoder):
        output, decoder = model.decode_step(previous, decoder)
        return output.logits, decoder

    return beam_search(step, reorder_beams, state, max_lengths, config)


def jit_search(graphdef: Any, config: BeamSearchConfig, mesh: Mesh):
    """Returns the compiled search: (params, tokens [B, S], segments [B, S], max_lengths [B]) -> `Hypotheses`.

    Rows are split over all axes of the mesh and parameters are copied, so each device runs a loop of its own and no
    device ever waits for another.
    """
    rows = jax.P(ALL_AXES)
    search = functools.partial(_search, graphdef, config)
    return jax.jit(
        jax.shard_map(search, mesh=mesh, in_specs=(jax.P(), rows, rows, rows), out_specs=rows, check_vma=False)
    )


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
    ):
        # Rounded up, so that a run can be used on any number of devices.
        self.rows = -(-decoding.batch_rows // mesh.size) * mesh.size
        self.tokenizers = tokenizers
        self.decoding = decoding
        self.mesh = mesh
        self.max_source_length = model.max_source_length
        self.max_target_length = model.max_target_length
        self.graphdef, _ = abstract_model(model, vocabulary_info(tokenizers))
        self.params = jax.device_put(params, replicated_sharding(mesh))
        self._searches: dict[BeamSearchConfig, Any] = {}

    @classmethod
    def load(cls, run: Path | str, mesh: Mesh | None = None, checkpoint: Choice = "best") -> "Translator":
        """Returns the translator of a run folder.

        Args:
            run: the folder.
            mesh: devices; all that there are when None.
            checkpoint: the one that was best on validation text, or the last.

        Raises:
            RunFolderError: not a run folder, or one without tokenizer or checkpoint, or a damaged one.
        """
        folder = RunFolder.open(run)
        config = folder.read_config()
        tokenizers = folder.tokenizers()
        mesh = make_mesh(MeshConfig()) if mesh is None else mesh
        _, abstract_params = abstract_model(config.model, vocabulary_info(tokenizers))
        replicated = replicated_sharding(mesh)
        target = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated), nnx.to_pure_dict(abstract_params)
        )
        with Checkpoints(folder.checkpoints) as checkpoints:
            params = checkpoints.restore_params(checkpoints.choose(checkpoint), target)
        return cls(config.model, tokenizers, params, config.decoding, mesh)

    def with_params(self, params: Any) -> "Translator":
        """Returns a translator with other parameters, of the same shapes, that shares this one's compiled programs."""
        chex.assert_trees_all_equal_shapes_and_dtypes(params, self.params)  # merging a model does not check
        other = object.__new__(Translator)
        other.__dict__.update(self.__dict__)
        other.params = jax.device_put(params, replicated_sharding(self.mesh))
        return other

    def translate(
        self,
        sentences: Sequence[str],
        *,
        beam_size: int | None = None,
        num_hypotheses: int = 1,
        length_penalty: str | None = None,
    ) -> list[Translation]:
        """Returns a translation for each sentence, in order; an empty sentence gives an empty one.

        Args:
            sentences: raw text.
            beam_size: hypotheses kept at each step; the run's own setting when None.
            num_hypotheses: at most so many outputs for each sentence; at most `beam_size`.
            length_penalty: such as "gnmt:0.6", "average:1.0" or "none"; the run's own setting when None.

        Raises:
            ConfigError: a setting out of range, or one string in place of a list.
            DivergenceError: the model's scores are not finite.
        """
        if isinstance(sentences, str):
            raise ConfigError("translate takes a list of sentences; put a single one into a list: translate([text]).")
        beam_size = self.decoding.beam_size if beam_size is None else beam_size
        if not 1 <= num_hypotheses <= beam_size:
            raise ConfigError(
                f"num_hypotheses ({num_hypotheses}) must lie between 1 and beam_size ({beam_size}): a search finds no "
                "more hypotheses than it has beams."
            )
        penalty = LengthPenalty.parse(self.decoding.length_penalty if length_penalty is None else length_penalty)

        encoded = self.tokenizers.source.encode(sentences)
        room = self.max_source_length - 1  # for the end token
        groups: dict[int, list[int]] = {}
        for index, ids in enumerate(encoded):
            if ids:
                length = min(len(ids), room) + 1
                groups.setdefault(length_bucket(length, self.max_source_length), []).append(index)

        results = [EMPTY] * len(sentences)
        rows = self.rows
        for bucket, members in sorted(groups.items()):
            search = self._search_for(beam_size, penalty, self._max_length(bucket))
            pending = []
            for start in range(0, len(members), rows):
                chunk = members[start : start + rows]
                arrays = self._source_arrays([encoded[i][:room] for i in chunk], bucket)
                pending.append((chunk, search(self.params, *arrays)))  # dispatched; the next batch is made meanwhile
            for chunk, hypotheses in pending:
                hypotheses = jax.device_get(hypotheses)
                for row, index in enumerate(chunk):
                    found = self._hypotheses(hypotheses, row, num_hypotheses)
                    results[index] = Translation(found, truncated=len(encoded[index]) > room)
        return results

    def _max_length(self, source_length: int) -> int:
        """Returns the most target tokens for a source of so many tokens, end tokens included."""
        limit = int(self.decoding.max_length_factor * source_length) + self.decoding.max_length_offset
        return min(limit, self.max_target_length)

    def _search_for(self, beam_size: int, penalty: LengthPenalty, max_length: int):
        config = BeamSearchConfig(beam_size, max_length, START_ID, END_ID, penalty)
        if config not in self._searches:
            self._searches[config] = jit_search(self.graphdef, config, self.mesh)
        return self._searches[config]

    def _source_arrays(self, sentences: list[list[int]], bucket: int) -> list[jax.Array]:
        """Returns tokens [B, S], segments [B, S] and max_lengths [B], filled up with rows of padding."""
        rows = self.rows
        tokens = np.zeros((rows, bucket), np.int32)
        segments = np.zeros((rows, bucket), np.int32)
        max_lengths = np.zeros(rows, np.int32)
        for row, ids in enumerate(sentences):
            length = len(ids) + 1
            tokens[row, :length] = [*ids, END_ID]
            segments[row, :length] = 1
            max_lengths[row] = self._max_length(length)
        return [jax.device_put(a, all_devices_sharding(self.mesh)) for a in (tokens, segments, max_lengths)]

    def _hypotheses(self, found: Hypotheses, row: int, num: int) -> list[Hypothesis]:
        results = []
        for beam in range(num):
            length, finished = int(found.lengths[row, beam]), bool(found.finished[row, beam])
            if length == 0:  # fewer hypotheses than beams
                break
            ids = found.tokens[row, beam, : length - 1 if finished else length].tolist()
            target = self.tokenizers.target
            text = target.decode(ids)
            results.append(Hypothesis(text, target.pieces(ids), float(found.scores[row, beam]), finished))
        if not results:
            raise DivergenceError(
                "the search found no output at all, so the model's scores are not finite: the training has diverged. "
                "Train again with a lower learning rate."
            )
        return results
