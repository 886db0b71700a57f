"""The recurrent encoder against PyTorch's LSTM and GRU with the same weights: outputs, last states and gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_transformer.models.rnn import RecurrentConfig, RecurrentEncoder

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
