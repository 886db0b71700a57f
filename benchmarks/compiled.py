"""What the train step and the search cost on hardware that is not there, as far as the compiled programs show it.

    pip install -e ".[plan]"
    python benchmarks/compiled.py [--topology h100_sxm:1] [--keep FOLDER]
    python benchmarks/compiled.py --topology v5e:4x4 --data 4 --fsdp 2 --tensor 2

The sizes are fixed, so that figures of different days can be compared: the paper's base model in bfloat16 with dropout
everywhere. Nothing is run. The least time is a bound for these kernels, not a measurement. It is the sum of
max(bytes / bandwidth, FLOPs / peak, latency) over all kernels; see `program_cost.py`.

Exit code 1 means that a program costs more than its ceiling; see `CEILINGS`. Exit code 2 means wrong usage.
"""

import dataclasses
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import tyro

from flax_transformer.config.recipe import Config, DecodingConfig
from flax_transformer.data.batching import BatchShape
from flax_transformer.data.sentencepiece_tokenizer import SPECIAL
from flax_transformer.errors import InputError
from flax_transformer.experiment.recipe_programs import RecipePrograms
from flax_transformer.models.build import VocabularyInfo
from flax_transformer.models.transformer_config import TransformerConfig
from flax_transformer.parallel.mesh import MeshConfig, make_mesh
from flax_transformer.parallel.program_cost import SPEEDS, Cost, Kernel, Speed, largest_loop, read_kernels, seconds_by
from flax_transformer.parallel.topology import Program, described_devices, set_up_compilers

ROWS, LENGTH, VOCABULARY = 400, 64, 32_000
SENTENCES, BEAMS, OUTPUT_LENGTH = 128, 4, 96
PARTS = 10  # operations in a report
LEAST_PRODUCTS = 9.3e12  # FLOPs of a train step on all devices; a program with fewer does not do the work


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """The most that a program may cost.

    Attributes:
        milliseconds: least time of a train step, or of one step of the search.
        launches: kernels in the same.
    """

    milliseconds: float
    launches: int


