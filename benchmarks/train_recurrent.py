"""Training throughput of the recurrent encoder-decoders beside the same models built from PyTorch's own LSTM and GRU.

    pip install -e ".[parity]"
    python benchmarks/train_recurrent.py [--config FILE] [--rounds 5] [--batches 20] [--threads 2]

Both systems get the same token ids in the same padded batches, the same sizes, tied embeddings, dropout at the same
sites, label smoothing, clipping and Adam, float32, and take turns (`paired.py`).

PyTorch is given what is best for it: its fused layers wherever the model allows (the whole encoder; the whole decoder
too unless the context joins its input), sentences packed or padded as measures better, logits only at tokens that are
not padding, and the fused Adam.
"""

import dataclasses
import itertools
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from paired import Built, Systems, machine, our_trainer

# jax and torch each start threads when they are imported, so each is imported in its own process alone.

VARIANTS = {
    "no attention": {"attention": "none"},
    "general, joined to the output": {"attention": "general"},
    "additive, joined to the input": {"attention": "additive"},
}


@dataclass(frozen=True)
class Options:
    """Compares training throughput with PyTorch.

    Attributes:
        config: recipe whose data, tokenizer, batches, sizes and optimiser are used; its model must be recurrent.
        cells: which cells to measure.
        rounds: turns of each system, after one to warm up.
        batches: in each turn, the first so many of the first epoch.
        threads: of each system.
    """

    config: Path = Path("configs/number_words_rnn_attention.yaml")
    cells: tuple[str, ...] = ("lstm", "gru")
    rounds: int = 5
    batches: int = 20
    threads: int = 2


# --- this project


def ours(options: Options, changes: dict[str, Any]) -> Built:
    """Returns this project's training of a recurrent model."""
    from flax_transformer.config.reading import read_config
    from flax_transformer.models.recurrent import RecurrentConfig

    config = read_config(options.config)
    assert isinstance(config.model, RecurrentConfig), "this benchmark needs the recipe of a recurrent model"
    optimizer = config.optimizer
    same = (optimizer.name, optimizer.beta1, optimizer.beta2, optimizer.epsilon) == ("adam", 0.9, 0.98, 1e-9)
    assert same and optimizer.clip_norm > 0, "the peer has Adam (0.9, 0.98, 1e-9) with clipping"
    model = dataclasses.replace(config.model, **changes)
    built = our_trainer(dataclasses.replace(config, model=model), options.batches)
    more = {
        "model": dataclasses.asdict(model) | {"join": model.join},
        "label_smoothing": config.training.label_smoothing,
        "clip": config.optimizer.clip_norm,
    }
    return Built(built.train, built.facts | more)


# --- PyTorch


