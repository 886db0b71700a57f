"""Two or more systems that train on the same batches and take turns, so that whatever slows the machine slows all.

Each system lives in a process of its own: jax and torch both start threads when they are imported, so neither is
imported here at the top. What counts is the ratio of two turns that follow each other.
"""

import dataclasses
import itertools
import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np

from flax_transformer.cli.main import KEPT_MEMORY  # which imports no jax

Train = Callable[[], None]  # trains on every batch once, and returns when all is done


@dataclasses.dataclass(frozen=True)
class Built:
    """A system that is ready to train.

    Attributes:
        train: trains on every batch once.
        facts: what the other side must or may know; picklable.
    """

    train: Train
    facts: dict[str, Any]


def set_threads(count: int) -> None:
    """Keeps this process, and what it starts, on the first `count` CPUs that it may use."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:count]))
    os.environ["OMP_NUM_THREADS"] = str(count)


def our_trainer(config: Any, num_batches: int) -> Built:
    """Returns this project's training by a configuration, on the first batches of the first epoch.

    Facts: parameters, batches (tokens and segments of both sides), shapes, vocab_size, start_token, learning_rate,
    flops and target_tokens of a turn, and peak (FLOP/s, or None). No average of the parameters is kept, and gradients
    are not made in pieces, whatever the recipe says.
    """
    import jax

    from flax_transformer.cli.main import use_every_core
    from flax_transformer.data.batching import Position
    from flax_transformer.data.corpus import load_corpus
    from flax_transformer.data.loader import training_batches, training_plan
    from flax_transformer.data.preparation import prepare_tokenizers, prepare_training_pairs
    from flax_transformer.models.build import vocabulary_info
    from flax_transformer.optim.optimizer import make_optimizer
    from flax_transformer.optim.schedule import make_schedule
    from flax_transformer.parallel.mesh import batch_sharding, make_mesh
    from flax_transformer.training.loop import compile_steps
    from flax_transformer.training.metrics import TokenCounts
    from flax_transformer.training.state import describe_parameters, init_state, make_layout
    from flax_transformer.training.step import Objective, jit_train_step
    from flax_transformer.training.throughput import ModelFlops, peak_flops

    use_every_core()  # as the command does
    parts = load_corpus(config.data).train
    tokenizers = prepare_tokenizers(parts, config.tokenizer)
    limits = config.model.max_source_length, config.model.max_target_length
    pairs = prepare_training_pairs(parts, tokenizers, config.filters, *limits, config.subword_sampling)
    plan = training_plan(pairs, config.batching, config.training.seed)
    batches = [b for b, _ in itertools.islice(training_batches(pairs, plan, Position(0, 0)), num_batches)]

    mesh = make_mesh(config.mesh)
    schedule = make_schedule(config.optimizer, config.model.model_dim)
    vocabulary = vocabulary_info(tokenizers)
    parameter_info = describe_parameters(config.model, vocabulary)
    layout = make_layout(config.model, vocabulary, make_optimizer(config.optimizer, schedule, parameter_info), mesh)
    step = jit_train_step(layout, schedule, Objective(config.training.label_smoothing), config.training.seed, mesh)
    shapes = [(*b.source_tokens.shape, b.target_tokens.shape[1]) for b in batches]
    compiled = compile_steps(step, layout.abstract, plan.shapes, mesh)
    state = init_state(config.model, vocabulary, layout, config.training.seed)

    def train() -> None:
        nonlocal state
        for batch, shape in zip(batches, shapes, strict=True):
            state, _ = compiled[shape](state, jax.device_put(batch, batch_sharding(mesh)))
        jax.block_until_ready(state)

    tokens = sum((TokenCounts.of(batch) for batch in batches), TokenCounts())
    facts = {
        "parameters": layout.num_parameters,
        "batches": [(b.source_tokens, b.source_segments, b.target_tokens, b.target_segments) for b in batches],
        "shapes": sorted(set(shapes)),
        "vocab_size": vocabulary.target_size,
        "start_token": vocabulary.start_token,
        "learning_rate": float(np.asarray(schedule(config.optimizer.warmup_steps))),
        "flops": ModelFlops.of(parameter_info).total(tokens),
        "peak": peak_flops(mesh, config.model.compute_dtype),
        "target_tokens": tokens.target,
    }
    return Built(train, facts)


def _worker(build: Callable[..., Built], arguments: tuple, threads: int, pipe: Any) -> None:
    """Builds a system, trains once to warm up, then once for every message, answering with the seconds it took."""
    set_threads(threads)
    built = build(*arguments)
    built.train()
    pipe.send(built.facts)
    while pipe.recv():
        started = time.perf_counter()
        built.train()
        pipe.send(time.perf_counter() - started)


class Systems:
    """Systems in processes of their own.

    All of them have the allocator's settings with which the command `flax-transformer` starts itself, unless the
    environment has others in GLIBC_TUNABLES; an empty value is how it is without.

    Args:
        threads: of each.
    """

    def __init__(self, threads: int):
        self.threads = threads
        self.pipes: dict[str, Any] = {}

    def start(self, name: str, build: Callable[..., Built], *arguments: Any) -> dict[str, Any]:
        """Builds a system by `build(*arguments)`, a module's function, and returns its facts."""
        context = multiprocessing.get_context("spawn")
        self.pipes[name], end = context.Pipe()
        worker = context.Process(target=_worker, args=(build, arguments, self.threads, end), daemon=True)
        theirs = os.environ.get("GLIBC_TUNABLES")
        if theirs is None:
            os.environ["GLIBC_TUNABLES"] = KEPT_MEMORY  # read when a process starts
        worker.start()
        if theirs is None:
            del os.environ["GLIBC_TUNABLES"]
        end.close()  # so that a worker that dies ends the wait
        return self.pipes[name].recv()

    def take_turns(self, rounds: int) -> dict[str, list[float]]:
        """Returns the seconds of each system's turns, and ends all."""
        seconds: dict[str, list[float]] = {name: [] for name in self.pipes}
        for _ in range(rounds):
            for name, pipe in self.pipes.items():
                pipe.send(True)
                seconds[name].append(pipe.recv())
        for pipe in self.pipes.values():
            pipe.send(False)
        return seconds


def machine(*packages: str) -> str:
    """Returns processor type and versions in one line."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{platform.machine()}, Python {platform.python_version()}, {versions}"
