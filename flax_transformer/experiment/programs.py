"""The programs of a run: train step, validation and translation."""

import time
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from flax_transformer.config.recipe import Config
from flax_transformer.experiment.text import PreparedText
from flax_transformer.experiment.validation import Validation
from flax_transformer.inference.translator import Translator
from flax_transformer.models.build import vocabulary_info
from flax_transformer.optim.optimizer import make_optimizer
from flax_transformer.optim.schedule import make_schedule
from flax_transformer.parallel.memory import needed_bytes, stored_bytes
from flax_transformer.training.loop import CompiledSteps, compile_steps
from flax_transformer.training.state import StateLayout, describe_parameters, make_layout
from flax_transformer.training.step import Objective, jit_train_step
from flax_transformer.training.throughput import FlopFigures, ModelFlops, peak_flops


@dataclass(frozen=True)
class RunPrograms:
    """The programs of a run, made from shapes. No parameter exists yet, and nothing is compiled.

    Attributes:
        mesh: the devices.
        layout: layout of the training state.
        step: jitted train step.
        translator: translator without parameters; `with_params` gives it some.
        validation: evaluation of parameters during the training.
        flops: costs for the throughput.
    """

    mesh: Mesh
    layout: StateLayout
    step: Any
    translator: Translator
    validation: Validation
    flops: FlopFigures

    def compile(self, text: PreparedText) -> "CompiledPrograms":
        """Compiles all programs that the run needs.

        Raises:
            ConfigError: a program needs more memory than a device has.
        """
        clock = time.monotonic()
        steps = compile_steps(self.step, self.layout.abstract, text.plan.shapes, self.mesh)
        self.validation.compile()
        self.translator.compile(text.corpus.test.source, self.validation.reserved_bytes)
        return CompiledPrograms(CompiledSteps(steps, self.mesh), time.monotonic() - clock)


@dataclass(frozen=True)
class CompiledPrograms:
    """The compiled programs of a run.

    Attributes:
        steps: compiled train step. Validation and translator keep their programs themselves.
        seconds: duration of the compilation.
    """

    steps: CompiledSteps
    seconds: float

    @property
    def text(self) -> str:
        """Line for the log, with the number of shapes, the duration, and the memory of a step."""
        largest = max(needed_bytes(program) for program in self.steps.programs.values())
        return (
            f"compiled {len(self.steps.programs)} shapes, and evaluation, in {self.seconds:.1f} s; a step needs at "
            f"most {largest / 2**20:,.0f} MiB on each device"
        )


def make_programs(config: Config, text: PreparedText, mesh: Mesh) -> RunPrograms:
    """Returns the programs of a run.

    Raises:
        ConfigError: the mesh does not divide a size, or settings contradict the parameters of the model.
    """
    vocabulary = vocabulary_info(text.tokenizers)
    parameter_info = describe_parameters(config.model, vocabulary)
    schedule = make_schedule(config.optimizer, config.model.model_dim)
    optimizer = make_optimizer(config.optimizer, schedule, parameter_info)
    layout = make_layout(config.model, vocabulary, optimizer, mesh, config.training.ema_decay)
    objective = Objective(config.training.label_smoothing, config.training.r_drop)
    step = jit_train_step(
        layout, schedule, objective, config.training.seed, mesh, config.batching.gradient_accumulation_steps
    )
    translator = Translator.from_params(
        config.model,
        text.tokenizers,
        layout.abstract.params,
        config.decoding,
        mesh,
        reserved_bytes=stored_bytes(layout.abstract),
    )
    validation = Validation(config, text, translator, layout)
    cost = ModelFlops.of(parameter_info, objective.num_passes)
    flops = FlopFigures(cost, peak_flops(mesh, config.model.compute_dtype))
    return RunPrograms(mesh, layout, step, translator, validation, flops)
