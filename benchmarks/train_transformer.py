"""Training throughput of the Transformer beside PyTorch's own layers.

    pip install -e ".[parity]"
    python benchmarks/train_transformer.py [--config FILE] [--sizes tiny small] [--rounds 7] [--batches 20]

On a GPU: `--sizes base big --compute-dtype bfloat16 --compile --tokens-per-batch 25000`.

Both systems get the same token ids in the same length-bucketed batches, the same sizes, tied embeddings, post-norm,
dropout at the same sites (embeddings, attention weights, activation, sub-layer outputs), label smoothing and Adam, and
take turns (`paired.py`). PyTorch is given what is best for it: logits only at tokens that are not padding, its scaled
dot-product attention, the fused Adam, and on request its compiler.
"""

import dataclasses
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from paired import Built, Systems, machine, our_trainer

# jax and torch each start threads when they are imported, so each is imported in its own process alone.

# Model dim, heads, feed-forward dim, layers of encoder and of decoder.
SIZES = {"tiny": (128, 4, 256, 4), "small": (256, 4, 1024, 3), "base": (512, 8, 2048, 6), "big": (1024, 16, 4096, 6)}


@dataclass(frozen=True)
class Options:
    """Compares training throughput with PyTorch.

    Attributes:
        config: recipe whose data, tokenizer and batches are used.
        sizes: which sizes to measure.
        dropout: at every site.
        tokens_per_batch: instead of the recipe's.
        compute_dtype: of products and activations; bfloat16 is autocast on PyTorch's side.
        compile: let PyTorch compile its model.
        rounds: turns of each system, after one to warm up.
        batches: in each turn, the first so many of the first epoch.
        threads: of each system.
    """

    config: Path = Path("configs/multi30k_en_de_tiny.yaml")
    sizes: tuple[str, ...] = ("tiny", "small")
    dropout: float = 0.1
    tokens_per_batch: int | None = None
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    rounds: int = 7
    batches: int = 20
    threads: int = 2


def ours(options: Options, size: str) -> Built:
    """Returns this project's training of a size."""
    from flax_transformer.config.reading import read_config
    from flax_transformer.models.transformer import TransformerConfig

    config = read_config(options.config)
    assert isinstance(config.model, TransformerConfig), "this benchmark needs the recipe of a Transformer"
    dim, heads, hidden, depth = SIZES[size]
    model = dataclasses.replace(
        config.model,
        model_dim=dim,
        num_heads=heads,
        feed_forward_dim=hidden,
        num_encoder_layers=depth,
        num_decoder_layers=depth,
        norm_order="post",
        activation="relu",
        share_embeddings="all",
        dropout=options.dropout,
        attention_dropout=options.dropout,
        activation_dropout=options.dropout,
        compute_dtype=options.compute_dtype,
    )
    batching = dataclasses.replace(
        config.batching, tokens_per_batch=options.tokens_per_batch or config.batching.tokens_per_batch
    )
    optimizer = dataclasses.replace(
        config.optimizer, name="adam", beta1=0.9, beta2=0.98, epsilon=1e-9, clip_norm=0.0, weight_decay=0.0
    )
    training = dataclasses.replace(config.training, label_smoothing=0.1)
    config = dataclasses.replace(config, model=model, batching=batching, optimizer=optimizer, training=training)
    built = our_trainer(config, options.batches)
    return Built(built.train, built.facts | {"model": dataclasses.asdict(model)})