CEILINGS = {  # by topology, mesh and program
    ("h100_sxm:1, 1 x 1 x 1", "train step"): Ceiling(20.9, 1000),
    ("h100_sxm:1, 1 x 1 x 1", "search"): Ceiling(0.56, 146),
    ("v5e:4x4, 4 x 2 x 2", "train step"): Ceiling(7.1, 2750),
    ("v5e:4x4, 4 x 2 x 2", "search"): Ceiling(0.46, 380),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Compiles the yardstick for described hardware and prints what its programs cost.

    Attributes:
        topology: what to compile for, such as h100_sxm:1 or v5e:4x4.
        data: size of the mesh axis over which rows are split and parameters copied.
        fsdp: size of the mesh axis over which rows and parameters are split.
        tensor: size of the mesh axis over which heads, feed-forward units and the vocabulary are split.
        keep: folder for the programs' texts; none is kept if it is empty.
    """

    topology: str = "h100_sxm:1"
    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    keep: str = ""


def yardstick(options: Options) -> RecipePrograms:
    """Returns the programs whose cost is compared from day to day.

    Raises:
        InputError: a topology that is unknown, or that does not fit the mesh.
    """
    mesh = make_mesh(MeshConfig(options.data, options.fsdp, options.tensor), described_devices(options.topology))
    model = TransformerConfig(
        model_dim=512,
        num_heads=8,
        feed_forward_dim=2048,
        num_encoder_layers=6,
        num_decoder_layers=6,
        max_source_length=LENGTH,
        max_target_length=OUTPUT_LENGTH,
        dropout=0.1,
        attention_dropout=0.1,
        activation_dropout=0.1,
        compute_dtype="bfloat16",
    )
    config = Config(model=model, decoding=DecodingConfig(beam_size=BEAMS, batch_size=SENTENCES))
    return RecipePrograms(config, VocabularyInfo(VOCABULARY, VOCABULARY, SPECIAL.start), mesh)


def report(what: str, kernels: Sequence[Kernel], speed: Speed, tokens: int) -> Cost:
    """Prints what kernels cost, whole and for each of `tokens`. Returns the sums."""
    cost = Cost.of(list(kernels), speed)
    print(f"{what}: {cost.seconds * 1e3:.3f} ms at least, {cost.flops_utilization(speed):.3f} of the peak")
    print(f"  launches {cost.launches:,}, {cost.launches / tokens:.3g} a token")
    print(f"  bytes moved {cost.bytes / 1e9:.2f} GB, {cost.bytes / tokens / 1e3:.1f} kB a token")
    print(f"  products {cost.flops / 1e12:.3f} TFLOP, {cost.flops / tokens / 1e6:.1f} MFLOP a token")
    print(f"  other operations {cost.vector_ops / 1e9:.1f} G, {cost.vector_ops / tokens / 1e6:.2f} M a token")
    if cost.cycles:
        print(f"  cycles by the compiler's own estimate {cost.cycles / 1e6:.3f} million")
    parts = seconds_by(list(kernels), speed, lambda kernel: re.sub(r"\d+", "", kernel.label.split("/")[-1]))
    print("  ms by operation: " + ", ".join(f"{name} {seconds * 1e3:.3f}" for name, seconds in parts[:PARTS]))
    for kind, (number, size) in cost.collectives.items():
        print(f"  {kind}: {number}, {size / 1e6:.1f} MB, {size / tokens:.0f} bytes a token")
    return cost


def memory(program: Program, keep: str) -> str:
    """Prints a program's temporary memory; keeps its text if a folder is given. Returns its text."""
    analysis, text = program.compiled.memory_analysis(), program.compiled.as_text()
    print(f"{program.name}: temporary memory {analysis.temp_size_in_bytes / 1e9:.3f} GB")
    if keep:
        Path(keep).mkdir(parents=True, exist_ok=True)
        (Path(keep) / f"{program.name.replace(' ', '_')}.hlo").write_text(text, encoding="utf-8")
    return text


def faults(hardware: str, costs: dict[str, Cost], num_devices: int) -> list[str]:
    """Returns which programs cost more than their ceiling, in sentences."""
    wrong = []
    if costs["train step"].flops * num_devices < LEAST_PRODUCTS:
        wrong.append(f"the train step has fewer products than its work needs, {LEAST_PRODUCTS:.3g} FLOPs.")
    for (place, name), ceiling in CEILINGS.items():
        if place != hardware:
            continue
        found = costs[name].seconds * 1e3, costs[name].launches
        for value, most, unit in zip(found, dataclasses.astuple(ceiling), ("ms", "launches"), strict=True):
            if value > most:
                wrong.append(f"the {name} costs {value:.6g} {unit}, above its ceiling of {most}.")
    return wrong


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    options = tyro.cli(Options, args=arguments, prog="compiled.py")
    with tempfile.TemporaryDirectory() as log_folder:
        set_up_compilers(Path(log_folder))
        try:
            programs, speed = yardstick(options), SPEEDS[options.topology.partition(":")[0]]
            num_devices = programs.mesh.size
            train = memory(programs.train_step(BatchShape(ROWS, LENGTH, LENGTH)), options.keep)
            search = memory(programs.search(LENGTH, OUTPUT_LENGTH), options.keep)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    costs = {
        "train step": report("train step", read_kernels(train), speed, ROWS * LENGTH // num_devices),
        "search": report("step of the search", largest_loop(read_kernels(search))[1], speed, SENTENCES // num_devices),
    }
    hardware = f"{options.topology}, {options.data} x {options.fsdp} x {options.tensor}"
    wrong = faults(hardware, costs, num_devices)
    for sentence in wrong:
        print(f"WRONG: {sentence}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
