"""The train step that ours is compared with: a Transformer by PyTorch, compiled by it.

PyTorch is given what is best for it: one product for query, key and value, its fused attention with dropout, autocast
to bfloat16, and the fused Adam. What is added up between layers is bfloat16, too, as in our model. The whole forward
pass and the loss are one compiled function. Padding at the end of targets needs no mask under a causal one. So decoder
layers take the causal form alone.
"""

import time
from typing import Any

import numpy as np
import torch
from harness import Built
from torch import nn
from torch.nn import functional


class Attention(nn.Module):
    """Multi-head attention; `memory` is what keys and values are made of, None for self-attention."""

    def __init__(self, dim: int, heads: int, dropout: float, cross: bool):
        super().__init__()
        self.heads, self.dropout, self.cross = heads, dropout, cross
        self.query = nn.Linear(dim, dim) if cross else None
        self.joint = nn.Linear(dim, (2 if cross else 3) * dim)
        self.output = nn.Linear(dim, dim)

    def _split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x, memory, mask, causal):
        """Returns what each token attends to."""
        if self.query is None:
            query, key, value = self.joint(x).chunk(3, dim=-1)
        else:
            query = self.query(x)
            key, value = self.joint(memory).chunk(2, dim=-1)
        rate = self.dropout if self.training else 0.0
        parts = map(self._split, (query, key, value))
        out = functional.scaled_dot_product_attention(*parts, attn_mask=mask, dropout_p=rate, is_causal=causal)
        return self.output(out.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """One layer of the encoder, or of the decoder if it has cross-attention."""

    def __init__(self, sizes: tuple[int, int, int, int], dropout: tuple[float, float, float], pre: bool, cross: bool):
        super().__init__()
        dim, heads, hidden, _ = sizes
        self.rate, self.attention_rate, self.activation_rate = dropout
        self.pre = pre
        self.attention = Attention(dim, heads, self.attention_rate, False)
        self.cross = Attention(dim, heads, self.attention_rate, True) if cross else None
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3 if cross else 2))

    def _add(self, number, x, sublayer):
        norm = self.norms[number]
        made = functional.dropout(sublayer(norm(x) if self.pre else x), self.rate, self.training)
        return x + made if self.pre else norm(x + made).to(x.dtype)  # autocast gives float32

    def _feed_forward(self, x):
        return self.down(functional.dropout(functional.relu(self.up(x)), self.activation_rate, self.training))

    def forward(self, x, memory, mask):
        """Returns the output of the layer; `mask` is that of the source."""
        cross = self.cross
        if cross is None:
            x = self._add(0, x, lambda y: self.attention(y, None, mask, False))
            return self._add(1, x, self._feed_forward)
        x = self._add(0, x, lambda y: self.attention(y, None, None, True))
        x = self._add(1, x, lambda y: cross(y, memory, mask, False))
        return self._add(2, x, self._feed_forward)


class Transformer(nn.Module):
    """A Transformer with sinusoidal positions and one table; `forward` returns the mean loss of a batch.

    Args:
        sizes: model dim, heads, feed-forward dim, layers of each stack.
        work: an `accelerator.training.Work`.
    """

    def __init__(self, sizes: tuple[int, int, int, int], work: Any):
        super().__init__()
        dim, _, _, depth = sizes
        self.rate, self.pre = work.dropout[0], work.norm_order == "pre"
        self.embedding = nn.Embedding(work.vocab_size, dim)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        layers = [[Layer(sizes, work.dropout, self.pre, cross) for _ in range(depth)] for cross in (False, True)]
        self.encoder, self.decoder = map(nn.ModuleList, layers)
        self.ends = nn.ModuleList(nn.LayerNorm(dim) if self.pre else nn.Identity() for _ in range(2))
        angles = torch.arange(work.length)[:, None] / 10000 ** (2 * torch.arange(dim // 2) / dim)
        self.register_buffer("positions", torch.cat([angles.sin(), angles.cos()], dim=1))

    def _embed(self, tokens):
        x = self.embedding(tokens) * self.embedding.embedding_dim**0.5 + self.positions
        return functional.dropout(x.to(torch.bfloat16), self.rate, self.training)

    def forward(self, source, source_keys, inputs, target):
        """Returns the label-smoothed cross entropy; targets of -100 are padding."""
        mask, x = source_keys[:, None, None, :], self._embed(source)
        for layer in self.encoder:
            x = layer(x, None, mask)
        memory, x = self.ends[0](x), self._embed(inputs)
        for layer in self.decoder:
            x = layer(x, memory, mask)
        logits = functional.linear(self.ends[1](x), self.embedding.weight)
        return functional.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), label_smoothing=0.1)


def torch_step(sizes: tuple[int, int, int, int], work: Any, facts: dict[str, Any], mode: str) -> Built:
    """Returns turns of PyTorch's train step on the batches of ours, compiled in one of its modes."""
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Transformer(sizes, work).to(device)
    compiled = torch.compile(model, mode=mode)
    rate = facts["learning_rate"]
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, betas=(0.9, 0.98), eps=1e-9, fused=True)

    def prepared(batch):
        source, target = (torch.tensor(np.asarray(side), dtype=torch.long, device=device) for side in batch)
        inputs = torch.cat([torch.ones_like(target[:, :1]), target[:, :-1]], dim=1)
        return source, torch.ones_like(source, dtype=torch.bool), inputs, target

    batches = [prepared(batch) for batch in facts["batches"]]

    def take(steps: int) -> float:
        loss = None
        for number in range(steps):
            torch.compiler.cudagraph_mark_step_begin()
            with torch.autocast(device, torch.bfloat16):
                loss = compiled(*batches[number % len(batches)])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        assert loss is not None
        return loss.item()

    clock = time.perf_counter()
    first = take(1)
    compile_seconds = time.perf_counter() - clock
    parameters = sum(p.numel() for p in model.parameters())
    found = {"parameters": parameters, "compile": compile_seconds, "first_loss": first, "flops": facts["flops"]}
    return Built(lambda: take(work.steps), found)
