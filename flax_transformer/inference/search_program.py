"""The search of a model as an XLA program. It encodes sentences and searches their outputs.

The program has two forms. If every device has all parameters, each one runs its own loop (`search`). If the parameters
are split over the devices, all devices run one loop together (`sharded_search`).

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
from jax.stages import Traced
from jaxtyping import Array, Bool, Float, Int

from flax_transformer.decoding import logits_processors
from flax_transformer.decoding.beam_search import BeamSearchConfig, beam_search
from flax_transformer.decoding.decoder_functions import DecoderFunctions
from flax_transformer.decoding.hypotheses import Hypotheses
from flax_transformer.decoding.lexical_constraints import LexicalConstraints
from flax_transformer.decoding.logits_processors import LogitsProcessor
from flax_transformer.decoding.sampling import SamplingConfig, sample
from flax_transformer.models.parameters import GraphDef, Params
from flax_transformer.models.seq2seq import DecodeState, EncoderOutput, reorder_beams
from flax_transformer.parallel.sharding_rules import stationary_weights
from flax_transformer.shapes import array_tree, static_field

ALL_AXES = ("data", "fsdp", "tensor")


@dataclass(frozen=True)
class SearchConfig:
    """Static settings of a search. One program is compiled for each `SearchConfig` and each shape of the inputs.

    Attributes:
        method: settings of the beam search, or of sampling.
        no_repeat_ngram: size of n-grams that may occur only once; 0 allows all.
        repetition_penalty: factor on log-probabilities of tokens that have occurred, at least 1.
        suppress_sequences: ids of each suppressed phrase.
        force_eos: whether the end token ends outputs at their maximum length at no cost. It does not apply to outputs
            with required phrases, since they may lack some.
        coverage_penalty: weight of the penalty on source tokens that got little attention.
        keep_attention: whether the attention over the source is returned.
        num_models: number of an ensemble's models, E.
    """

    method: BeamSearchConfig | SamplingConfig
    no_repeat_ngram: int = 0
    repetition_penalty: float = 1.0
    suppress_sequences: tuple[tuple[int, ...], ...] = ()
    force_eos: bool = False
    coverage_penalty: float = 0.0
    keep_attention: bool = False
    num_models: int = 1

    @property
    def num_beams(self) -> int:
        """The number of hypotheses that are kept, or drawn, for each sentence, K."""
        return self.method.beam_size if isinstance(self.method, BeamSearchConfig) else self.method.num_samples


@array_tree
@dataclasses.dataclass(frozen=True)
class SearchInputs:
    """The input arrays of a search. The leaves of the tree may also be shapes or shardings.

    Attributes:
        tokens: [N, S], source tokens.
        segments: [N, S], 0 for padding.
        max_lengths: [N], most tokens of an output, end token included; 0 for rows of padding, which are at the end.
        min_lengths: [N], fewest tokens of an output, end token included.
        prefixes: [N, P], ids that outputs begin with, `logits_processors.ANY` after the end; P may be 0.
        required: [N, Q, P], phrases that outputs must contain, `logits_processors.ANY` after each; Q may be 0.
        seeds: [N], seeds of sampling.
        suppressed: [V], True for tokens that no output may contain.
    """

    tokens: Any
    segments: Any
    max_lengths: Any
    min_lengths: Any
    prefixes: Any
    required: Any
    seeds: Any
    suppressed: Any


@dataclass(frozen=True)
class ModelFunctions:
    """The functions of a model or an ensemble that a search calls."""

    encode: Callable[[jax.Array, jax.Array, jax.Array], EncoderOutput]
    start: Callable[[EncoderOutput], DecodeState]
    step: Callable[[jax.Array, DecodeState], tuple[jax.Array, Any, DecodeState]]


def log_of_mean(log_probs: Float[Array, "E *rest"]) -> Float[Array, "*rest"]:
    """Returns the logarithm of the mean of an ensemble's probabilities."""
    return jax.nn.logsumexp(log_probs, axis=0) - jnp.log(jnp.float32(log_probs.shape[0]))


