"""The cost of a training step as the work grows: tokens in a batch, length of a sentence, depth, width.

    python benchmarks/growth.py [--rounds 5] [--picture FILE]

One of the four grows at a time, from the same base. Theory says: straight in tokens and in depth; straight in the
length at the same number of tokens, since a token's attention looks at the whole sentence; and in the width a part that
is straight (norms, dropout, softmax) and one that grows as its square (products). Beside each time stands what a line,
or for the width a parabola, through all the others of its row says.
"""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from paired import machine, set_threads

from flax_transformer.cli.main import keep_memory, use_every_core
from flax_transformer.data.batching import BatchShape
from flax_transformer.models.build import VocabularyInfo
from flax_transformer.models.transformer import TransformerConfig
from flax_transformer.optim.optimizer import OptimizerConfig, make_optimizer
from flax_transformer.optim.schedule import make_schedule
from flax_transformer.parallel.mesh import MeshConfig, batch_sharding, make_mesh
from flax_transformer.shapes import Batch
from flax_transformer.training.loop import compile_steps
from flax_transformer.training.state import describe_parameters, init_state, make_layout
from flax_transformer.training.step import Objective, jit_train_step


@dataclass(frozen=True)
class Options:
    """Measures how the cost of a step grows.

    Attributes:
        rounds: turns of each size, after one to warm up.
        steps: in each turn.
        vocab_size: rows of the one table.
        threads: CPUs that the process may use.
        picture: file for a picture; none is drawn when left out.
    """

    rounds: int = 5
    steps: int = 3
    vocab_size: int = 2_000
    threads: int = 2
    picture: Path | None = None


@dataclass(frozen=True)
class Work:
    """One size: `tokens` on each side in rows of `length`, and a model of `depth` + `depth` layers of `width`."""

    tokens: int = 2048
    length: int = 32
    depth: int = 2
    width: int = 128


SWEEPS = {
    "tokens": (1024, 2048, 4096, 8192),
    "length": (16, 32, 64, 128, 256),
    "depth": (1, 2, 4, 8),
    "width": (64, 128, 256, 512),
}


def trainer(work: Work, options: Options) -> Any:
    """Returns a function that takes `options.steps` training steps and waits for them."""
    model = TransformerConfig(
        model_dim=work.width,
        num_heads=4,
        feed_forward_dim=4 * work.width,
        num_encoder_layers=work.depth,
        num_decoder_layers=work.depth,
    )
    optimizer_config = OptimizerConfig()
    mesh = make_mesh(MeshConfig())
    vocabulary = VocabularyInfo(options.vocab_size, options.vocab_size, 1)
    schedule = make_schedule(optimizer_config, model.model_dim)
    optimizer = make_optimizer(optimizer_config, schedule, describe_parameters(model, vocabulary))
    layout = make_layout(model, vocabulary, optimizer, mesh)
    step = jit_train_step(layout, schedule, Objective(0.1), 0, mesh)
    rows = work.tokens // work.length
    (compiled,) = compile_steps(step, layout.abstract, [BatchShape(rows, work.length, work.length)], mesh).values()
    rng = np.random.default_rng(0)

    def side() -> tuple[np.ndarray, ...]:
        tokens = rng.integers(4, options.vocab_size, (rows, work.length), np.int32)
        positions = np.broadcast_to(np.arange(work.length, dtype=np.int32), tokens.shape)
        return tokens, positions, np.ones_like(tokens)

    batch = jax.device_put(Batch(*side(), *side()), batch_sharding(mesh))
    state = init_state(model, vocabulary, layout, 0)

    def train() -> None:
        nonlocal state
        for _ in range(options.steps):
            state, _ = compiled(state, batch)
        jax.block_until_ready(state)

    return train


def predicted(sizes: np.ndarray, times: np.ndarray, degree: int) -> np.ndarray:
    """Returns for each size what the curve through all the other sizes says; relative errors weigh the same."""
    found = []
    for left_out in range(len(sizes)):
        others = np.arange(len(sizes)) != left_out
        curve = np.polynomial.Polynomial.fit(sizes[others], times[others], degree, w=1 / times[others])
        found.append(float(curve(sizes[left_out])))
    return np.array(found)


def measure(name: str, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """Returns sizes, and milliseconds a step [sizes, rounds]; the sizes take turns."""
    trainers = [trainer(dataclasses.replace(Work(), **{name: size}), options) for size in SWEEPS[name]]
    times: list[list[float]] = [[] for _ in trainers]
    for turn in range(options.rounds + 1):
        for train, kept in zip(trainers, times, strict=True):
            started = time.perf_counter()
            train()
            if turn:
                kept.append(1e3 * (time.perf_counter() - started) / options.steps)
    return np.array(SWEEPS[name], float), np.array(times)


def draw(results: dict[str, tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """Draws the four sweeps side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(results), figsize=(4 * len(results), 3.2), layout="constrained")
    for panel, (name, (sizes, times)) in zip(panels, results.items(), strict=True):
        panel.plot(sizes, times, "o-")
        panel.set(xlabel=name, ylabel="ms a step", xlim=(0, None), ylim=(0, None))
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measures the four sweeps and prints a table of each."""
    options = tyro.cli(Options)
    keep_memory()
    set_threads(options.threads)
    use_every_core()
    print(f"{options}\nbase {Work()}\n{machine('jax', 'flax')}\n")
    results = {}
    for name in SWEEPS:
        sizes, all_times = measure(name, options)
        times = np.median(all_times, axis=1)
        results[name] = sizes, times
        curve = predicted(sizes, times, 2 if name == "width" else 1)
        print(
            f"| {name} | " + " | ".join(f"{size:,.0f}" for size in sizes) + " |\n|---" * 1 + "|---" * len(sizes) + "|"
        )
        print("| ms a step | " + " | ".join(f"{value:.1f}" for value in times) + " |")
        spread = zip(all_times.min(axis=1), all_times.max(axis=1), strict=True)
        print("| least to most | " + " | ".join(f"{least:.1f} to {most:.1f}" for least, most in spread) + " |")
        print("| by the others | " + " | ".join(f"{value:.1f}" for value in curve) + " |\n", flush=True)
    if options.picture is not None:
        draw(results, options.picture)


if __name__ == "__main__":
    main()
