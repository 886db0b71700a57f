"""Compiles the real train step and the real beam search for a TPU slice that is not there, and reads what came out.

    pip install -e ".[tpu-compile]"
    python benchmarks/compile_tpu.py [--topology v5e:4x4] [--data 4] [--fsdp 2] [--tensor 2]

The libtpu wheel holds the whole TPU compiler; it needs a description of the chips, not the chips. So a laptop can tell
what each chip of a slice would hold and say to the others. The model is the paper's base size in bfloat16. Nothing is
run: there are no times here, and no numbers to compare with any other machine.

Exit codes: 0 as it should be; 1 when the search talks between chips, the train step does not, a program does not fit a
chip or copies arrays whole to every chip, or a chip draws random bits that are not its own; 2 usage.
"""

import functools
import importlib.util
import math
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

# jax reads the environment when it is imported, so everything that imports it is imported inside functions.

BEAM_SIZE = 4
VOCABULARY = 32_000

MOST_KEY_WORDS = 256  # random words drawn at once to derive keys; dropout draws thousands

COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast",
    "ragged-all-to-all",
)  # fmt: skip

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # shapes and keys live on the host
    "TPU_SKIP_MDS_QUERY": "1",  # ask no cloud what machine this is
    "TPU_WORKER_HOSTNAMES": "localhost",  # these two only keep libtpu from complaining that nobody told it
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
}


@dataclass(frozen=True)
class CompileOptions:
    """Compiles the train step and the beam search of a base-size Transformer for a TPU slice; no TPU is needed.

    Attributes:
        topology: generation and shape of the slice, as libtpu names it; such as v5e:4x4 or v5p:2x2x4.
        data: size of the mesh axis over which rows are split and parameters copied.
        fsdp: size of the mesh axis over which rows and parameters are split.
        tensor: size of the mesh axis over which heads, feed-forward units and the vocabulary are split.
        rows: sentence pairs of a training batch, and sentences of a decoding batch.
        length: tokens of a source and of a target; the search may write half as many again.
        memory_gib: memory of one chip; 16 for v5e.
    """

    topology: str = "v5e:4x4"
    data: int = 4
    fsdp: int = 2
    tensor: int = 2
    rows: int = 256
    length: int = 64
    memory_gib: float = 16.0


@dataclass(frozen=True)
class Instruction:
    """One line of an optimised program.

    Attributes:
        computation: name of the computation that holds it.
        result: its type, such as "bf16[32,64,512]{2,1,0}", or a tuple of types.
        opcode: such as "all-gather" or "xor"; of an operation in two halves, "all-gather-start" and "all-gather-done".
        text: the whole line.
        root: whether it is what its computation returns.
    """

    computation: str
    result: str
    opcode: str
    text: str
    root: bool


@dataclass(frozen=True)
class Program:
    """A compiled program and what was said while it was made.

    Attributes:
        name: for the report.
        seconds: to lower and compile.
        compiled: what JAX returns.
        rematerializations: how often the partitioner found no way from one sharding to another and copied a whole array
            to every chip.
    """

    name: str
    seconds: float
    compiled: Any
    rematerializations: int

    @functools.cached_property
    def instructions(self) -> list[Instruction]:
        """All instructions of the program of one chip, of all its computations."""
        return list(parse_instructions(self.compiled.as_text()))


def parse_instructions(text: str) -> Iterator[Instruction]:
    """Yields the instructions of a program in XLA's text form; a computation starts in the first column."""
    computation = ""
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            computation = header[1]
        elif found := re.match(r"\s+(ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(", line):
            yield Instruction(computation, found[2], found[3], line, found[1] is not None)


def largest_shape(result: str) -> tuple[int, ...]:
    """Returns the dimensions of the largest array of a type: "(u64[2]{0}, u32[32,64]{1,0})" gives (32, 64)."""
    shapes = [tuple(int(n) for n in sizes.split(",") if n) for sizes in re.findall(r"\w\[([\d,]*)\]", result)]
    return max(shapes, key=math.prod, default=())


def called_from_loops(instructions: list[Instruction]) -> set[str]:
    """Returns the computations that a loop runs once for each of its iterations."""
    calls: dict[str, set[str]] = {}
    reached: set[str] = set()
    names = {i.computation for i in instructions}
    for instruction in instructions:
        named = names & set(re.findall(r"%([\w.\-]+)", instruction.text))
        calls.setdefault(instruction.computation, set()).update(named)
        if instruction.opcode == "while":
            reached |= named
    frontier = set(reached)
    while frontier:
        frontier = set().union(*(calls.get(name, set()) for name in frontier)) - reached
        reached |= frontier
    return reached