def torch_peer(options: Options, peer: dict[str, Any], packed: bool) -> Built:
    """Returns the training of the same model by PyTorch."""
    import torch
    from torch.nn import functional
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    torch.set_num_threads(options.threads)
    config = peer["model"]
    dim, units, join = config["model_dim"], config["hidden_dim"], config["join"]
    is_lstm = config["cell"] == "lstm"
    layer_class = torch.nn.LSTM if is_lstm else torch.nn.GRU
    cell_class = torch.nn.LSTMCell if is_lstm else torch.nn.GRUCell
    one_layer = (config["num_encoder_layers"], config["num_decoder_layers"]) == (1, 1)
    if not (one_layer and config["encoder_bidirectional"] and config["share_embeddings"] == "all"):
        raise SystemExit("the peer has one bidirectional encoder layer, one decoder layer and one embedding table")

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(peer["vocab_size"], dim)
            self.encoder = layer_class(dim, units // 2, bidirectional=True, batch_first=True)
            self.bridge = torch.nn.ModuleList(torch.nn.Linear(units, units) for _ in range(2 if is_lstm else 1))
            if join == "input":
                self.decoder_cell = cell_class(dim + units, units)
                self.query = torch.nn.Linear(units, units, bias=False)
                self.key = torch.nn.Linear(units, units)
                self.score = torch.nn.Linear(units, 1, bias=False)
            else:
                self.decoder = layer_class(dim, units, batch_first=True)
            if join == "output":
                self.key = torch.nn.Linear(units, units, bias=False)
            width = {"none": units, "input": 2 * units + dim, "output": 2 * units}[join]
            self.readout = torch.nn.Linear(width, dim)

        def drop(self, x):
            return functional.dropout(x, config["dropout"], self.training)

        def encode(self, source, source_mask):
            x = self.drop(self.embedding(source) * dim**0.5)
            if packed:
                lengths = source_mask.sum(1).clamp(min=1).cpu()  # a filling row has no token, but must have a length
                x = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            states, last = self.encoder(x)
            if packed:
                states, _ = pad_packed_sequence(states, batch_first=True, total_length=source.shape[1])
            last = last if is_lstm else (last,)
            sides = [torch.cat([part[0], part[1]], dim=-1) for part in last]
            start = [bridge(side) for bridge, side in zip(self.bridge, sides, strict=True)]
            return states, [torch.tanh(start[0]), *start[1:]]

        def forward(self, source, source_mask, target):
            states, start = self.encode(source, source_mask)
            first = torch.full_like(target[:, :1], peer["start_token"])
            embedded = self.drop(self.embedding(torch.cat([first, target[:, :-1]], dim=1)) * dim**0.5)
            away = torch.zeros(source_mask.shape).masked_fill(~source_mask, -1e30)[:, None, :]
            if join != "input":
                begin = tuple(part[None] for part in start)
                top, _ = self.decoder(embedded, begin if is_lstm else begin[0])
                if join == "output":
                    weights = torch.softmax(torch.bmm(top, self.key(states).transpose(1, 2)) + away, dim=-1)
                    top = torch.cat([top, torch.bmm(weights, states)], dim=-1)
                return self.drop(torch.tanh(self.readout(top)))
            keys, state, parts = self.key(states), start, []
            for t in range(target.shape[1]):
                scores = self.score(torch.tanh(keys + self.query(state[0])[:, None])).transpose(1, 2)
                context = torch.bmm(torch.softmax(scores + away, dim=-1), states)[:, 0]
                after = self.decoder_cell(
                    torch.cat([embedded[:, t], context], dim=-1), tuple(state) if is_lstm else state[0]
                )
                state = after if is_lstm else (after,)
                parts.append(torch.cat([state[0], context], dim=-1))
            top = torch.cat([torch.stack(parts, dim=1), embedded], dim=-1)
            return self.drop(torch.tanh(self.readout(top)))

    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=peer["learning_rate"], betas=(0.9, 0.98), eps=1e-9, fused=True)
    batches = [
        (torch.tensor(s).long(), torch.tensor(sm) > 0, torch.tensor(t).long(), torch.tensor(tm) > 0)
        for s, sm, t, tm in (map(np.asarray, batch) for batch in peer["batches"])
    ]

    def train() -> None:
        for source, source_mask, target, target_mask in batches:
            hidden = model(source, source_mask, target)[target_mask]
            logits = functional.linear(hidden, model.embedding.weight)
            loss = functional.cross_entropy(logits, target[target_mask], label_smoothing=peer["label_smoothing"])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), peer["clip"])
            optimizer.step()

    return Built(train, {"parameters": sum(p.numel() for p in model.parameters())})


def measure(options: Options, cell: str, variant: str) -> str:
    """Returns a row of the table for one model."""
    changes = {"cell": cell, "context_join": None, "input_feeding": False} | VARIANTS[variant]
    systems = Systems(options.threads)
    peer = systems.start("ours", ours, options, changes)
    theirs = systems.start("torch padded", torch_peer, options, peer, False)
    systems.start("torch packed", torch_peer, options, peer, True)
    seconds = systems.take_turns(options.rounds)
    best = min(("torch padded", "torch packed"), key=lambda system: statistics.median(seconds[system]))
    ratios = [their / our for our, their in zip(seconds["ours"], seconds[best], strict=True)]
    rates = {system: peer["target_tokens"] / statistics.median(seconds[system]) for system in seconds}
    return (
        f"| {cell}, {variant} | {peer['parameters']:,} / {theirs['parameters']:,} | "
        f"{rates['ours']:,.0f} | {rates['torch padded']:,.0f} | {rates['torch packed']:,.0f} | "
        f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f}) |"
    )


def main() -> None:
    """Measures every model and prints the table."""
    options = tyro.cli(Options)
    print(f"{options.config}, {options.batches} batches, {options.rounds} rounds, {options.threads} threads each")
    print(machine("jax", "flax", "torch") + "\n")
    print("| model | parameters, ours / theirs | target tokens/s | PyTorch padded | packed | ratio to the better |")
    print("|---|---|---|---|---|---|")
    for cell, variant in itertools.product(options.cells, VARIANTS):
        print(measure(options, cell, variant), flush=True)


if __name__ == "__main__":
    main()
