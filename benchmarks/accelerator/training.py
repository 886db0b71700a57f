"""The train step of a recipe on one device: its speed, its memory and its kernels, beside PyTorch in the same run."""

import dataclasses
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from harness import Built, Report, Systems, ratios, spread
from training import SIZES

from accelerator.kernels import KernelTime, kernel_tables, profiled, save_kernels
from accelerator.measurement import Measurement, gibibytes, median_of, short

Size = Literal["base", "big", "tiny"]

PEAK = 989e12  # FLOP/s of a Hopper GPU in dense products of bfloat16, by its data sheet


@dataclass(frozen=True)
class Work:
    """What one step is given: rows of `length` + `length` tokens without padding, and how it is trained.

    Attributes:
        rows: sentence pairs.
        length: tokens of each side.
        vocab_size: rows of the one table.
        norm_order: "post" or "pre".
        dropout: rates of dropout on sub-layers, on attention weights and after the activation.
        steps: number of steps in one turn.
    """

    rows: int
    length: int
    vocab_size: int
    norm_order: str = "post"
    dropout: tuple[float, float, float] = (0.1, 0.1, 0.1)
    steps: int = 20


WORKS: dict[str, Work] = {
    "base": Work(400, 64, 32_000),
    "big": Work(160, 64, 32_000),
    "tiny": Work(128, 32, 10_000, "pre", (0.3, 0.0, 0.0), steps=200),  # of configs/multi30k_en_de_tiny.yaml
}


@dataclass(frozen=True)
class Training(Measurement):
    """The train step beside PyTorch's, both in bfloat16.

    Both have the same sizes, dropout sites, label smoothing, Adam and tied embeddings, and no token of padding. Both
    read batches that are on the device already. A turn ends when the last loss is on the host.

    Attributes:
        size: of the model.
        torch: whether PyTorch takes part, and how it is compiled. "default" and "reduce-overhead" are its names.
        profile: whether the kernels of some steps are listed, and the program is kept.
    """

    size: Size = "base"
    torch: tuple[str, ...] = ("default",)
    profile: bool = False

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Model dim, heads, feed-forward dim, and layers of each stack."""
        return (32, 4, 64, 1) if self.tiny else SIZES[self.size]

    @property
    def work(self) -> Work:
        """What a step is given."""
        work = WORKS[self.size]
        return dataclasses.replace(work, rows=8, length=8, vocab_size=64, steps=2) if self.tiny else work

    def measure(self, report: Report) -> None:
        """Adds figures of ours alone, its kernels, then those of turns with PyTorch."""
        work, systems = self.work, Systems()
        report.say(f"{self.size}: sizes {self.sizes}, {work}\n")
        facts = systems.start("ours", our_step, self)
        report.say(described(facts))
        alone = self.noted("ours alone", facts, systems.turns(self.rounds)["ours"])
        columns = ["system", "ms a step", "target tokens/s", "source + target", "% of 989 TFLOP/s", "peak GiB"]
        report.table(columns, [self.row("ours alone", facts, alone)])
        report.say(beside_plan(facts, median_of(alone)))
        if self.profile:
            self.add_profile(report, systems)
        for mode in self.torch:
            self.add_peer(report, systems, facts, columns, mode)
        systems.end("ours")

    def add_profile(self, report: Report, systems: Systems) -> None:
        """Adds the kernels of our step, and keeps them and the program."""
        try:
            if self.folder is not None:
                systems.call("ours", save_program, f"{self.folder}/{self.size}_train_step.hlo.txt.gz")
            kernels, busy, steps = systems.call("ours", profile_steps, 1 if self.tiny else 3)
        except Exception as error:  # the figures that follow need no profile
            report.say(f"no profile: {short(error)}\n")
            return
        kernel_tables(report, kernels, busy, steps)
        self.note(f"kernels of {self.size}", busy_ms=busy * 1e3, steps=steps)
        if self.folder is not None:
            save_kernels(self.folder / f"{self.size}_train_step.kernels.csv.gz", kernels, steps)

    def add_peer(self, report: Report, systems: Systems, facts: Any, columns: list[str], mode: str) -> None:
        """Adds rows of turns with PyTorch, compiled in one mode."""
        name = f"PyTorch, {mode}"
        try:
            theirs = systems.start(name, their_step, self.sizes, self.work, facts, mode)
            seconds = systems.turns(self.rounds)
            theirs["peak"] = systems.call(name, torch_peak)
        except Exception as error:  # of any class of PyTorch; our figures stand without it
            report.say(f"{name}: {short(error)}\n")
            self.note(name, size=self.size, error=short(error))
            systems.end(name)
            return
        systems.end(name)
        losses = f"{facts['first_loss']:.3f} and {theirs['first_loss']:.3f}"
        started = f"{theirs['parameters']:,} parameters, {theirs['compile']:.1f} s to the end of the first step"
        report.say(f"{name}: {started}; first losses {losses}\n")
        rows = [
            self.row(who, what, self.noted(who, what, seconds[who])) for who, what in (("ours", facts), (name, theirs))
        ]
        report.table(columns, rows)
        report.say(f"ours against {name}: {ratios(seconds['ours'], seconds[name])}\n")

    def noted(self, name: str, facts: dict[str, Any], seconds: list[float]) -> list[float]:
        """Adds a system's figures to the file, and returns its milliseconds for each step."""
        per_step = [value / self.work.steps for value in seconds]
        kept = {key: value for key, value in facts.items() if key != "batches"}
        self.note(
            name, size=self.size, seconds_a_step=per_step, tokens_a_side=self.work.rows * self.work.length, **kept
        )
        return [1e3 * value for value in per_step]

    def row(self, name: str, facts: dict[str, Any], milliseconds: list[float]) -> list[str]:
        """Returns the row of a system."""
        rate = 1e3 / median_of(milliseconds)
        tokens = self.work.rows * self.work.length
        share = 100 * facts["flops"] * rate / PEAK
        return [
            name, spread(milliseconds, 3), f"{tokens * rate:,.0f}", f"{2 * tokens * rate:,.0f}", f"{share:.2f}",
            gibibytes(facts.get("peak")),
        ]  # fmt: skip


