"""Hardware that is described, and what a compiled program says of itself. No compiler of such hardware is needed."""

import os

import jax
import jax.numpy as jnp
import pytest

from flax_transformer.errors import ConfigError
from flax_transformer.parallel.mesh import MeshConfig, make_mesh
from flax_transformer.parallel.topology import (
    REMATERIALIZATION,
    TPU_DEVICE_KINDS,
    TPU_MEMORY_GIB,
    TRIAL,
    Instruction,
    Program,
    called_from_loops,
    collectives,
    described_devices,
    described_memory_bytes,
    gpu_descriptions,
    hardware_name,
    largest_shape,
    num_rematerializations,
    parse_instructions,
    random_shapes,
)
from flax_transformer.training.throughput import BFLOAT16_PEAKS

# A loop of four turns as XLA for GPU writes it, one as libtpu does, and one that ends when a flag says so.
TEXT = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %reduced = f32[8]{0} all-reduce-start(%x), channel_id=3, to_apply=%add
  ROOT %next = (s32[], f32[8]) tuple(%x, %reduced)
}

%four_turns (p: (s32[], f32[8])) -> pred[] {
  %four = s32[]{:T(128)} constant(4)
  %p = (s32[], f32[8]) parameter(0)
  %turn = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%turn, %four), direction=LT
}

%until_done (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]) parameter(0)
  %turn = s32[] get-tuple-element(%p), index=0
  %limit = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%turn, %limit), direction=LT
}