def torch_peer(options: Options, peer: dict[str, Any]) -> Built:
    """Returns the training of the same model by PyTorch."""
    import torch
    from torch.nn import functional

    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config, dim = peer["model"], peer["model"]["model_dim"]
    longest = max(max(source, target) for _, source, target in peer["shapes"])
    angles = np.arange(longest)[:, None] / 10000 ** (2 * np.arange(dim // 2) / dim)
    positions = torch.tensor(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), dtype=torch.float32).to(device)
    causal = torch.ones(longest, longest, dtype=torch.bool, device=device).triu(diagonal=1)
    depth, options_of_layer = (
        config["num_encoder_layers"],
        {
            "d_model": dim,
            "nhead": config["num_heads"],
            "dim_feedforward": config["feed_forward_dim"],
            "dropout": options.dropout,
            "batch_first": True,
        },
    )

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(peer["vocab_size"], dim)
            torch.nn.init.normal_(self.embedding.weight, std=dim**-0.5)
            # The parts of torch.nn.Transformer, without the norms that it adds after post-norm stacks.
            self.encoder = torch.nn.TransformerEncoder(
                torch.nn.TransformerEncoderLayer(**options_of_layer), depth, enable_nested_tensor=False
            )
            self.decoder = torch.nn.TransformerDecoder(torch.nn.TransformerDecoderLayer(**options_of_layer), depth)

        def embed(self, tokens):
            return functional.dropout(
                self.embedding(tokens) * dim**0.5 + positions[: tokens.shape[1]], options.dropout, self.training
            )

        def forward(self, source, source_padding, inputs, target_padding):
            memory = self.encoder(self.embed(source), src_key_padding_mask=source_padding)
            length = inputs.shape[1]
            return self.decoder(
                self.embed(inputs),
                memory,
                tgt_mask=causal[:length, :length],
                tgt_key_padding_mask=target_padding,
                memory_key_padding_mask=source_padding,
            )

    model = Model().to(device)
    run = torch.compile(model) if options.compile else model
    optimizer = torch.optim.Adam(model.parameters(), lr=peer["learning_rate"], betas=(0.9, 0.98), eps=1e-9, fused=True)
    autocast = torch.autocast(device, torch.bfloat16, enabled=options.compute_dtype == "bfloat16")

    def prepared(batch):
        source, source_segments, target, target_segments = (
            torch.tensor(np.asarray(a)).long().to(device) for a in batch
        )
        # A row that fills up the batch must keep one key, or its softmax has nothing to sum over.
        source_padding, target_padding = source_segments == 0, target_segments == 0
        source_padding[:, 0] = False
        target_padding[:, 0] = False
        first = torch.full_like(target[:, :1], peer["start_token"])
        return (
            source,
            source_padding,
            torch.cat([first, target[:, :-1]], dim=1),
            target_padding,
            target,
            target_segments > 0,
        )

    batches = [prepared(batch) for batch in peer["batches"]]

    def train() -> None:
        for source, source_padding, inputs, target_padding, target, mask in batches:
            with autocast:
                hidden = run(source, source_padding, inputs, target_padding)[mask]
                logits = functional.linear(hidden, model.embedding.weight)
                loss = functional.cross_entropy(logits, target[mask], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return Built(train, {"parameters": sum(p.numel() for p in model.parameters()), "device": device})


def measure(options: Options, size: str) -> str:
    """Returns a row of the table for one size."""
    systems = Systems(options.threads)
    peer = systems.start("ours", ours, options, size)
    theirs = systems.start("PyTorch", torch_peer, options, peer)
    seconds = systems.take_turns(options.rounds)
    ratios = [their / our for our, their in zip(seconds["ours"], seconds["PyTorch"], strict=True)]
    medians = {system: statistics.median(seconds[system]) for system in seconds}

    def speed(system: str) -> str:
        rate = peer["flops"] / medians[system]
        share = f", {100 * rate / peer['peak']:.0f} % of the peak" if peer["peak"] else ""
        return f"{peer['target_tokens'] / medians[system]:,.0f} ({rate / 1e12:.3g} TFLOP/s{share})"

    return (
        f"| {size} | {peer['parameters']:,} / {theirs['parameters']:,} | "
        + " | ".join(speed(system) for system in medians)
        + f" | **{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f}) |"
    )


def main() -> None:
    """Measures every size and prints the table."""
    options = tyro.cli(Options)
    print(f"{options}\n{machine('jax', 'flax', 'torch')}\n")
    print("| size | parameters, ours / theirs | target tokens/s | PyTorch | ratio |\n|---|---|---|---|---|")
    for size in options.sizes:
        print(measure(options, size), flush=True)


if __name__ == "__main__":
    main()