def collectives(instructions: list[Instruction]) -> list[tuple[str, str]]:
    """Returns (kind, computation) of each exchange between chips, each counted once.

    libtpu overlaps an exchange with arithmetic by writing it into several fused computations, where it begins, goes on
    and ends; what these have in common is the channel. An all-reduce of which its computation returns only a slice is a
    reduce-scatter, and libtpu carries it out as one.
    """
    sliced = {i.computation for i in instructions if i.root and i.opcode == "dynamic-slice"}
    found: dict[str, tuple[str, str]] = {}
    for number, instruction in enumerate(instructions):
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            if kind == "all-reduce" and instruction.computation in sliced:
                kind = "reduce-scatter"
            channel = re.search(r"channel_id=(\d+)", instruction.text)
            found.setdefault(f"channel {channel[1]}" if channel else f"line {number}", (kind, instruction.computation))
    return list(found.values())


def random_shapes(instructions: list[Instruction]) -> list[tuple[int, ...]]:
    """Returns the shapes in which one chip draws random bits for dropout.

    Threefry is twenty rounds of add, rotate and exclusive-or, and nothing else in a step takes the exclusive-or of
    words: each large `xor` is a round of it, in the shape in which this chip draws. The small ones derive keys, the
    same on every chip. A generator that is a single instruction is seen as well.
    """
    drawn = set()
    for instruction in instructions:
        is_round = instruction.opcode == "xor" and instruction.result.startswith("u32[")
        if is_round or instruction.opcode in ("rng", "rng-bit-generator"):
            drawn.add(largest_shape(instruction.result))
    return sorted(shape for shape in drawn if math.prod(shape) > MOST_KEY_WORDS)


def compile_logged(name: str, log_folder: Path, compile_program: Callable[[], Any]) -> Program:
    """Returns the program that `compile_program` compiles, with what libtpu wrote to its log meanwhile."""

    def complaints() -> int:
        logs = log_folder.glob("*.WARNING.*")  # other names in the folder are links, and a log of warnings and more
        return sum(log.read_text(errors="replace").count("Involuntary full rematerialization") for log in logs)

    before, start = complaints(), time.monotonic()
    compiled = compile_program()
    return Program(name, time.monotonic() - start, compiled, complaints() - before)


