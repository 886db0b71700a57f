"""Recurrent encoder and decoder against PyTorch with the same weights: outputs, last states and gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_transformer.models.recurrent import RecurrentEncoder
from flax_transformer.models.recurrent_config import RecurrentConfig
from flax_transformer.models.recurrent_decoder import make_decoder
from flax_transformer.models.seq2seq import EncoderOutput
from tests import tiny

pytestmark = pytest.mark.parity

DIM, UNITS = 6, 8
LENGTHS = [7, 3, 5]


def our_encoder(kind: Any, layers: int, bidirectional: bool, peer: Any) -> Any:
    """Our encoder with the weights of a torch module; torch stacks gates along rows and has two biases."""
    config = RecurrentConfig(
        model_dim=DIM,
        hidden_dim=UNITS,
        cell=kind,
        num_encoder_layers=layers,
        encoder_bidirectional=bidirectional,
        dropout=0.0,
    )
    encoder = nnx.eval_shape(lambda: RecurrentEncoder(config, rngs=nnx.Rngs(0)))
    graphdef, _ = nnx.split(encoder)
    gates = {"lstm": 4, "gru": 3}[kind]
    weights = {name: value.detach().numpy() for name, value in peer.named_parameters()}
    cells = {}
    for layer in range(layers):
        for direction, suffix in (("forward", ""), ("backward", "_reverse"))[: 2 if bidirectional else 1]:

            def of(name: str, at: str = f"_l{layer}{suffix}") -> np.ndarray:
                return weights[f"{name}{at}"]

            def kernel(matrix: np.ndarray) -> np.ndarray:  # [G * U, I] -> [I, G, U]
                return matrix.reshape(gates, -1, matrix.shape[1]).transpose(2, 0, 1)

            input_bias, state_bias = (of(name).reshape(gates, -1) for name in ("bias_ih", "bias_hh"))
            cell = {"input_kernel": kernel(of("weight_ih")), "recurrent_kernel": kernel(of("weight_hh"))}
            if kind == "lstm":
                cell["bias"] = input_bias + state_bias
            else:  # the candidate's recurrent bias stands inside the reset gate's product
                cell["bias"] = input_bias + np.concatenate([state_bias[:2], np.zeros_like(state_bias[:1])])
                cell["candidate_bias"] = state_bias[2]
            cells[f"{direction}_{layer:02d}"] = cell
    params = {"cells": jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), cells)}
    return nnx.merge(graphdef, params)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_encoder_equals_torch_on_padded_batches(kind, layers, bidirectional):
    import torch
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    torch.manual_seed(layers)
    peer_class = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[kind]
    units = UNITS // 2 if bidirectional else UNITS
    peer = peer_class(DIM, units, num_layers=layers, bidirectional=bidirectional, batch_first=True)
    x = np.random.default_rng(0).normal(size=(len(LENGTHS), max(LENGTHS), DIM)).astype(np.float32)

    torch_x = torch.tensor(x, requires_grad=True)
    packed = pack_padded_sequence(torch_x, LENGTHS, batch_first=True, enforce_sorted=False)
    packed_outputs, states = peer(packed)
    expected, _ = pad_packed_sequence(packed_outputs, batch_first=True)
    weights = np.random.default_rng(1).normal(size=tuple(expected.shape)).astype(np.float32)
    (expected * torch.tensor(weights)).sum().backward()

    encoder = our_encoder(kind, layers, bidirectional, peer)
    mask = np.arange(max(LENGTHS))[None, :] < np.asarray(LENGTHS)[:, None]
    segments = jnp.asarray(mask, jnp.int32)
    outputs, last = encoder(jnp.asarray(x), segments, None)
    np.testing.assert_allclose(np.asarray(outputs) * mask[..., None], expected.detach().numpy(), rtol=1e-5, atol=1e-6)

    directions = 2 if bidirectional else 1
    states = states if kind == "lstm" else (states,)
    for index, state in enumerate(states):  # [layers * directions, B, U]
        by_layer = state.detach().numpy().reshape(layers, directions, len(LENGTHS), units)
        for layer in range(layers):
            side_by_side = np.concatenate(list(by_layer[layer]), axis=-1)
            np.testing.assert_allclose(last[layer][index], side_by_side, rtol=1e-5, atol=1e-6)

    def weighted(inputs: jax.Array) -> jax.Array:
        found, _ = encoder(inputs, segments, None)
        return jnp.sum(jnp.where(mask[..., None], found * weights, 0.0))

    gradient = jax.grad(weighted)(jnp.asarray(x))
    assert torch_x.grad is not None
    np.testing.assert_allclose(gradient, torch_x.grad.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("attention", ["none", "general"])
def test_decoder_equals_torch_under_teacher_forcing(kind, attention):
    """The decoder's layers are torch's own, started from a given state; attention and readout are written out."""
    import torch

    config = RecurrentConfig(
        model_dim=DIM, hidden_dim=UNITS, cell=kind, attention=attention, num_decoder_layers=2, dropout=0.0
    )
    decoder: Any = tiny.randomised(nnx.eval_shape(lambda: make_decoder(config, rngs=nnx.Rngs(0))), 4)
    peer = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[kind](DIM, UNITS, num_layers=2, batch_first=True)
    for layer in range(2):
        cell = decoder.cells[f"{layer:02d}"]
        bias, recurrent_bias = np.asarray(cell.bias[...]), np.zeros(cell.bias.shape, np.float32)
        if kind == "gru":
            recurrent_bias[2] = np.asarray(cell.candidate_bias[...])
        for name, value in (
            (
                "weight_ih",
                np.asarray(cell.input_kernel[...]).transpose(1, 2, 0).reshape(-1, cell.input_kernel.shape[0]),
            ),
            ("weight_hh", np.asarray(cell.recurrent_kernel[...]).transpose(1, 2, 0).reshape(-1, UNITS)),
            ("bias_ih", bias.ravel()),
            ("bias_hh", recurrent_bias.ravel()),
        ):
            getattr(peer, f"{name}_l{layer}").data = torch.tensor(value)

    rng = np.random.default_rng(5)
    embedded = rng.normal(size=(3, 6, DIM)).astype(np.float32)
    states = rng.normal(size=(3, 7, UNITS)).astype(np.float32)
    segments = (np.arange(7)[None, :] < np.array(LENGTHS)[:, None]).astype(np.int32)
    num_states = {"lstm": 2, "gru": 1}[kind]
    start = rng.normal(size=(num_states, 2, 3, UNITS)).astype(np.float32)  # [state, layer, B, U]

    begin = tuple(torch.tensor(part) for part in start)
    expected, _ = peer(torch.tensor(embedded), begin if kind == "lstm" else begin[0])
    if attention == "general":
        keys = torch.tensor(states) @ torch.tensor(np.asarray(decoder.alignment.key.kernel[...]))
        scores = torch.bmm(expected, keys.transpose(1, 2))
        scores = scores.masked_fill(torch.tensor(segments == 0)[:, None, :], -torch.inf)
        expected = torch.cat([expected, torch.bmm(torch.softmax(scores, dim=-1), torch.tensor(states))], dim=-1)
    kernel, bias = (torch.tensor(np.asarray(p[...])) for p in (decoder.readout.kernel, decoder.readout.bias))
    expected = torch.tanh(expected @ kernel + bias)

    encoded = decoder.read(EncoderOutput(jnp.asarray(states), jnp.asarray(segments), None))
    layers = [tuple(jnp.asarray(start[i, layer]) for i in range(num_states)) for layer in range(2)]
    found = decoder(jnp.asarray(embedded), decoder.start(layers, 1), encoded, None)
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-4, atol=1e-5)
