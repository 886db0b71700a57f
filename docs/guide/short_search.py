"""The search of one batch, with the batch's own positions and segments. So an experiment may change them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from short_training import LENGTH, Text, Trained

from flax_transformer import Batch, BeamSearchConfig, DecoderFunctions, LengthPenalty, beam_search
from flax_transformer.models.seq2seq import reorder_beams


def decoded(trained: Trained, batch: Batch, num_rows: int) -> list[str]:
    """Returns the greedy translations of the first rows of a batch. Nothing is checked or repaired."""
    model, target = trained.model, trained.text.tokenizers.target
    config = BeamSearchConfig(
        1, num_rows, LENGTH, target.special.start, target.special.end, LengthPenalty.parse("none")
    )

    def step(tokens: Any, state: Any) -> tuple[Any, None, Any]:
        output, state = model.decode_step(tokens, state)
        return output.logits, None, state

    functions = DecoderFunctions(step, reorder_beams, lambda state, slots, sentences: state)

    @jax.jit
    def run(tokens: Any, positions: Any, segments: Any) -> Any:
        decoder = model.init_decode_state(model.encode(tokens, positions, segments), 1, LENGTH)
        return beam_search(functions, config, decoder, jnp.full((num_rows,), LENGTH))

    found = jax.device_get(run(*(jnp.asarray(side[:num_rows]) for side in batch[:3])))
    rows = zip(found.tokens[:, 0], found.lengths[:, 0], strict=True)
    return [target.decode([t for t in row[:length].tolist() if t != target.special.end]) for row, length in rows]


def share_exact(found: list[str], text: Text) -> float:
    """Returns the share of translations of the first held-out lines that have no mistake, in %."""
    return 100.0 * float(np.mean([a == b for a, b in zip(found, text.held_out_lines.target, strict=False)]))


def with_padding(batch: Batch, places: int, hidden: bool) -> Batch:
    """Returns a batch with more padding on the source side.

    Args:
        batch: the batch.
        places: number of places of padding to add.
        hidden: whether the segments say so. Otherwise all padding, old and new, counts as tokens.
    """
    tokens, positions, segments = (np.pad(np.asarray(side), ((0, 0), (0, places))) for side in batch[:3])
    if not hidden:
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        segments = np.ones_like(segments)
    return batch._replace(source_tokens=tokens, source_positions=positions, source_segments=segments)