def described(facts: dict[str, Any]) -> str:
    """Returns what is known of our program before it has run."""
    memory = ", ".join(f"{name} {gibibytes(value)}" for name, value in facts["memory"].items())
    return (
        f"{facts['parameters']:,} parameters, {facts['flops'] / 1e12:.3f} TFLOP a step in products with parameters; "
        f"traced and lowered in {facts['lower']:.1f} s, compiled in {facts['compile']:.1f} s, state made in "
        f"{facts['init']:.1f} s. Memory by the compiler, GiB: {memory}; peak of the device {gibibytes(facts['peak'])}\n"
    )


def beside_plan(facts: dict[str, Any], milliseconds: float) -> str:
    """Returns what `flax-transformer plan` would say of this program, beside what was measured."""
    bound = facts["planned_seconds"]
    time = "no bound is known for this hardware"
    if bound is not None:
        time = f"{1e3 * bound:.3f} ms at least, measured {milliseconds:.3f} ms, {milliseconds / 1e3 / bound:.2f} times"
    return (
        f"beside the plan: {time}; memory planned {gibibytes(facts['memory']['needed'])} GiB, peak measured "
        f"{gibibytes(facts['peak'])} GiB\n"
    )


# --- This project


@dataclass
class Step:
    """Our compiled train step with its state.

    Attributes:
        compiled: the program.
        state: the state, which each step donates.
        batches: batches on the device.
    """

    compiled: Any
    state: Any
    batches: list[Any]
    taken: int = field(default=0)

    def take(self, steps: int) -> float:
        """Takes some steps, and returns the last sum of losses."""
        metrics = None
        for _ in range(steps):
            self.state, metrics = self.compiled(self.state, self.batches[self.taken % len(self.batches)])
            self.taken += 1
        assert metrics is not None
        loss = float(metrics.sums.loss)
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}")
        return loss


_step: Step | None = None  # in the process of ours