%shared (q: f32[8]) -> f32[2] {
  %q = f32[8]{0} parameter(0)
  %all = f32[8]{0} all-reduce(%q), channel_id=5, to_apply=%add
  ROOT %own = f32[2]{0} dynamic-slice(%all), dynamic_slice_sizes={2}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %start = (s32[], f32[8]) tuple(%x)
  %one = (s32[], f32[8]{0}) while(%start), condition=%until_done, body=%body, config={"known_trip_count":{"n":"4"}}
  %two = (s32[], f32[8]{0}) while(%start), condition=%four_turns, body=%body
  %three = (s32[], f32[8]{0}) while(%start), condition=%until_done, body=%body
  %own = f32[2]{0} fusion(%x), kind=kLoop, calls=%shared
  %again = f32[8]{0} all-reduce-start(%x), channel_id=3, to_apply=%add
  %key = u32[2]{0} xor(%x, %x)
  %bits = u32[32,64]{1,0:T(8,128)} xor(%x, %x)
  %branch = f32[8]{0} conditional(%x, %x, %x), branch_computations={%shared, %shared}
  ROOT %drawn = (u64[2]{0}, u32[64,32]{1,0}) rng-bit-generator(%key), algorithm=rng_three_fry
}
"""


class Compiled:
    """A compiled program, as far as it is read here."""

    def as_text(self) -> str:
        return TEXT

    def cost_analysis(self) -> dict[str, float]:
        return {"flops": 12.0}


def test_a_program_says_what_it_does():
    program = Program("step", Compiled())
    instructions = program.instructions
    assert instructions[2] == Instruction("add", "f32[]", "add", "  ROOT %sum = f32[] add(%a, %b)", True)
    # Channel 3 stands in two places; an all-reduce of which only a slice is returned is a reduce-scatter.
    assert collectives(instructions) == [("all-reduce", "body"), ("reduce-scatter", "shared")]
    assert called_from_loops(instructions) == {"body", "four_turns", "until_done", "add"}
    assert random_shapes(instructions) == [(32, 64), (64, 32)]
    assert program.num_dynamic_loops == 1
    assert program.num_conditionals == 1
    assert program.flops == 12.0
    assert largest_shape("(u64[2]{0}, u32[32,64]{1,0})") == (32, 64)


def test_a_compiled_program_is_read_as_xla_writes_it():
    mesh = make_mesh(MeshConfig(data=8))
    rows = jax.NamedSharding(mesh, jax.P(None, "data"))
    columns = jax.NamedSharding(mesh, jax.P("data"))

    def step(x, y):
        return jax.lax.while_loop(lambda c: c[0] < c[1], lambda c: (c[0] + 1, c[1], c[2] @ y), (0, x[0, 0], x))[2]

    x = jax.ShapeDtypeStruct((16, 16), jnp.int32, sharding=rows)
    program = Program.of(
        "step", lambda: jax.jit(step).lower(x, jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=columns)).compile()
    )
    assert collectives(program.instructions)
    assert program.num_dynamic_loops == 1
    assert program.rematerializations == 0


def test_complaints_of_compilers_are_counted_and_passed_on(tmp_path, monkeypatch, capfd):
    log = tmp_path / "tpu_driver.WARNING.log"
    log.write_text(f"W0 {REMATERIALIZATION} of a program before\n")
    monkeypatch.setenv("TPU_LOG_DIR", str(tmp_path))

    def compile_program() -> Compiled:
        os.write(2, f"W0 {REMATERIALIZATION}: once\n".encode())
        log.write_text(log.read_text() + f"W0 {REMATERIALIZATION}: twice\n")
        return Compiled()

    assert Program.of("step", compile_program).rematerializations == 2
    assert capfd.readouterr().err == f"W0 {REMATERIALIZATION}: once\n"


def test_a_way_that_the_partitioner_only_tried_is_not_counted():
    tried = f"W0 {REMATERIALIZATION}. The compiler cannot go for HLO operation {TRIAL}.2 = f32[8,4]{{1,0}} parameter(2)"
    taken = f"W0 {REMATERIALIZATION}. The compiler cannot go for HLO operation %copy = f32[8,4]{{1,0}} copy(%x)"
    assert num_rematerializations("\n".join([tried, tried])) == 0
    assert num_rematerializations("\n".join([tried, "W0 something else", taken])) == 1


def test_the_partitioner_complains_of_a_real_copy_in_these_words():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    inside = jax.NamedSharding(mesh, jax.P(None, ("data", "fsdp"), "tensor"))
    rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp", "tensor")))
    double = jax.jit(lambda x: x * 2, in_shardings=inside, out_shardings=rows)
    x = jax.ShapeDtypeStruct((16, 16, 16), "float32")
    assert Program.of("step", lambda: double.lower(x).compile()).rematerializations == 1


def test_every_described_device_has_a_memory_and_a_peak():
    kinds = {
        name: text.split('device_description_str: "')[1].split('"')[0] for name, text in gpu_descriptions().items()
    }
    assert {"a100_sxm_80", "h100_sxm", "h200", "b200"} == kinds.keys()
    assert set(TPU_DEVICE_KINDS.values()) == TPU_MEMORY_GIB.keys()
    for kind in [*kinds.values(), *TPU_DEVICE_KINDS]:
        assert kind in BFLOAT16_PEAKS
        assert 2**33 < (described_memory_bytes(kind) or 0) < 2**38
    assert described_memory_bytes("TPU v5 lite") == 16 * 2**30
    assert described_memory_bytes(kinds["h100_sxm"]) == int(0.75 * 84942979072)
    assert described_memory_bytes("cpu") is None
    assert [hardware_name(kind) for kind in ("TPU v5", kinds["h200"], "cpu")] == ["v5p", "h200", None]


@pytest.mark.parametrize(
    "topology, message",
    [
        ("h100_sxn:8", r"unknown hardware 'h100_sxn'\. .* the names are v4, .*, h200, cpu\."),
        ("v5e", r"must be NAME:LAYOUT, such as v5e:4x4 .* got 'v5e'"),
        ("v5e:4x", "must be NAME:LAYOUT"),
        ("h100_sxm:0", "must be NAME:LAYOUT"),
    ],
)
def test_a_topology_that_is_not_one_is_explained(topology, message):
    with pytest.raises(ConfigError, match=message):
        described_devices(topology)


@pytest.mark.parametrize("topology, package", [("v5e:4x4", "libtpu"), ("h100_sxm:8", "jax_plugins.xla_cuda13")])
def test_a_compiler_that_is_not_installed_is_named(topology, package, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"{package} is not there: pip install \"flax-transformer\[plan\]\""):
        described_devices(topology)


def test_lines_that_are_no_instructions_are_left_out():
    assert [i.opcode for i in parse_instructions("HloModule a\n\n1 {file=1}\n%c (x: f32[]) -> f32[] {\n}\n")] == []
