"""The search of a model as one XLA program on each device: encode, then search with slots that are refilled.

Legend: N sentences, B slots, S source length, K beams, T maximum length, P prefix length, V vocabulary, E models.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Bool, Float, Int

from flax_transformer.decoding import logits_processors
from flax_transformer.decoding.beam_search import BeamSearchConfig, beam_search
from flax_transformer.decoding.decoder_functions import DecoderFunctions
from flax_transformer.decoding.hypotheses import Hypotheses
from flax_transformer.decoding.lexical_constraints import LexicalConstraints
from flax_transformer.decoding.logits_processors import LogitsProcessor
from flax_transformer.decoding.sampling import SamplingConfig, sample
from flax_transformer.models.seq2seq import DecodeState, Memory, reorder_beams
from flax_transformer.shapes import array_tree, static_field

ALL_AXES = ("data", "fsdp", "tensor")


@dataclass(frozen=True)
class SearchSpec:
    """Static settings of a search. One program is compiled for each spec and source length.

    Attributes:
        beam: sizes, tokens and length penalty, for sampling too.
        sampling: how to draw; None searches with a beam.
        no_repeat_ngram: size of n-grams that may occur only once; 0 allows all.
        repetition_penalty: factor on log-probabilities of tokens that have occurred, at least 1.
        banned_phrases: ids of each phrase.
        force_end: whether the end token ends outputs at their maximum length at no cost. Outputs with required phrases
            are not ended so, since they may lack some.
        coverage_penalty: weight of the penalty on source tokens that got little attention.
        keep_attention: whether the attention over the source is returned.
        num_models: E, number of an ensemble's models. Several are stacked on a leading axis.
    """

    beam: BeamSearchConfig
    sampling: SamplingConfig | None = None
    no_repeat_ngram: int = 0
    repetition_penalty: float = 1.0
    banned_phrases: tuple[tuple[int, ...], ...] = ()
    force_end: bool = False
    coverage_penalty: float = 0.0
    keep_attention: bool = False
    num_models: int = 1


@array_tree
@dataclasses.dataclass(frozen=True)
class SearchInputs:
    """The arrays that a search takes. The same tree also holds shapes and shardings.

    Attributes:
        tokens: [N, S].
        segments: [N, S], 0 for padding.
        max_lengths: [N], most tokens of an output, end token included; 0 for rows of padding, which stand at the end.
        min_lengths: [N], fewest tokens of an output, end token included.
        prefixes: [N, P], ids that outputs begin with, `logits_processors.ANY` after the end; P may be 0.
        required: [N, Q, P], phrases that outputs hold, `logits_processors.ANY` after the end of each; Q may be 0.
        seeds: [N], seeds of sampling.
        banned: [V], True for tokens that no output may hold.
    """

    tokens: Any
    segments: Any
    max_lengths: Any
    min_lengths: Any
    prefixes: Any
    required: Any
    seeds: Any
    banned: Any


@dataclass(frozen=True)
class Functions:
    """Functions of a model, or of an ensemble whose probabilities are averaged."""

    encode: Callable[[jax.Array, jax.Array, jax.Array], Memory]
    start: Callable[[Memory], DecodeState]
    step: Callable[[jax.Array, DecodeState], tuple[jax.Array, Any, DecodeState]]


def model_functions(graphdef: Any, params: Any, spec: SearchSpec) -> Functions:
    """Returns the functions of a model, or of an ensemble of models with equal sizes.

    The parameters are those of `prepare_for_inference`. Leaves of an ensemble's memory and state have a model axis
    after their leading [B] or [B, K].
    """
    beam, num_models, reordered = spec.beam, spec.num_models, spec.sampling is None
    if num_models == 1:
        model = nnx.merge(graphdef, params)

        def one_step(tokens: jax.Array, state: DecodeState) -> tuple[jax.Array, Any, DecodeState]:
            output, state = model.decode_step(tokens, state)
            return output.logits, output.attention, state

        def one_start(memory: Memory) -> DecodeState:
            return model.init_decode_state(memory, beam.beam_size, beam.max_length, reordered)

        return Functions(model.encode, one_start, one_step)

    axes = DecodeState(per_sentence=1, per_beam=2, written=1, positions=None)  # the model axis

    def encode(tokens: jax.Array, positions: jax.Array, segments: jax.Array) -> Memory:
        def of(params: Any) -> Memory:
            return nnx.merge(graphdef, params).encode(tokens, positions, segments)

        return jax.vmap(of, out_axes=1)(params)

    def start(memory: Memory) -> DecodeState:
        def of(params: Any, memory: Memory) -> DecodeState:
            return nnx.merge(graphdef, params).init_decode_state(memory, beam.beam_size, beam.max_length, reordered)

        return jax.vmap(of, in_axes=(0, 1), out_axes=axes)(params, memory)

    def step(tokens: jax.Array, state: DecodeState) -> tuple[jax.Array, Any, DecodeState]:
        def of(params: Any, state: DecodeState) -> tuple[jax.Array, Any, DecodeState]:
            output, state = nnx.merge(graphdef, params).decode_step(tokens, state)
            return jax.nn.log_softmax(output.logits), output.attention, state

        log_probs, attention, state = jax.vmap(of, in_axes=(0, axes), out_axes=(0, 0, axes))(params, state)
        mean = jax.nn.logsumexp(log_probs, axis=0) - jnp.log(jnp.float32(num_models))
        return mean, jax.tree.map(lambda a: jnp.mean(a, axis=0), attention), state

    return Functions(encode, start, step)


@array_tree
@dataclasses.dataclass(frozen=True)
class SlotState:
    """The state of a search's slots, and the first states of the next sentences.

    Sentences are encoded in pieces of B, when the first sentence of a piece is due. So the number of sentences costs no
    memory and changes no bit of a result. Slots are refilled in the order of the sentences. So the sentences that are
    due always lie in the last two pieces.

    Attributes:
        decoding: state of the sentences in the slots.
        waiting: [2 B, ...], states of two pieces before their first token. Sentence n is in row n % 2 B.
        pieces: number of pieces that have been encoded.
    """

    decoding: Any
    waiting: Any
    pieces: Any


def slot_functions(
    model: Functions, inputs: SearchInputs, slots: int
) -> tuple[SlotState, Callable[[SlotState, jax.Array, jax.Array], SlotState]]:
    """Returns a state of empty slots, and the function that puts sentences into some of them (see `Refill`)."""
    length = inputs.tokens.shape[1]
    positions = jnp.broadcast_to(jnp.arange(length), (slots, length))

    def encoded(piece: Int[Array, ""]) -> DecodeState:
        tokens, segments = (
            jax.lax.dynamic_slice_in_dim(a, piece * slots, slots) for a in (inputs.tokens, inputs.segments)
        )
        return model.start(model.encode(tokens, positions, segments))

    def add_piece(waiting: DecodeState, pieces: Int[Array, ""]) -> tuple[DecodeState, Int[Array, ""]]:
        new = dataclasses.replace(encoded(pieces), written=None)
        start = pieces % 2 * slots
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        return jax.tree.map(put, waiting, new), pieces + 1

    def refill(state: SlotState, fresh: Bool[Array, "B"], sentences: Int[Array, "B"]) -> SlotState:
        last = jnp.max(jnp.where(fresh, sentences, -1)) // slots
        waiting, pieces = jax.lax.while_loop(
            lambda carry: carry[1] <= last, lambda carry: add_piece(*carry), (state.waiting, state.pieces)
        )

        def put(old: jax.Array, all_of: jax.Array) -> jax.Array:
            new = jnp.take(all_of, sentences % (2 * slots), axis=0, mode="clip")
            return jnp.where(fresh.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

        blank = dataclasses.replace(state.decoding, written=None)
        decoding = dataclasses.replace(jax.tree.map(put, blank, waiting), written=state.decoding.written)
        return SlotState(decoding, waiting, pieces)

    # Only the shapes matter: every slot is filled before it is used.
    shapes = jax.eval_shape(encoded, jax.ShapeDtypeStruct((), jnp.int32))
    decoding = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    blank = dataclasses.replace(shapes, written=None)
    waiting = jax.tree.map(lambda a: jnp.zeros((2 * slots, *a.shape[1:]), a.dtype), blank)
    return SlotState(decoding, waiting, jnp.zeros((), jnp.int32)), refill


@array_tree
@dataclasses.dataclass(frozen=True)
class CoveragePenalty:
    """Adjusts scores by weight * sum over source tokens of log(min(attention given to the token, 1)).

    Attributes:
        segments: [N, S], 0 for padding.
        weight: at least 0.

    References:
        Wu et al. 2016 (GNMT), equation 14.
    """

    segments: Int[Array, "N S"]
    weight: float = static_field()

    def __call__(self, auxiliary: Any, sentences: Int[Array, "B"], lengths: Int[Array, "B"]) -> Float[Array, "B M"]:
        """Returns the adjustment of M hypotheses that have `lengths` tokens (see `ScoreAdjustment`)."""
        attention = auxiliary["attention"]  # [B, M, T, S]
        decoded = jnp.arange(attention.shape[2])[None, :] < lengths[:, None]
        given = jnp.sum(jnp.where(decoded[:, None, :, None], attention, 0.0), axis=2)  # [B, M, S]
        real = jnp.take(self.segments, sentences, axis=0, mode="clip")[:, None, :] > 0
        missed = jnp.log(jnp.clip(given, jnp.finfo(jnp.float32).tiny, 1.0))
        return jnp.float32(self.weight) * jnp.sum(jnp.where(real, missed, 0.0), axis=2)


def make_processors(spec: SearchSpec, inputs: SearchInputs) -> tuple[LogitsProcessor, ...]:
    """Returns the logits processors of the settings. A plain search has none, so it pays nothing."""
    asked: list[LogitsProcessor] = []
    if spec.repetition_penalty != 1.0:
        asked.append(logits_processors.RepetitionPenalty(spec.repetition_penalty))
    if inputs.banned.shape[0]:
        asked.append(logits_processors.SuppressTokens(inputs.banned))
    if inputs.min_lengths.shape[0]:
        asked.append(logits_processors.MinLength(inputs.min_lengths, spec.beam.end_token))
    if spec.no_repeat_ngram:
        asked.append(logits_processors.NoRepeatNgram(spec.no_repeat_ngram))
    if spec.banned_phrases:
        asked.append(logits_processors.SuppressSequences.of(spec.banned_phrases))
    if spec.force_end and not inputs.required.shape[1]:
        asked.append(logits_processors.ForceEos(inputs.max_lengths, spec.beam.end_token))
    if inputs.prefixes.shape[1]:
        return (logits_processors.ForcePrefix(inputs.prefixes, tuple(asked)),)
    return tuple(asked)


def decoder_functions(model: Functions, spec: SearchSpec, inputs: SearchInputs) -> tuple[DecoderFunctions, SlotState]:
    """Returns a model as a search sees it, and a state of empty slots."""
    empty, refill = slot_functions(model, inputs, spec.beam.num_slots)
    keep_attention = spec.keep_attention or spec.coverage_penalty > 0

    def step(tokens: jax.Array, state: SlotState) -> tuple[jax.Array, Any, SlotState]:
        logits, attention, decoding = model.step(tokens, state.decoding)
        last_layer = {"attention": jnp.mean(attention[:, :, -1], axis=2)} if keep_attention else None  # over heads
        return logits, last_layer, dataclasses.replace(state, decoding=decoding)

    def reorder(state: SlotState, parents: jax.Array) -> SlotState:
        return dataclasses.replace(state, decoding=reorder_beams(state.decoding, parents))

    return DecoderFunctions(step, reorder, refill), empty


def search_on_device(graphdef: Any, spec: SearchSpec, params: Any, inputs: SearchInputs) -> Hypotheses:
    """Encodes the sentences of one device and searches, with the parameters of `prepare_for_inference`.

    An input that is an empty array sets no rule: `banned`, `min_lengths`, `prefixes` or `required`.
    """
    beam = spec.beam
    functions, empty = decoder_functions(model_functions(graphdef, params, spec), spec, inputs)
    processors = make_processors(spec, inputs)
    if spec.sampling is not None:
        slots = jnp.arange(beam.num_slots)
        filled = functions.refill(empty, slots >= 0, slots)
        found = sample(functions, beam, spec.sampling, filled, inputs.max_lengths, inputs.seeds, processors)
    else:
        constraints = LexicalConstraints(inputs.required, beam.end_token) if inputs.required.shape[1] else None
        coverage = CoveragePenalty(inputs.segments, spec.coverage_penalty) if spec.coverage_penalty else None
        found = beam_search(functions, beam, empty, inputs.max_lengths, processors, constraints, coverage)
    return found if spec.keep_attention else dataclasses.replace(found, auxiliary=None)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def search(graphdef: Any, spec: SearchSpec, mesh: Mesh | AbstractMesh, params: Any, inputs: SearchInputs) -> Hypotheses:
    """Searches on every device of a mesh. JAX traces it once for all translators that differ in parameters alone.

    Sentences are split over all axes of the mesh, and parameters are copied. Each device runs its own loop with
    `spec.beam.num_slots` slots. No device waits for another.
    """
    rows = jax.P(ALL_AXES)
    split = SearchInputs(rows, rows, rows, rows, rows, rows, rows, jax.P())
    return jax.shard_map(
        functools.partial(search_on_device, graphdef, spec),
        mesh=mesh,
        in_specs=(jax.P(), split),
        out_specs=rows,
        check_vma=False,
    )(params, inputs)