def model_functions(graphdef: GraphDef, params: Params, spec: SearchConfig) -> ModelFunctions:
    """Returns the functions of a model, or of an ensemble, which averages its models' probabilities.

    The parameters are those of `prepare_for_inference`. Arrays of an ensemble's encoder output and state have a model
    axis after their leading [B] or [B, K].
    """
    sizes = spec.num_beams, spec.method.max_length, isinstance(spec.method, BeamSearchConfig)  # samples stay in place
    if spec.num_models == 1:
        model = nnx.merge(graphdef, params)

        def one_step(tokens: jax.Array, state: DecodeState) -> tuple[jax.Array, Any, DecodeState]:
            output, state = model.decode_step(tokens, state)
            return output.logits, output.attention, state

        def one_start(encoded: EncoderOutput) -> DecodeState:
            return model.init_decode_state(encoded, *sizes)

        return ModelFunctions(model.encode, one_start, one_step)

    axes = DecodeState(per_sentence=1, per_beam=2, append_only=1, positions=None)  # the model axis

    def encode(tokens: jax.Array, positions: jax.Array, segments: jax.Array) -> EncoderOutput:
        def of(params: Params) -> EncoderOutput:
            return nnx.merge(graphdef, params).encode(tokens, positions, segments)

        return jax.vmap(of, out_axes=1)(params)

    def start(encoded: EncoderOutput) -> DecodeState:
        def of(params: Params, encoded: EncoderOutput) -> DecodeState:
            return nnx.merge(graphdef, params).init_decode_state(encoded, *sizes)

        return jax.vmap(of, in_axes=(0, 1), out_axes=axes)(params, encoded)

    def step(tokens: jax.Array, state: DecodeState) -> tuple[jax.Array, Any, DecodeState]:
        def of(params: Params, state: DecodeState) -> tuple[jax.Array, Any, DecodeState]:
            output, state = nnx.merge(graphdef, params).decode_step(tokens, state)
            return jax.nn.log_softmax(output.logits), output.attention, state

        log_probs, attention, state = jax.vmap(of, in_axes=(0, axes), out_axes=(0, 0, axes))(params, state)
        return log_of_mean(log_probs), jax.tree.map(lambda a: jnp.mean(a, axis=0), attention), state

    return ModelFunctions(encode, start, step)


@array_tree
@dataclasses.dataclass(frozen=True)
class SlotState:
    """The decoder states of the sentences in the slots, and of the sentences that wait.

    B sentences are encoded together, as soon as a slot needs the first of them. So neither results nor the memory for
    states depend on N. Slots take sentences in order, so those that wait are among the last 2 B encoded ones.

    Attributes:
        decoding: state of the sentences in the slots.
        waiting: [2 B, ...], states before the first token. Sentence n is in row n % 2 B.
        num_calls: number of encoder calls so far.
    """

    decoding: Any
    waiting: Any
    num_calls: Any


