"""Exchanges between devices, read from a program's text: groups in XLA's three notations, axes, bytes and times."""

import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from flax_transformer.errors import InputError
from flax_transformer.parallel.exchanges import Exchange, axes_of_groups, bandwidth, read_exchanges, replica_groups
from flax_transformer.parallel.mesh import MeshConfig, make_mesh

MESH = MeshConfig(2, 2, 2)

TEXT = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %reduced = f32[8]{0} all-reduce(%x), channel_id=3, replica_groups=[4,2]<=[8], to_apply=%add
  ROOT %next = (s32[], f32[8]) tuple(%x, %reduced)
}

%four_turns (p: (s32[], f32[8])) -> pred[] {
  %four = s32[]{:T(128)} constant(4)
  %p = (s32[], f32[8]) parameter(0)
  %turn = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%turn, %four), direction=LT
}

%overlapped (q: bf16[100]) -> bf16[200] {
  %q = bf16[100]{0} parameter(0)
  ROOT %all = bf16[200]{0} all-gather(%q), channel_id=5, replica_groups=[4,2]<=[2,2,2]T(0,2,1), dimensions={0}
}

%overlapped_too (q: bf16[100]) -> bf16[200] {
  %q = bf16[100]{0} parameter(0)
  ROOT %all = bf16[200]{0} all-gather(%q), channel_id=5, replica_groups=[4,2]<=[2,2,2]T(0,2,1), dimensions={0}
}

ENTRY %main (x: f32[8], q: bf16[100]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %q = bf16[100]{0} parameter(1)
  %start = (s32[], f32[8]) tuple(%x)
  %loop = (s32[], f32[8]{0}) while(%start), condition=%four_turns, body=%body
  %first = bf16[200]{0} fusion(%q), kind=kCustom, calls=%overlapped
  %second = bf16[200]{0} fusion(%q), kind=kCustom, calls=%overlapped_too
  %sent = f32[8]{0} collective-permute(%x), channel_id=7, source_target_pairs={{0,4},{4,0},{1,5},{5,1}}
  ROOT %y = f32[8]{0} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}, dimensions={0}", [[0, 2], [1, 3]]),
        ("replica_groups=[4,2]<=[8], to_apply=%add", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=4] {'a'}, dimensions={0}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, to_apply=%add", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'a'}, to_apply=%add", [[3, 2], [1, 0]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b','a'}, to_apply=%add", [[0, 2, 1, 3]]),
        ("replica_groups=mesh['a'=8] {'a':(1)2}, to_apply=%add", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}, to_apply=%add", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(1)2,'a':(4)2}, to_apply=%add", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=4] {'b','c':(2)2}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("channel_id=1, source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_groups_are_read_in_all_notations(text, groups):
    assert replica_groups(text).tolist() == groups


@pytest.mark.parametrize("written", ["replica_groups={}", "replica_groups=@mesh<a=2,b=2> {b}", "source_target_pairs=x"])
def test_groups_in_another_notation_are_an_error_with_advice(written):
    message = f"{re.escape(f'of jax {jax.__version__} wrote')} .*{re.escape(written)}.* Install an older jax"
    with pytest.raises(InputError, match=message):
        replica_groups(f"channel_id=3, {written}, to_apply=%add")


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ([[0, 1], [2, 3], [4, 5], [6, 7]], ("tensor",)),
        ([[0, 2], [1, 3], [4, 6], [5, 7]], ("fsdp",)),
        ([[0, 4], [1, 5]], ("data",)),
        ([[0, 2, 4, 6], [1, 3, 5, 7]], ("data", "fsdp")),
        ([[0, 0], [1, 2], [2, 1], [3, 3]], ("fsdp", "tensor")),
    ],
)
def test_an_exchange_is_along_the_axes_in_which_its_devices_differ(groups, axes):
    assert axes_of_groups(np.array(groups), make_mesh(MESH)) == axes


def test_exchanges_count_loops_and_shared_channels():
    mesh = make_mesh(MESH)
    one = Exchange("all-reduce", ("tensor",), 4, 4 * 2 * 32 / 2, 4 * 32 / 450e9)  # four turns, 8 float32 values
    two = Exchange("all-gather", ("fsdp",), 1, 400 / 2, 200 / 450e9)  # one channel in two places
    three = Exchange("collective-permute", ("data",), 1, 32.0, 32 / 450e9)
    assert read_exchanges(TEXT, mesh, "h100_sxm:8") == [two, one, three]
    inside = read_exchanges(TEXT, mesh, "h100_sxm:8", loop="loop")
    assert inside == [Exchange("all-reduce", ("tensor",), 1, 32.0, 32 / 450e9)]
    assert [e.seconds for e in read_exchanges(TEXT, mesh, "cpu:8")] == [0.0, 0.0, 0.0]


def described(places: list[tuple[int, int, int]], hosts: int = 1) -> list[SimpleNamespace]:
    """Devices that are only described, at these places of a torus; `hosts` share them in order."""
    return [SimpleNamespace(coords=p, process_index=n * hosts // len(places)) for n, p in enumerate(places)]


def test_more_axes_of_a_torus_carry_more():
    square = described([(x, y, 0) for x in range(2) for y in range(2)])
    assert bandwidth(np.array([[0, 1]]), square, "v5e:2x2") == 100e9
    assert bandwidth(np.array([[0, 1, 2, 3]]), square, "v5e:2x2") == 200e9


def test_gpus_of_several_hosts_use_the_network():
    two_hosts = described([(0, 0, n) for n in range(4)], hosts=2)
    assert bandwidth(np.array([[0, 1], [2, 3]]), two_hosts, "h100_sxm:2x2") == 450e9
    assert bandwidth(np.array([[0, 2], [1, 3]]), two_hosts, "h100_sxm:2x2") == 50e9
    assert bandwidth(np.array([[0, 1]]), two_hosts, "cpu:4") is None


def test_the_exchanges_of_a_real_program_are_those_of_its_mesh():
    mesh = make_mesh(MESH)
    spec = jax.sharding.NamedSharding(mesh, jax.P("fsdp", "tensor"))
    whole = jax.sharding.NamedSharding(mesh, jax.P())
    gather = jax.jit(lambda x: x * 2, in_shardings=spec, out_shardings=whole)
    text = gather.lower(jax.ShapeDtypeStruct((8, 8), "float32")).compile().as_text()
    assert text is not None
    found = read_exchanges(text, mesh, "cpu:8")
    assert {e.kind for e in found} == {"all-gather"}
    assert {axis for e in found for axis in e.axes} == {"fsdp", "tensor"}
    # Along the first axis a device gets another half of a quarter, then another half of the whole.
    assert sum(e.bytes for e in found) == 8 * 8 * 4 / 4 + 8 * 8 * 4 / 2