def our_step(options: Training) -> Built:
    """Returns turns of our train step; facts are also what `torch_step` reads."""
    import jax

    from flax_transformer.data.batching import BatchShape
    from flax_transformer.experiment.recipe_programs import RecipePrograms
    from flax_transformer.models.build import VocabularyInfo
    from flax_transformer.optim.optimizer import make_optimizer
    from flax_transformer.optim.schedule import make_schedule
    from flax_transformer.parallel.memory import needed_bytes
    from flax_transformer.parallel.mesh import MeshConfig, batch_sharding, make_mesh
    from flax_transformer.parallel.program_cost import SPEEDS, Cost, read_kernels
    from flax_transformer.parallel.topology import hardware_name
    from flax_transformer.training.metrics import TokenCounts
    from flax_transformer.training.state import describe_parameters, init_state, make_layout
    from flax_transformer.training.throughput import ModelFlops

    work, mesh = options.work, make_mesh(MeshConfig(), jax.devices()[:1])
    config, vocabulary = our_config(options), VocabularyInfo(work.vocab_size, work.vocab_size, 1)
    clock = time.perf_counter()
    traced = RecipePrograms(config, vocabulary, mesh).traced_train_step(BatchShape(work.rows, work.length, work.length))
    lowered = traced.lower()
    lower_seconds, clock = time.perf_counter() - clock, time.perf_counter()
    compiled = lowered.compile()
    compile_seconds, clock = time.perf_counter() - clock, time.perf_counter()
    schedule, info = (
        make_schedule(config.optimizer, config.model.model_dim),
        describe_parameters(config.model, vocabulary),
    )
    layout = make_layout(config.model, vocabulary, make_optimizer(config.optimizer, schedule, info), mesh)
    state = jax.block_until_ready(init_state(config.model, vocabulary, layout, 0))
    batches = [random_batch(work, seed) for seed in range(4)]
    placed = [jax.device_put(batch, batch_sharding(mesh)) for batch in batches]
    global _step
    _step = Step(compiled, state, placed)
    init_seconds = time.perf_counter() - clock
    first = _step.take(1)
    found, hardware = compiled.memory_analysis(), hardware_name(jax.devices()[0].device_kind)
    names = ("argument", "output", "alias", "temp", "generated_code")
    facts = {
        "parameters": layout.num_parameters,
        "flops": ModelFlops.of(info).total(TokenCounts.of(batches[0])),
        "planned_seconds": Cost.of(read_kernels(compiled.as_text() or ""), SPEEDS[hardware]).seconds
        if hardware
        else None,
        "lower": lower_seconds,
        "compile": compile_seconds,
        "init": init_seconds,
        "first_loss": first / (work.rows * work.length),
        "memory": {name: getattr(found, f"{name}_size_in_bytes") for name in names}
        | {"needed": needed_bytes(compiled)},
        "peak": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
        "batches": [(batch.source_tokens, batch.target_tokens) for batch in batches],
        "learning_rate": float(np.asarray(schedule(config.optimizer.warmup_steps))),
    }
    return Built(lambda: take_turn(options.work.steps), facts)


def take_turn(steps: int) -> float:
    """Takes some of our steps, in the process of ours."""
    assert _step is not None
    return _step.take(steps)


def our_config(options: Training) -> Any:
    """Returns the configuration of a training; it has Adam and its schedule from the Transformer paper, no clipping."""
    from flax_transformer.config.recipe import Config, TrainingConfig
    from flax_transformer.models.transformer_config import TransformerConfig
    from flax_transformer.optim.optimizer import OptimizerConfig

    dim, heads, hidden, depth = options.sizes
    work = options.work
    model = TransformerConfig(
        model_dim=dim,
        num_heads=heads,
        feed_forward_dim=hidden,
        num_encoder_layers=depth,
        num_decoder_layers=depth,
        max_source_length=work.length,
        max_target_length=work.length,
        norm_order="pre" if work.norm_order == "pre" else "post",
        dropout=work.dropout[0],
        attention_dropout=work.dropout[1],
        activation_dropout=work.dropout[2],
        compute_dtype="bfloat16",
    )
    optimizer, training = OptimizerConfig(clip_norm=0.0), TrainingConfig(label_smoothing=0.1)
    return Config(model=model, optimizer=optimizer, training=training)


def random_batch(work: Work, seed: int) -> Any:
    """Returns a batch of random tokens without padding."""
    from flax_transformer.shapes import Batch

    rng = np.random.default_rng(seed)

    def side() -> tuple[np.ndarray, ...]:
        tokens = rng.integers(4, work.vocab_size, (work.rows, work.length), np.int32)
        positions = np.broadcast_to(np.arange(work.length, dtype=np.int32), tokens.shape).copy()
        return tokens, positions, np.ones_like(tokens)

    return Batch(*side(), *side())


def save_program(path: str) -> None:
    """Writes our compiled step as text."""
    import gzip

    assert _step is not None
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write(_step.compiled.as_text())


def profile_steps(steps: int) -> tuple[list[KernelTime], float, int]:
    """Returns the kernels of some of our steps, the seconds in which any ran, and the steps."""
    assert _step is not None
    kept = _step
    kernels, busy = profiled(lambda: kept.take(steps), kept.compiled.as_text())
    return kernels, busy, steps


# --- PyTorch


def their_step(sizes: tuple[int, int, int, int], work: Work, facts: dict[str, Any], mode: str) -> Built:
    """Returns turns of PyTorch's train step, compiled in one of its modes."""
    from accelerator.torch_step import torch_step

    return torch_step(sizes, work, facts, mode)


def torch_peak() -> int | None:
    """Returns the most bytes that PyTorch's arrays have taken on the device."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