def slot_functions(
    model: ModelFunctions, inputs: SearchInputs, slots: int
) -> tuple[SlotState, Callable[[SlotState, jax.Array, jax.Array], SlotState]]:
    """Returns a state of empty slots, and the function that puts sentences into slots (see `Refill`)."""
    length = inputs.tokens.shape[1]
    positions = jnp.broadcast_to(jnp.arange(length), (slots, length))

    def encoded(call: Int[Array, ""]) -> DecodeState:
        tokens, segments = (
            jax.lax.dynamic_slice_in_dim(a, call * slots, slots) for a in (inputs.tokens, inputs.segments)
        )
        return model.start(model.encode(tokens, positions, segments))

    def encode_next(waiting: DecodeState, num_calls: Int[Array, ""]) -> tuple[DecodeState, Int[Array, ""]]:
        new = dataclasses.replace(encoded(num_calls), append_only=None)
        start = num_calls % 2 * slots
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        return jax.tree.map(put, waiting, new), num_calls + 1

    def refill(state: SlotState, fresh: Bool[Array, "B"], sentences: Int[Array, "B"]) -> SlotState:
        last = jnp.max(jnp.where(fresh, sentences, -1)) // slots
        waiting, num_calls = jax.lax.while_loop(
            lambda carry: carry[1] <= last, lambda carry: encode_next(*carry), (state.waiting, state.num_calls)
        )

        def put(old: jax.Array, all_of: jax.Array) -> jax.Array:
            new = jnp.take(all_of, sentences % (2 * slots), axis=0, mode="clip")
            return jnp.where(fresh.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

        blank = dataclasses.replace(state.decoding, append_only=None)
        decoding = dataclasses.replace(jax.tree.map(put, blank, waiting), append_only=state.decoding.append_only)
        return SlotState(decoding, waiting, num_calls)

    # The values do not matter, since every slot is filled before its first step.
    shapes = jax.eval_shape(encoded, jax.ShapeDtypeStruct((), jnp.int32))
    decoding = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    blank = dataclasses.replace(shapes, append_only=None)
    waiting = jax.tree.map(lambda a: jnp.zeros((2 * slots, *a.shape[1:]), a.dtype), blank)
    return SlotState(decoding, waiting, jnp.zeros((), jnp.int32)), refill


@array_tree
@dataclasses.dataclass(frozen=True)
class CoveragePenalty:
    """Adjusts scores by weight * sum over source tokens of log(min(attention, 1)).

    The attention of a source token is the sum of its weights over all target tokens.

    Attributes:
        segments: [N, S], 0 for padding.
        weight: weight of the penalty, at least 0.

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


def make_processors(spec: SearchConfig, inputs: SearchInputs) -> tuple[LogitsProcessor, ...]:
    """Returns the logits processors that the settings ask for. Without any, a search does no extra work."""
    asked: list[LogitsProcessor] = []
    if spec.repetition_penalty != 1.0:
        asked.append(logits_processors.RepetitionPenalty(spec.repetition_penalty))
    if inputs.suppressed.shape[0]:
        asked.append(logits_processors.SuppressTokens(inputs.suppressed))
    if inputs.min_lengths.shape[0]:
        asked.append(logits_processors.MinLength(inputs.min_lengths, spec.method.end_token))
    if spec.no_repeat_ngram:
        asked.append(logits_processors.NoRepeatNgram(spec.no_repeat_ngram))
    if spec.suppress_sequences:
        asked.append(logits_processors.SuppressSequences.of(spec.suppress_sequences))
    if spec.force_eos and not inputs.required.shape[1]:
        asked.append(logits_processors.ForceEos(inputs.max_lengths, spec.method.end_token))
    if inputs.prefixes.shape[1]:
        return (logits_processors.ForcePrefix(inputs.prefixes, tuple(asked)),)
    return tuple(asked)


def scoring(spec: SearchConfig, inputs: SearchInputs) -> tuple[LexicalConstraints | None, CoveragePenalty | None]:
    """Returns the selector of candidates and the score adjustment that the settings ask for."""
    constraints = None
    if inputs.required.shape[1]:
        constraints = LexicalConstraints(inputs.required, spec.method.end_token)
    return constraints, CoveragePenalty(inputs.segments, spec.coverage_penalty) if spec.coverage_penalty else None


def decoder_functions(
    model: ModelFunctions, spec: SearchConfig, inputs: SearchInputs
) -> tuple[DecoderFunctions, SlotState]:
    """Returns the decoder functions of a model, and a state of empty slots. For sampling each sentence has a slot."""
    slots = spec.method.num_slots if isinstance(spec.method, BeamSearchConfig) else inputs.tokens.shape[0]
    empty, refill = slot_functions(model, inputs, slots)
    keep_attention = spec.keep_attention or spec.coverage_penalty > 0

    def step(tokens: jax.Array, state: SlotState) -> tuple[jax.Array, Any, SlotState]:
        logits, attention, decoding = model.step(tokens, state.decoding)
        last_layer = {"attention": jnp.mean(attention[:, :, -1], axis=2)} if keep_attention else None  # over heads
        return logits, last_layer, dataclasses.replace(state, decoding=decoding)

    def reorder(state: SlotState, parents: jax.Array) -> SlotState:
        return dataclasses.replace(state, decoding=reorder_beams(state.decoding, parents))

    return DecoderFunctions(step, reorder, refill), empty


def search_in_loop(graphdef: GraphDef, spec: SearchConfig, params: Params, inputs: SearchInputs) -> Hypotheses:
    """Returns the outputs of the sentences of one loop, with the parameters of `prepare_for_inference`.

    Each of `suppressed`, `min_lengths`, `prefixes` and `required` is an empty array if no setting needs it.
    """
    functions, empty = decoder_functions(model_functions(graphdef, params, spec), spec, inputs)
    processors = make_processors(spec, inputs)
    if isinstance(spec.method, SamplingConfig):
        slots = jnp.arange(inputs.tokens.shape[0])
        filled = functions.refill(empty, slots >= 0, slots)
        found = sample(functions, spec.method, filled, inputs.max_lengths, inputs.seeds, processors)
    else:
        found = beam_search(functions, spec.method, empty, inputs.max_lengths, processors, *scoring(spec, inputs))
    return found if spec.keep_attention else dataclasses.replace(found, auxiliary=None)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def search(
    graphdef: GraphDef, spec: SearchConfig, mesh: Mesh | AbstractMesh, params: Params, inputs: SearchInputs
) -> Hypotheses:
    """Searches on every device of a mesh. JAX traces it once for all translators that differ in parameters alone.

    Sentences are split over all axes of the mesh, and every device has all parameters. Each device runs its own loop
    with its own slots. No device waits for another.
    """
    rows = jax.P(ALL_AXES)
    split = SearchInputs(
        tokens=rows,
        segments=rows,
        max_lengths=rows,
        min_lengths=rows,
        prefixes=rows,
        required=rows,
        seeds=rows,
        suppressed=jax.P(),
    )
    return jax.shard_map(
        functools.partial(search_in_loop, graphdef, spec),
        mesh=mesh,
        in_specs=(jax.P(), split),
        out_specs=rows,
        check_vma=False,
    )(params, inputs)


@functools.partial(jax.jit, static_argnums=(0, 1))
def sharded_search(graphdef: GraphDef, spec: SearchConfig, params: Params, inputs: SearchInputs) -> Hypotheses:
    """Searches on all devices of the mesh in context together, in one loop.

    The parameters have the shardings of `prepared_shardings`, and the compiler partitions the program. Slots are split
    over the axis "data". Every device gets all results.
    """
    with stationary_weights():
        found = search_in_loop(graphdef, spec, params, inputs)
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, jax.P()), found)


def traced_search(
    graphdef: GraphDef,
    spec: SearchConfig,
    mesh: Mesh | AbstractMesh,
    params: Params,
    inputs: SearchInputs,
    sharded: bool,
) -> Traced:
    """Returns `sharded_search` or `search`, traced for a mesh. The arguments may be shapes with shardings."""
    if not sharded:
        return search.trace(graphdef, spec, mesh, params, inputs)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh):
        return sharded_search.trace(graphdef, spec, params, inputs)
