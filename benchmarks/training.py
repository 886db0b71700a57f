"""Training throughput beside PyTorch.

    pip install -e ".[parity]"
    python benchmarks/training.py transformer [--config FILE] [--data FOLDER] [--sizes tiny small] [--rounds 7]
    python benchmarks/training.py recurrent [--config FILE] [--data FOLDER] [--cells lstm gru]

On a GPU: `transformer --sizes base big --compute-dtype bfloat16 --compile --tokens-per-batch 25000`.

Both systems take turns. They get the same token ids in the same batches, and the same sizes, dropout sites and tied
embeddings. Both use label smoothing and Adam. `torch_peers.py` has what PyTorch is given.
"""

import dataclasses
import itertools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from harness import Built, RecipeBenchmark, Report, Systems, ratios, run

# Model dim, heads, feed-forward dim, layers of encoder and of decoder.
SIZES = {"tiny": (128, 4, 256, 4), "small": (256, 4, 1024, 3), "base": (512, 8, 2048, 6), "big": (1024, 16, 4096, 6)}

VARIANTS = {
    "no attention": {"attention": "none"},
    "general, joined to the output": {"attention": "general"},
    "additive, joined to the input": {"attention": "additive"},
}


@dataclass(frozen=True)
class Transformer(RecipeBenchmark):
    """Training of the Transformer beside PyTorch's own layers.

    Attributes:
        sizes: which sizes to measure.
        dropout: at every site.
        tokens_per_batch: instead of the recipe's.
        compute_dtype: of products and activations; bfloat16 is autocast on PyTorch's side.
        compile: lets PyTorch compile its model.
        batches: in each turn, the first so many of the first epoch.
    """

    packages = ("jax", "flax", "torch")

    rounds: int = 7
    sizes: tuple[str, ...] = ("tiny", "small")
    dropout: float = 0.1
    tokens_per_batch: int | None = None
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    batches: int = 20

    def measure(self, report: Report) -> None:
        """Adds a row for each size."""
        columns = ["size", "parameters, ours / theirs", "ours, target tokens/s", "PyTorch", "ours against it"]
        report.table(columns, map(self.row, self.sizes))

    def row(self, size: str) -> list[str]:
        """Returns the row of one size."""
        systems = Systems()
        facts = systems.start("ours", our_transformer, self, size)
        theirs = systems.start("PyTorch", torch_transformer, self, facts)
        seconds = systems.take_turns(self.rounds)

        def speed(system: str) -> str:
            median = statistics.median(seconds[system])
            rate = facts["flops"] / median
            share = f", {100 * rate / facts['peak']:.0f} % of the peak" if facts["peak"] else ""
            return f"{facts['target_tokens'] / median:,.0f} ({rate / 1e12:.3g} TFLOP/s{share})"

        parameters = f"{facts['parameters']:,} / {theirs['parameters']:,}"
        return [size, parameters, *map(speed, seconds), ratios(seconds["ours"], seconds["PyTorch"])]


@dataclass(frozen=True)
class Recurrent(RecipeBenchmark):
    """Training of recurrent encoder-decoders beside PyTorch's LSTM and GRU.

    The recipe's sizes and optimiser are used; its model must be recurrent. PyTorch's source sentences are padded in one
    system and packed in another, and the faster one counts.

    Attributes:
        cells: which cells to measure.
        batches: in each turn, the first so many of the first epoch.
    """

    packages = ("jax", "flax", "torch")

    config: Path = Path("configs/multi30k_en_de_rnn_attention.yaml")
    cells: tuple[str, ...] = ("lstm", "gru")
    batches: int = 20

    def measure(self, report: Report) -> None:
        """Adds a row for each cell and form of attention."""
        columns = ["model", "parameters, ours / theirs", "target tokens/s", "PyTorch padded", "packed"]
        report.table([*columns, "ours against the better"], self.rows())

    def rows(self) -> Iterator[list[str]]:
        """Yields the rows."""
        for cell, variant in itertools.product(self.cells, VARIANTS):
            systems = Systems()
            facts = systems.start("ours", our_recurrent, self, {"cell": cell, **VARIANTS[variant]})
            theirs = systems.start("padded", torch_recurrent, self, facts, False)
            systems.start("packed", torch_recurrent, self, facts, True)
            seconds = systems.take_turns(self.rounds)
            best = min(seconds["padded"], seconds["packed"], key=statistics.median)
            rates = [f"{facts['target_tokens'] / statistics.median(values):,.0f}" for values in seconds.values()]
            parameters = f"{facts['parameters']:,} / {theirs['parameters']:,}"
            yield [f"{cell}, {variant}", parameters, *rates, ratios(seconds["ours"], best)]


