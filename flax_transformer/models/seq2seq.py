"""The interface between sequence-to-sequence models and training, search and inference.

Legend: B batch, S source length, T target length, D model dim, K beams, V vocabulary, L layers, N heads.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from flax_transformer.ops.vocabulary import OutputProjection
from flax_transformer.shapes import Batch, array_tree


@array_tree
@dataclasses.dataclass(frozen=True)
class EncoderOutput:
    """The output of an encoder.

    Attributes:
        states: [B, S, D], one vector for each source token.
        segments: [B, S], 0 for padding.
        decoder_start: tree of arrays [B, ...], first state of a recurrent decoder; None for other models.

    Example:
        >>> encoded = EncoderOutput(jnp.zeros((2, 5, 8)), segments=jnp.ones((2, 5), jnp.int32))
        >>> jax.tree.map(jnp.shape, encoded).states
        (2, 5, 8)
    """

    states: Float[Array, "B S D"]
    segments: Int[Array, "B S"]
    decoder_start: Any = None


@array_tree
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The state of a decoder between steps. The field of a leaf says whether it is reordered with the beams.

    A tree of axis numbers, as for `jax.vmap`, has the same fields.

    Attributes:
        per_sentence: tree of arrays [B, ...], shared by all beams of a sentence and never copied over beams.
        per_beam: tree of arrays [B, K, ...], reordered with the beams.
        append_only: arrays [B, ...] that steps append to and that are never reordered. A new sentence inherits its
            slot's old values. Entries that it has not written must be finite and get weight 0.
        positions: [B], 0-based index of the next token. It is per sentence, so that one slot can restart while others
            go on.

    Example:
        >>> state = DecodeState(None, per_beam=jnp.array([[10, 20]]), append_only=None, positions=jnp.array([0]))
        >>> reorder_beams(state, jnp.array([[1, 1]])).per_beam.tolist()
        [[20, 20]]
    """

    per_sentence: Any
    per_beam: Any
    append_only: Any
    positions: Any


@array_tree
@dataclasses.dataclass(frozen=True)
class StepOutput:
    """The result of one decoding step.

    Attributes:
        logits: [B, K, V] float32.
        attention: [B, K, L, N, S], weights over the source of every decoder layer and head; None for a model without
            attention. A compiled program that does not read it does not compute it.

    Example:
        >>> step = StepOutput(logits=jnp.array([[[0.0, 2.0, 1.0]]]), attention=None)
        >>> int(step.logits[0, 0].argmax())
        1
    """

    logits: Float[Array, "B K V"]
    attention: Float[Array, "B K L N S"] | None


@array_tree
@dataclasses.dataclass(frozen=True)
class AttentionWeights:
    """The attention weights of a whole model; None for an attention that it lacks.

    The arrays of a single sentence have no axis B.

    Row t of an array is a query: the position of source token t, or the step that predicts target token t. A decoder
    that predicts token t has read the start token and the target tokens before t. So column t of `decoder` is the start
    token for t = 0, and target token t - 1 otherwise.

    Attributes:
        encoder: [B, L, N, S, S], self-attention of the encoder.
        decoder: [B, L, N, T, T], self-attention of the decoder.
        cross: [B, L, N, T, S], attention of the decoder over the source.
    """

    encoder: Any
    decoder: Any
    cross: Any


@dataclasses.dataclass(frozen=True)
class ParameterRoles:
    """How often a model applies its kernels, declared for the modules that hold them.

    If one named module holds another, the inner one decides for its own kernels.

    Attributes:
        per_source_token: modules whose kernels are applied to each source token.
        per_target_token: modules whose kernels are applied to each target token.
        output_table: the table of the output projection, applied to each target token.
        per_sentence: modules whose kernels are applied once for each sentence.
    """

    per_source_token: tuple[nnx.Module, ...]
    per_target_token: tuple[nnx.Module, ...]
    output_table: nnx.Param
    per_sentence: tuple[nnx.Module, ...] = ()


@runtime_checkable
class Seq2Seq(Protocol):
    """An encoder-decoder with teacher forcing for training and a step function for search.

    Example:
        >>> from flax_transformer import TransformerConfig, VocabularyInfo, build_model
        >>> config = TransformerConfig(model_dim=8, num_heads=2, feed_forward_dim=8, max_source_length=32)
        >>> model = nnx.eval_shape(lambda: build_model(config, VocabularyInfo(20, 20, start_token=1), rngs=nnx.Rngs(0)))
        >>> isinstance(model, Seq2Seq), model.max_source_length
        (True, 32)
    """

    @property
    def max_source_length(self) -> int:
        """The most source tokens of one sentence, end token included."""
        ...

    @property
    def max_target_length(self) -> int:
        """The most target tokens of one sentence, end token included."""
        ...

    @property
    def compute_dtype(self) -> jnp.dtype:
        """The type of products and activations."""
        ...

    def encode(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        segments: Int[Array, "B S"],
        key: PRNGKeyArray | None = None,
    ) -> EncoderOutput:
        """Returns the encoder's output. `key` is the random key of dropout; None means evaluation."""
        ...

    def __call__(self, batch: Batch, key: PRNGKeyArray | None = None) -> Float[Array, "B T D"]:
        """Returns the decoder's hidden vectors with the reference as its input (teacher forcing)."""
        ...

    def attention_weights(self, batch: Batch) -> AttentionWeights:
        """Returns the weights of every layer and head, with the reference as the decoder's input."""
        ...

    def output_projection(self) -> OutputProjection:
        """Returns the map from hidden vectors to logits."""
        ...

    def set_prepared_projection(self, projection: OutputProjection) -> None:
        """Makes `output_projection` return `projection`, which has the form that a search reads."""
        ...

    def init_decode_state(
        self, encoded: EncoderOutput, num_beams: int, max_length: int, reordered: bool = True
    ) -> DecodeState:
        """Returns the state before the first token, with room for `max_length` tokens.

        Many beams cost less if they are not `reordered`, as in sampling.
        """
        ...

    def decode_step(self, tokens: Int[Array, "B K"], state: DecodeState) -> tuple[StepOutput, DecodeState]:
        """Returns scores for the token after `tokens`, and the state after reading `tokens`."""
        ...

    def parameter_roles(self) -> ParameterRoles:
        """Returns how often each kernel is applied. The operations of a step are computed from it."""
        ...


def shift_right(tokens: Int[Array, "B T"], positions: Int[Array, "B T"], start_token: int) -> Int[Array, "B T"]:
    """Returns the decoder's input: each token's predecessor, and the start token at position 0 of each segment."""
    previous = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(positions == 0, start_token, previous)


def reorder_beams(state: DecodeState, parents: Int[Array, "B K"]) -> DecodeState:
    """Returns `state` with beam k of each sentence replaced by its beam `parents[b, k]`.

    Example: parents [[0, 0, 2]] copies beam 0 over beam 1 and keeps beam 2.
    """

    def gather(leaf):  # [B, K, ...] -> [B, K, ...]
        return jax.vmap(lambda beams, chosen: jnp.take(beams, chosen, axis=0, mode="clip"))(leaf, parents)

    return dataclasses.replace(state, per_beam=jax.tree.map(gather, state.per_beam))
