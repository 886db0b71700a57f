"""Compiles the real train step and the real search for hardware that is not there, and reads what came out.

    pip install -e ".[plan]"
    python benchmarks/compile_described.py [--topology v5e:4x4] [--data 4] [--fsdp 2] [--tensor 2]
    python benchmarks/compile_described.py --topology h100_sxm:8 --data 4 --fsdp 1 --tensor 2

With `--sharded` only a search is compiled, with parameters that are split over the mesh:

    python benchmarks/compile_described.py --topology h100_sxm:8 --data 1 --fsdp 1 --tensor 8 --sharded

By default the model has the paper's base size, in bfloat16. Nothing is run: there are no times here, and no numbers to
compare with any other machine.

Exit code 1 means a wrong program. The search must not communicate between devices, and the train step must. No program
copies whole arrays to every device, or has a form that only a CPU is given. A device draws only its own random bits.
Long rows without dropout are attended to by fused kernels. In a search with sharded parameters a device has only its
share of them.
Exit code 2 means wrong usage, or a program that does not fit a device.
"""

import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import AbstractMesh

from flax_transformer.config.recipe import Config, DecodingConfig
from flax_transformer.data.batching import BatchShape
from flax_transformer.data.sentencepiece_tokenizer import SPECIAL
from flax_transformer.errors import InputError
from flax_transformer.experiment.recipe_programs import RecipePrograms
from flax_transformer.models.build import VocabularyInfo
from flax_transformer.models.transformer_config import TransformerConfig
from flax_transformer.ops.attention import attention
from flax_transformer.ops.attention_mask import AttentionMask
from flax_transformer.parallel.memory import available_bytes, needed_bytes, stored_bytes
from flax_transformer.parallel.mesh import MeshConfig, make_mesh
from flax_transformer.parallel.sharding_rules import partition_spec
from flax_transformer.parallel.topology import (
    COLLECTIVES,
    Program,
    called_from_loops,
    collectives,
    described_devices,
    parse_instructions,
    random_shapes,
    set_up_compilers,
)

VOCABULARY = 32_000
LONG_ROWS = 512  # tokens of a row that every accelerator has fused attention for
FUSED_ATTENTION = {"tpu": "splash_mha_", "gpu": "__cudnn$fmha"}  # kernels by the name in a compiled program


@dataclass(frozen=True)
class Options:
    """Compiles the train step and the beam search of a base-size Transformer for hardware that is described.

    Attributes:
        topology: what to compile for; a TPU slice such as v5e:4x4 or v5p:2x2x4, or GPUs such as h100_sxm:8.
        data: size of the mesh axis over which rows are split and parameters copied.
        fsdp: size of the mesh axis over which rows and parameters are split.
        tensor: size of the mesh axis over which heads, feed-forward units and the vocabulary are split.
        rows: sentence pairs of a training batch, and sentences of a decoding batch.
        length: tokens of a source and of a target; the search may write half as many again.
        model_dim: width of the model; heads have 64 channels, and the feed-forward network is four times as wide.
        layers: number of layers of the encoder, and of the decoder.
        sharded: whether only a search is compiled, with parameters that are split over fsdp and tensor.
    """

    topology: str = "v5e:4x4"
    data: int = 4
    fsdp: int = 2
    tensor: int = 2
    rows: int = 256
    length: int = 64
    model_dim: int = 512
    layers: int = 6
    sharded: bool = False


def recipe_programs(options: Options) -> RecipePrograms:
    """Returns the programs of the model, before they are traced.

    Raises:
        InputError: sizes that do not fit the topology.
    """
    mesh = make_mesh(MeshConfig(options.data, options.fsdp, options.tensor), described_devices(options.topology))
    model = TransformerConfig(
        model_dim=options.model_dim,
        num_heads=options.model_dim // 64,
        feed_forward_dim=4 * options.model_dim,
        num_encoder_layers=options.layers,
        num_decoder_layers=options.layers,
        max_source_length=options.length,
        max_target_length=output_length(options),
        dropout=0.1,
        attention_dropout=0.1,
        activation_dropout=0.1,
        compute_dtype="bfloat16",
    )
    config = Config(model=model, decoding=DecodingConfig(beam_size=4, batch_size=options.rows))
    available = available_bytes(mesh)
    said = "nobody knows how many" if available is None else f"{available:,}"
    print(f"{options.topology}, {mesh.devices.flat[0].device_kind}, mesh {dict(mesh.shape)}; bytes of a device: {said}")
    return RecipePrograms(config, VocabularyInfo(VOCABULARY, VOCABULARY, SPECIAL.start), mesh)


def output_length(options: Options) -> int:
    """Returns the maximum length of an output."""
    return options.length * 3 // 2


def faults_of_both(options: Options, programs: RecipePrograms) -> list[str]:
    """Compiles the train step and the search, and returns what is wrong with them."""
    train = programs.train_step(BatchShape(options.rows, options.length, options.length))
    report(train)
    search = programs.search(options.length, output_length(options))
    report(search)
    return faults(options, train, search) + faults_of_long_attention(programs, options)