# --- This project


def our_transformer(options: Transformer, size: str) -> Built:
    """Returns this project's training of a size."""
    dim, heads, hidden, depth = SIZES[size]
    sizes = {"model_dim": dim, "num_heads": heads, "feed_forward_dim": hidden}
    depths = {"num_encoder_layers": depth, "num_decoder_layers": depth}
    like_torch = {"norm_order": "post", "positions": "sinusoidal", "activation": "relu", "share_embeddings": "all"}
    dropout = {name: options.dropout for name in ("dropout", "attention_dropout", "activation_dropout")}
    config = options.recipe()
    if config.model.kind != "transformer":
        raise SystemExit(f"this benchmark needs the recipe of a Transformer, and {options.config} is none.")
    model = dataclasses.replace(
        config.model, **sizes, **depths, **like_torch, **dropout, compute_dtype=options.compute_dtype
    )
    tokens = options.tokens_per_batch or config.batching.tokens_per_batch
    adam = {"name": "adam", "beta1": 0.9, "beta2": 0.98, "epsilon": 1e-9, "clip_norm": 0.0, "weight_decay": 0.0}
    config = dataclasses.replace(
        config,
        model=model,
        batching=dataclasses.replace(config.batching, tokens_per_batch=tokens),
        optimizer=dataclasses.replace(config.optimizer, **adam),
        training=dataclasses.replace(config.training, label_smoothing=0.1),
    )
    return our_trainer(config, options.batches)


def our_recurrent(options: Recurrent, changes: dict[str, Any]) -> Built:
    """Returns this project's training of a recurrent model."""
    config = options.recipe()
    if config.model.kind != "rnn":
        raise SystemExit(f"this benchmark needs the recipe of a recurrent model, and {options.config} is none.")
    optimizer = config.optimizer
    if (optimizer.name, optimizer.beta1, optimizer.beta2, optimizer.epsilon) != ("adam", 0.9, 0.98, 1e-9):
        raise SystemExit("this benchmark's peer has Adam with 0.9, 0.98 and 1e-9; choose a recipe with the same.")
    model = dataclasses.replace(config.model, context_join=None, input_feeding=False, **changes)
    built = our_trainer(dataclasses.replace(config, model=model), options.batches)
    return Built(built.work, built.facts | {"model": built.facts["model"] | {"join": model.join}})