def compile_programs(options: CompileOptions, log_folder: Path) -> tuple[Program, Program]:
    """Returns the train step and the search, compiled for the slice.

    Raises:
        InputError: sizes that do not fit the slice or one another.
    """
    import jax
    from flax import nnx
    from jax.experimental import topologies

    from flax_transformer.data.batching import BatchShape
    from flax_transformer.data.sentencepiece_tokenizer import SPECIAL
    from flax_transformer.decoding.beam_search import BeamSearchConfig
    from flax_transformer.decoding.length_penalty import LengthPenalty
    from flax_transformer.inference.programs import ProgramOptions
    from flax_transformer.inference.search_program import SearchInputs, SearchSpec, for_search, jit_search
    from flax_transformer.models.build import VocabularyInfo
    from flax_transformer.models.transformer import TransformerConfig
    from flax_transformer.parallel import layout as parallel_layout
    from flax_transformer.parallel.mesh import (
        MeshConfig,
        all_devices_sharding,
        check_rows,
        make_mesh,
        replicated_sharding,
    )
    from flax_transformer.training.loop import compile_steps
    from flax_transformer.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
    from flax_transformer.training.state import abstract_model, make_layout
    from flax_transformer.training.step import Objective, jit_train_step

    topology = topologies.get_topology_desc(platform="tpu", topology_name=options.topology)
    mesh = make_mesh(MeshConfig(options.data, options.fsdp, options.tensor), devices=list(topology.devices))
    check_rows(options.rows, mesh, tuple(mesh.axis_names), "a batch")
    output_length = options.length * 3 // 2
    model = TransformerConfig(
        model_dim=512,
        num_heads=8,
        feed_forward_dim=2048,
        num_encoder_layers=6,
        num_decoder_layers=6,
        max_source_length=options.length,
        max_target_length=output_length,
        dropout=0.1,
        attention_dropout=0.1,
        activation_dropout=0.1,
        compute_dtype="bfloat16",
    )
    vocabulary = VocabularyInfo(VOCABULARY, VOCABULARY, SPECIAL.start)

    parallel_layout.backend = lambda: "tpu"  # jax itself runs on a CPU here

    # --- the train step, by the function that the training itself calls
    schedule = make_schedule(OptimizerConfig(), model.model_dim)
    layout = make_layout(model, vocabulary, make_optimizer(OptimizerConfig(), schedule), mesh)
    step = jit_train_step(layout, schedule, Objective(0.1), 0, mesh)
    shape = BatchShape(options.rows, options.length, options.length)
    train = compile_logged(
        "train step", log_folder, lambda: compile_steps(step, layout.abstract, [shape], mesh)[tuple(shape)]
    )

    # --- the search
    slots = options.rows // mesh.size
    penalty = LengthPenalty.parse("gnmt:0.6")
    beam = BeamSearchConfig(BEAM_SIZE, slots, output_length, SPECIAL.start, SPECIAL.end, penalty)
    graphdef, abstract_params = abstract_model(model, vocabulary)
    graphdef, abstract_params = jax.eval_shape(
        functools.partial(for_search, graphdef, 1), nnx.to_pure_dict(abstract_params)
    )
    params = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated_sharding(mesh)),
        abstract_params,
    )

    def per_row(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((sentences, *shape), "int32", sharding=all_devices_sharding(mesh))

    sentences = ProgramOptions().sentences_per_row * options.rows
    nothing = jax.ShapeDtypeStruct((0,), "int32", sharding=all_devices_sharding(mesh))
    banned = jax.ShapeDtypeStruct((0,), "bool", sharding=replicated_sharding(mesh))
    inputs = SearchInputs(
        per_row(options.length),
        per_row(options.length),
        per_row(),
        nothing,
        per_row(0),
        per_row(0, 0),
        per_row(),
        banned,
    )
    search = jit_search(graphdef, SearchSpec(beam), mesh)
    found = compile_logged("beam search", log_folder, lambda: search.lower(params, inputs).compile())
    return train, found


def report(program: Program) -> None:
    """Prints what a program costs and says."""
    instructions = program.instructions
    memory, cost = program.compiled.memory_analysis(), program.compiled.cost_analysis()
    sizes = {
        "argument": memory.argument_size_in_bytes,
        "output": memory.output_size_in_bytes,
        "temp": memory.temp_size_in_bytes,
        "alias": memory.alias_size_in_bytes,
    }
    print(f"{program.name}: compiled in {program.seconds:.0f} s")
    print("  bytes per chip: " + ", ".join(f"{name} {size:,}" for name, size in sizes.items()))
    print(f"  FLOPs per chip: {cost['flops']:.3g} (the body of a loop is counted once)")
    exchanges, loops = collectives(instructions), called_from_loops(instructions)
    kinds = Counter(kind for kind, _ in exchanges)
    counts = {kind: kinds[kind] for kind in COLLECTIVES if kinds[kind] or kind in COLLECTIVES[:5]}
    print("  collectives: " + ", ".join(f"{kind} {number}" for kind, number in counts.items()))
    in_loops = Counter(kind for kind, computation in exchanges if computation in loops)
    if in_loops:
        print("    of these once in each iteration of a loop: " + ", ".join(f"{k} {n}" for k, n in in_loops.items()))
    print(f"  arrays copied whole to every chip because the partitioner knew no better: {program.rematerializations}")
    if drawn := random_shapes(instructions):
        print("  shapes in which a chip draws random words: " + ", ".join(map(str, drawn)))


def faults(options: CompileOptions, train: Program, search: Program) -> list[str]:
    """Returns what is wrong with the programs, in sentences; nothing when all is well."""
    wrong = []
    num_chips = options.data * options.fsdp * options.tensor
    if talk := Counter(kind for kind, _ in collectives(search.instructions)):
        wrong.append(f"the search has collectives, {dict(talk)}: chips wait for one another.")
    if num_chips > 1 and not collectives(train.instructions):
        wrong.append("the train step has no collective: the shardings were lost.")
    for program in (train, search):
        memory = program.compiled.memory_analysis()
        needed = memory.temp_size_in_bytes + memory.argument_size_in_bytes
        if needed > options.memory_gib * 2**30:
            wrong.append(f"the {program.name} needs {needed / 2**30:.1f} GiB, a chip has {options.memory_gib:g}.")
        if program.rematerializations:
            wrong.append(f"the {program.name} copies {program.rematerializations} arrays whole to every chip.")

    # Rows are split over data and fsdp, so a chip that draws for its own rows alone draws arrays of that many rows.
    own_rows = options.rows // (options.data * options.fsdp)
    drawn = random_shapes(train.instructions)
    foreign = [shape for shape in drawn if shape[0] != own_rows]
    if not drawn:
        wrong.append("the train step draws no random words that can be recognised: dropout is off, or drawn otherwise.")
    if foreign:
        wrong.append(f"a chip has {own_rows} rows, but draws random words in the shapes {foreign}.")
    return wrong


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    options = tyro.cli(CompileOptions, args=arguments, prog="compile_tpu.py")
    if importlib.util.find_spec("libtpu") is None:
        print('error: this needs the TPU compiler: pip install -e ".[tpu-compile]"', file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as log_folder:
        os.environ["TPU_LOG_DIR"] = log_folder
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from flax_transformer.errors import InputError

        try:
            train, search = compile_programs(options, Path(log_folder))
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    for program in (train, search):
        report(program)
    wrong = faults(options, train, search)
    for sentence in wrong:
        print(f"WRONG: {sentence}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