def faults_of_long_attention(programs: RecipePrograms, options: Options) -> list[str]:
    """Compiles attention over long rows with its gradient, and returns what is wrong with it, in sentences."""
    mesh = programs.mesh
    head = jax.NamedSharding(mesh, partition_spec(("batch", None, "heads", None)))
    segment = jax.NamedSharding(mesh, partition_spec(("batch", None)))
    rows = options.data * options.fsdp
    shape = rows, LONG_ROWS, options.model_dim // 64, 64
    query = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=head)
    segments = jax.ShapeDtypeStruct(shape[:2], jnp.int32, sharding=segment)

    def loss(query, key, value, segments):
        mask = AttentionMask(segments, segments, causal=True)
        return jnp.sum(attention(query, key, value, mask).astype(jnp.float32))

    with jax.sharding.use_abstract_mesh(mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh):
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(query, query, query, segments).compile()
    kernel = FUSED_ATTENTION["tpu" if mesh.devices.flat[0].platform == "tpu" else "gpu"]
    called = {
        i.text for i in parse_instructions(compiled.as_text() or "") if i.opcode == "custom-call" and kernel in i.text
    }
    print(f"attention over {LONG_ROWS} tokens with its gradient: {len(called)} kernels {kernel}*")
    return [] if called else [f"attention over {LONG_ROWS} tokens has no kernel {kernel}*."]


def faults_of_sharded_search(options: Options, programs: RecipePrograms) -> list[str]:
    """Compiles the search with sharded parameters, and returns what is wrong with it, in sentences."""
    params = jax.tree.leaves(programs.prepared(sharded=True).params)
    num_bytes, share = sum(leaf.size * leaf.dtype.itemsize for leaf in params), stored_bytes(params)
    print(f"parameters: {sum(leaf.size for leaf in params):,}, in {num_bytes:,} bytes; a device has {share:,}")
    search = programs.search(options.length, output_length(options), sharded=True)
    report(search)
    wrong = faults_of_form(search)
    shards = options.fsdp * options.tensor
    if share > 1.05 * num_bytes / shards:  # biases and norms are whole on every device
        wrong.append(f"a device has {share:,} bytes of parameters, not 1 / {shards} of {num_bytes:,}.")
    if shards > 1 and not collectives(search.instructions):
        wrong.append("the search has no collective: the shardings were lost.")
    return wrong


def faults_of_form(program: Program) -> list[str]:
    """Returns the faults that no program may have, in sentences."""
    wrong = []
    if program.rematerializations:
        wrong.append(f"the {program.name} copies {program.rematerializations} arrays whole to every device.")
    if program.num_conditionals:  # only a CPU reads a cache in blocks, each behind a branch
        wrong.append(f"the {program.name} has {program.num_conditionals} branches, as for a CPU.")
    return wrong


def report(program: Program) -> None:
    """Prints what a program costs and says."""
    instructions, memory = program.instructions, program.compiled.memory_analysis()
    sizes = {
        "argument": memory.argument_size_in_bytes,
        "output": memory.output_size_in_bytes,
        "temp": memory.temp_size_in_bytes,
        "alias": memory.alias_size_in_bytes,
    }
    print(f"{program.name}: needs {needed_bytes(program.compiled):,} bytes of a device")
    print("  " + ", ".join(f"{name} {size:,}" for name, size in sizes.items()))
    if program.flops is not None:
        print(f"  FLOPs of a device: {program.flops:.3g} (the body of a loop is counted once)")
    exchanges, loops = collectives(instructions), called_from_loops(instructions)
    kinds = Counter(kind for kind, _ in exchanges)
    counts = {kind: kinds[kind] for kind in COLLECTIVES if kinds[kind] or kind in COLLECTIVES[:5]}
    print("  collectives: " + ", ".join(f"{kind} {number}" for kind, number in counts.items()))
    in_loops = Counter(kind for kind, computation in exchanges if computation in loops)
    if in_loops:
        print("    of these once in each turn of a loop: " + ", ".join(f"{k} {n}" for k, n in in_loops.items()))
    print(f"  arrays copied whole to every device because the partitioner knew no better: {program.rematerializations}")
    print(f"  loops of unknown length {program.num_dynamic_loops}, branches {program.num_conditionals}")
    if drawn := random_shapes(instructions):
        print("  shapes in which a device draws random words: " + ", ".join(map(str, drawn)))


def faults(options: Options, train: Program, search: Program) -> list[str]:
    """Returns what is wrong with the programs, in sentences; nothing when all is well."""
    wrong = []
    num_devices = options.data * options.fsdp * options.tensor
    if talk := Counter(kind for kind, _ in collectives(search.instructions)):
        wrong.append(f"the search has collectives, {dict(talk)}: devices wait for one another.")
    if num_devices > 1 and not collectives(train.instructions):
        wrong.append("the train step has no collective: the shardings were lost.")
    wrong += faults_of_form(train) + faults_of_form(search)
    # Only a CPU leaves out the blocks of the loss that hold padding alone.
    if train.num_dynamic_loops:
        wrong.append(f"the train step has {train.num_dynamic_loops} loops of unknown length, as for a CPU.")

    # Rows are split over data and fsdp, so a device that draws for its own rows alone draws arrays of that many rows.
    own_rows = options.rows // (options.data * options.fsdp)
    drawn = random_shapes(train.instructions)
    foreign = [shape for shape in drawn if shape[0] != own_rows]
    if not drawn:
        wrong.append("the train step draws no random words that can be recognised: dropout is off, or drawn otherwise.")
    if foreign:
        wrong.append(f"a device has {own_rows} rows, but draws random words in the shapes {foreign}.")
    return wrong


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    options, started = tyro.cli(Options, args=arguments, prog="compile_described.py"), time.monotonic()
    with tempfile.TemporaryDirectory() as log_folder:
        set_up_compilers(Path(log_folder))
        try:
            programs = recipe_programs(options)
            check = faults_of_sharded_search if options.sharded else faults_of_both
            wrong = check(options, programs)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    for sentence in wrong:
        print(f"WRONG: {sentence}")
    print(f"{time.monotonic() - started:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