def our_trainer(config: Any, num_batches: int) -> Built:
    """Returns this project's training by a configuration, on the first batches of the first epoch.

    No average of the parameters is kept, and gradients are not made in pieces, whatever the recipe says. The facts are
    what `torch_peers.trainer` reads, sizes of the model, and flops, peak (FLOP/s, or None) and target tokens of a turn.
    """
    from flax_transformer.cli.main import use_every_core
    from flax_transformer.data.batching import Position
    from flax_transformer.data.corpus import load_corpus
    from flax_transformer.data.loader import training_batches
    from flax_transformer.data.preparation import prepare_tokenizers
    from flax_transformer.experiment.text import prepare_text
    from flax_transformer.models.build import vocabulary_info
    from flax_transformer.parallel.mesh import make_mesh
    from flax_transformer.training.metrics import TokenCounts
    from flax_transformer.training.state import describe_parameters
    from flax_transformer.training.throughput import ModelFlops, peak_flops

    use_every_core()  # as the command does
    mesh, corpus = make_mesh(config.mesh), load_corpus(config.data)
    tokenizers = prepare_tokenizers(corpus.train, config.tokenizer)
    text = prepare_text(config, corpus, tokenizers, mesh)
    epoch = training_batches(text.train, text.plan, Position(0, 0))
    batches = [batch for batch, _ in itertools.islice(epoch, num_batches)]
    vocabulary = vocabulary_info(tokenizers)
    work, learning_rate, parameters = train_steps(config, vocabulary, text.plan.shapes, batches)
    tokens = sum((TokenCounts.of(batch) for batch in batches), TokenCounts())
    facts = {
        "model": dataclasses.asdict(config.model),
        "parameters": parameters,
        "batches": [(b.source_tokens, b.source_segments, b.target_tokens, b.target_segments) for b in batches],
        "longest": max(max(shape[1:]) for shape in text.plan.shapes),
        "vocab_size": vocabulary.target_size,
        "start_token": vocabulary.start_token,
        "learning_rate": learning_rate,
        "label_smoothing": config.training.label_smoothing,
        "clip_norm": config.optimizer.clip_norm,
        "flops": ModelFlops.of(describe_parameters(config.model, vocabulary)).total(tokens),
        "peak": peak_flops(mesh, config.model.compute_dtype),
        "target_tokens": tokens.target,
    }
    return Built(work, facts)


def train_steps(config: Any, vocabulary: Any, shapes: Any, batches: list[Any]) -> tuple[Any, float, int]:
    """Returns a function that trains on each batch once, the learning rate after the warm-up, and the parameters."""
    import jax

    from flax_transformer.optim.optimizer import make_optimizer
    from flax_transformer.optim.schedule import make_schedule
    from flax_transformer.parallel.mesh import batch_sharding, make_mesh
    from flax_transformer.training.loop import compile_steps, shape_of
    from flax_transformer.training.state import describe_parameters, init_state, make_layout
    from flax_transformer.training.step import Objective, jit_train_step

    mesh = make_mesh(config.mesh)
    schedule = make_schedule(config.optimizer, config.model.model_dim)
    optimizer = make_optimizer(config.optimizer, schedule, describe_parameters(config.model, vocabulary))
    layout = make_layout(config.model, vocabulary, optimizer, mesh)
    step = jit_train_step(layout, schedule, Objective(config.training.label_smoothing), config.training.seed, mesh)
    compiled = compile_steps(step, layout.abstract, shapes, mesh)
    state = init_state(config.model, vocabulary, layout, config.training.seed)

    def train() -> None:
        nonlocal state
        for batch in batches:
            state, _ = compiled[shape_of(batch)](state, jax.device_put(batch, batch_sharding(mesh)))
        jax.block_until_ready(state)

    return train, float(np.asarray(schedule(config.optimizer.warmup_steps))), layout.num_parameters


# --- PyTorch


def torch_transformer(options: Transformer, facts: dict[str, Any]) -> Built:
    """Returns the training of the same Transformer by PyTorch."""
    import torch_peers

    model = torch_peers.Transformer(facts["model"], facts["vocab_size"], facts["longest"])
    return torch_peers.trainer(model, facts, options.threads, options.compute_dtype == "bfloat16", options.compile)


def torch_recurrent(options: Recurrent, facts: dict[str, Any], packed: bool) -> Built:
    """Returns the training of the same recurrent model by PyTorch."""
    import torch_peers

    config = facts["model"]
    one_layer = (config["num_encoder_layers"], config["num_decoder_layers"]) == (1, 1)
    if not (one_layer and config["encoder_bidirectional"] and config["share_embeddings"] == "all"):
        raise SystemExit("the peer has one bidirectional encoder layer, one decoder layer and one embedding table.")
    model = torch_peers.Recurrent(config, facts["vocab_size"], packed)
    return torch_peers.trainer(model, facts, options.threads, False, False)


if __name__ == "__main__":
    run({"transformer": Transformer, "recurrent": Recurrent})
