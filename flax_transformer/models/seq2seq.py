"""The interface of every sequence-to-sequence model: all that training, search and inference know of one.

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
class Memory:
    """What an encoder hands on.

    Attributes:
        states: [B, S, D], one vector for each source token.
        segments: [B, S], 0 for padding.
        decoder_start: tree of arrays [B, ...] from which a recurrent decoder starts; None for a model that needs none.
    """

    states: Float[Array, "B S D"]
    segments: Int[Array, "B S"]
    decoder_start: Any = None


@array_tree
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """All that a decoder keeps between steps; which leaves follow a beam is declared by where they stand.

    The same tree also holds axes.

    Attributes:
        per_sentence: tree of arrays [B, ...], the same for all beams of a sentence and never copied over beams.
        per_beam: tree of arrays [B, K, ...], reordered when beams are.
        written: tree of arrays [B, ...] to which each step adds and which are never reordered. What was not written
            since the sentence began has weight 0 (and must be finite): a new sentence takes a slot's over as they are.
        positions: [B], 0-based index of the token that is decoded next; per sentence, so that a slot of the batch can
            start anew while others go on.
    """

    per_sentence: Any
    per_beam: Any
    written: Any
    positions: Any


@array_tree
@dataclasses.dataclass(frozen=True)
class StepOutput:
    """The result of one decoding step.

    Attributes:
        logits: [B, K, V] float32.
        attention: [B, K, L, N, S], weights over the source of every decoder layer and head; None for a model without
            attention. Costs nothing in a compiled program that does not use it.
    """

    logits: Float[Array, "B K V"]
    attention: Float[Array, "B K L N S"] | None


@dataclasses.dataclass(frozen=True)
class ParameterRoles:
    """How often a model uses its kernels, told by the modules that hold them.

    Where one named module holds another, the inner one says it of the kernels in it.

    Attributes:
        per_source_token: modules whose kernels are applied to each source token.
        per_target_token: modules whose kernels are applied to each target token.
        output_table: the table that the output projection applies to each target token.
        per_sentence: modules whose kernels are applied once a sentence.
    """

    per_source_token: tuple[nnx.Module, ...]
    per_target_token: tuple[nnx.Module, ...]
    output_table: nnx.Param
    per_sentence: tuple[nnx.Module, ...] = ()


@runtime_checkable
class Seq2Seq(Protocol):
    """An encoder-decoder with teacher forcing for training and a step function for search."""

    @property
    def max_source_length(self) -> int:
        """The most source tokens of one sentence, end token included."""
        ...

    @property
    def max_target_length(self) -> int:
        """The most target tokens of one sentence, end token included."""
        ...

    def encode(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        segments: Int[Array, "B S"],
        key: PRNGKeyArray | None = None,
    ) -> Memory:
        """Returns the encoder's output; `key` is for dropout, None means evaluation."""
        ...

    def __call__(self, batch: Batch, key: PRNGKeyArray | None = None) -> Float[Array, "B T D"]:
        """Returns the decoder's hidden vectors when it is fed the reference (teacher forcing)."""
        ...

    def output_projection(self) -> OutputProjection:
        """Returns the map from hidden vectors to logits."""
        ...

    def init_decode_state(self, memory: Memory, num_beams: int, max_length: int, reordered: bool = True) -> DecodeState:
        """Returns the state before the first token, with room for `max_length` tokens.

        Beams that are not `reordered`, such as samples, cost less where there are many.
        """
        ...

    def decode_step(self, tokens: Int[Array, "B K"], state: DecodeState) -> tuple[StepOutput, DecodeState]:
        """Returns scores for the token after `tokens`, and the state that has read them."""
        ...

    def parameter_roles(self) -> ParameterRoles:
        """Returns how often each kernel is used, from which the operations of a step are counted."""
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
