"""The attention weights of whole models are those that their forward pass multiplies values by."""

from typing import Any

import jax
import numpy as np
from flax import nnx

from flax_transformer.models.build import build_model
from flax_transformer.models.recurrent_config import RecurrentConfig
from flax_transformer.models.seq2seq import shift_right
from flax_transformer.ops import attention
from tests import tiny

BATCH = tiny.batch([9, 6], [8, 5])


def test_weights_are_those_of_a_forward_pass(monkeypatch):
    """Layer by layer: those of the encoder, then self-attention and cross-attention of each decoder layer."""
    model = tiny.transformer(norm_order="pre")
    used, weights_of = [], attention.attention_weights

    def noted(*arguments, **options):
        used.append(weights_of(*arguments, **options))
        return used[-1]

    monkeypatch.setattr(attention, "attention_weights", noted)
    found = jax.jit(lambda model, batch: model.attention_weights(batch))(model, BATCH)
    assert len(used) == 2 + 2 * 3  # each attention is computed once

    def forward(model: Any, batch: Any) -> list[jax.Array]:
        used.clear()
        model(batch)
        return list(used)

    made = jax.jit(forward)(model, BATCH)
    assert len(made) == 2 + 2 * 3
    for name, expected in (("encoder", made[:2]), ("decoder", made[2::2]), ("cross", made[3::2])):
        np.testing.assert_allclose(getattr(found, name), np.stack(expected, axis=1), rtol=1e-5, atol=1e-6)
    assert found.encoder.shape == (2, 2, 4, 9, 9) and found.decoder.shape == (2, 3, 4, 8, 8)
    target, source = np.asarray(BATCH.target_segments) > 0, np.asarray(BATCH.source_segments) > 0
    for weights, queries in ((found.encoder, source), (found.decoder, target), (found.cross, target)):
        sums = np.moveaxis(np.asarray(weights).sum(-1), 3, 1)[queries]
        np.testing.assert_allclose(sums, 1.0, rtol=1e-5)
    assert np.all(np.triu(np.asarray(found.decoder), 1) == 0)
    assert np.all(np.asarray(found.encoder)[1, ..., 6:] == 0) and np.all(np.asarray(found.cross)[1, ..., 6:] == 0)


def recurrent(**changes: Any) -> Any:
    values: dict[str, Any] = {"model_dim": 8, "hidden_dim": 12, "share_embeddings": "target_output"}
    config = RecurrentConfig(**(values | changes))
    return tiny.randomised(nnx.eval_shape(lambda: build_model(config, tiny.VOCABULARY, rngs=nnx.Rngs(0))), 1)


def test_the_weights_of_a_recurrent_model_are_those_of_its_readout():
    """With attention at the output all steps' weights are computed at once from the states of the layers."""
    model = recurrent(attention="general")
    found = jax.jit(lambda model, batch: model.attention_weights(batch))(model, BATCH)

    @jax.jit
    def at_once(model, batch):
        encoded = model.encode(batch.source_tokens, batch.source_positions, batch.source_segments)
        embedded = model.target_embedding(shift_right(batch.target_tokens, batch.target_positions, model.start_token))
        state, source, tops = model.decoder.start(encoded.decoder_start, 1), model.decoder.read(encoded), []
        for t in range(embedded.shape[1]):
            gates = model.decoder.read_input(embedded[:, t : t + 1])
            state, _, _ = model.decoder.advance(gates, state, source, [None])
            tops.append(state.layers[-1][0])
        return model.decoder.attend(jax.numpy.concatenate(tops, axis=1), source)[1]

    assert found.encoder is None and found.decoder is None and found.cross.shape == (2, 1, 1, 8, 9)
    np.testing.assert_allclose(found.cross[:, 0, 0], at_once(model, BATCH), rtol=1e-5, atol=1e-6)


def test_a_recurrent_model_without_attention_has_no_weights():
    found = recurrent(attention="none").attention_weights(BATCH)
    assert found.encoder is found.decoder is found.cross is None
