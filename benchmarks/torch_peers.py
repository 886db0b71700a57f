"""The models that training is compared with, from PyTorch's own layers, and their training.

PyTorch is given what is best for it: its fused layers wherever the model allows, logits only at tokens that are not
padding, its scaled dot-product attention, and the fused Adam.
"""

from typing import Any

import numpy as np
import torch
from harness import Built
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class Transformer(nn.Module):
    """A post-norm Transformer with sinusoidal positions.

    The encoder and decoder stacks are used by themselves: `nn.Transformer` adds a norm after each post-norm stack.

    Args:
        config: sizes, as `TransformerConfig` has them.
        vocab_size: rows of the one table.
        longest: tokens of a sentence at most.
    """

    def __init__(self, config: dict[str, Any], vocab_size: int, longest: int):
        super().__init__()
        self.dropout, dim = config["dropout"], config["model_dim"]
        sizes = {"d_model": dim, "nhead": config["num_heads"], "dim_feedforward": config["feed_forward_dim"]}
        layer: dict[str, Any] = sizes | {"dropout": self.dropout, "batch_first": True}
        self.embedding = nn.Embedding(vocab_size, dim)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        depths = config["num_encoder_layers"], config["num_decoder_layers"]
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**layer), depths[0], enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**layer), depths[1])
        angles = torch.arange(longest)[:, None] / 10000 ** (2 * torch.arange(dim // 2) / dim)
        self.register_buffer("positions", torch.cat([angles.sin(), angles.cos()], dim=1))
        self.register_buffer("future", torch.ones(longest, longest, dtype=torch.bool).triu(diagonal=1))

    def _embed(self, tokens):
        x = self.embedding(tokens) * self.embedding.embedding_dim**0.5 + self.positions[: tokens.shape[1]]
        return functional.dropout(x, self.dropout, self.training)

    def forward(self, source, source_keys, inputs, input_keys):
        """Returns the last layer's output at each token of the target."""
        memory = self.encoder(self._embed(source), src_key_padding_mask=~source_keys)
        length = inputs.shape[1]
        return self.decoder(
            self._embed(inputs),
            memory,
            tgt_mask=self.future[:length, :length],
            tgt_key_padding_mask=~input_keys,
            memory_key_padding_mask=~source_keys,
        )


class Recurrent(nn.Module):
    """A recurrent encoder-decoder: one bidirectional encoder layer, one decoder layer, one embedding table.

    Whole sequences go through the fused layers, the decoder's too unless the context joins its input.

    Args:
        config: sizes, as `RecurrentConfig` has them, and where the context joins as "join".
        vocab_size: rows of the one table.
        packed: whether source sentences are packed, or padded.
    """

    def __init__(self, config: dict[str, Any], vocab_size: int, packed: bool):
        super().__init__()
        dim, units = config["model_dim"], config["hidden_dim"]
        self.is_lstm, self.join, self.packed = config["cell"] == "lstm", config["join"], packed
        self.dropout = config["dropout"]
        layer, cell = (nn.LSTM, nn.LSTMCell) if self.is_lstm else (nn.GRU, nn.GRUCell)
        self.embedding = nn.Embedding(vocab_size, dim)
        self.encoder = layer(dim, units // 2, bidirectional=True, batch_first=True)
        self.bridge = nn.ModuleList(nn.Linear(units, units) for _ in range(2 if self.is_lstm else 1))
        if self.join == "input":
            self.decoder_cell = cell(dim + units, units)
            self.query = nn.Linear(units, units, bias=False)
            self.key = nn.Linear(units, units)
            self.score = nn.Linear(units, 1, bias=False)
        else:
            self.decoder = layer(dim, units, batch_first=True)
        if self.join == "output":
            self.key = nn.Linear(units, units, bias=False)
        self.readout = nn.Linear({"none": units, "input": 2 * units + dim, "output": 2 * units}[self.join], dim)

    def _drop(self, x):
        return functional.dropout(x, self.dropout, self.training)

    def _embed(self, tokens):
        return self._drop(self.embedding(tokens) * self.embedding.embedding_dim**0.5)

    def _encode(self, source, source_keys):
        x = self._embed(source)
        if self.packed:
            x = pack_padded_sequence(x, source_keys.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        states, last = self.encoder(x)
        if self.packed:
            states, _ = pad_packed_sequence(states, batch_first=True, total_length=source.shape[1])
        sides = [torch.cat([part[0], part[1]], dim=-1) for part in (last if self.is_lstm else (last,))]
        start = [bridge(side) for bridge, side in zip(self.bridge, sides, strict=True)]
        return states, [torch.tanh(start[0]), *start[1:]]

    def forward(self, source, source_keys, inputs, input_keys):
        """Returns what the logits are made of at each token of the target."""
        states, start = self._encode(source, source_keys)
        away = torch.zeros(source_keys.shape, device=source.device).masked_fill(~source_keys, -1e30)[:, None, :]
        if self.join == "input":
            return self._step_by_step(states, start, away, self._embed(inputs))
        begin = tuple(part[None] for part in start)
        top, _ = self.decoder(self._embed(inputs), begin if self.is_lstm else begin[0])
        if self.join == "output":
            weights = torch.softmax(torch.bmm(top, self.key(states).transpose(1, 2)) + away, dim=-1)
            top = torch.cat([top, torch.bmm(weights, states)], dim=-1)
        return self._drop(torch.tanh(self.readout(top)))

    def _step_by_step(self, states, state, away, embedded):
        keys, parts = self.key(states), []
        for t in range(embedded.shape[1]):
            scores = self.score(torch.tanh(keys + self.query(state[0])[:, None])).transpose(1, 2)
            context = torch.bmm(torch.softmax(scores + away, dim=-1), states)[:, 0]
            step_input = torch.cat([embedded[:, t], context], dim=-1)
            after = self.decoder_cell(step_input, tuple(state) if self.is_lstm else state[0])
            state = after if self.is_lstm else (after,)
            parts.append(torch.cat([state[0], context], dim=-1))
        return self._drop(torch.tanh(self.readout(torch.cat([torch.stack(parts, dim=1), embedded], dim=-1))))


def trainer(model: Any, facts: dict[str, Any], threads: int, bfloat16: bool, compiled: bool) -> Built:
    """Returns the training of a model on the batches of the other side.

    Args:
        model: a module; gives the hidden states that its `embedding` turns into logits.
        facts: of the other side, see `training.our_trainer`.
        threads: of a CPU.
        bfloat16: whether autocast takes products to bfloat16.
        compiled: whether PyTorch compiles the model.
    """
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device)
    run = torch.compile(model) if compiled else model
    optimizer = torch.optim.Adam(model.parameters(), lr=facts["learning_rate"], betas=(0.9, 0.98), eps=1e-9, fused=True)

    def prepared(batch):
        source, source_segments, target, target_segments = (torch.tensor(np.asarray(a)).to(device) for a in batch)
        mask, keys = target_segments > 0, [source_segments > 0, target_segments > 0]
        for side in keys:
            side[:, 0] = True  # a row that fills up the batch must keep one key, or its softmax has nothing to sum over
        first = torch.full_like(target[:, :1], facts["start_token"])
        inputs = torch.cat([first, target[:, :-1]], dim=1)
        return (source.long(), keys[0], inputs.long(), keys[1]), mask, target[mask].long()

    batches = [prepared(batch) for batch in facts["batches"]]

    def train() -> None:
        for inputs, mask, target in batches:
            with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
                logits = functional.linear(run(*inputs)[mask], model.embedding.weight)
                loss = functional.cross_entropy(logits, target, label_smoothing=facts["label_smoothing"])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if facts["clip_norm"]:
                nn.utils.clip_grad_norm_(model.parameters(), facts["clip_norm"])
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return Built(train, {"parameters": sum(p.numel() for p in model.parameters())})
