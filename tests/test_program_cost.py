"""What a program costs, against programs written by hand and small ones compiled for the CPU."""

import jax
import jax.numpy as jnp
import pytest

from flax_transformer.parallel.kernel_cost import library_flops, sort_passes
from flax_transformer.parallel.program_cost import Cost, Speed, largest_loop, read_kernels, seconds_by
from flax_transformer.parallel.program_text import num_bytes

SPEED = Speed(bandwidth=1e9, peak=1e12, float32_peak=1e11, latency=2e-6)

LOOP = """
HloModule m

%fused_add (p0: f32[8,4], p1: f32[8,4]) -> f32[8,4] {
  %p0 = f32[8,4]{1,0} parameter(0)
  %p1 = f32[8,4]{1,0} parameter(1)
  ROOT %add = f32[8,4]{1,0} add(%p0, %p1)
}

%fused_write (p0.1: bf16[100,16], p1.1: bf16[1,16], p2.1: s32[]) -> bf16[100,16] {
  %p0.1 = bf16[100,16]{1,0} parameter(0)
  %p1.1 = bf16[1,16]{1,0} parameter(1)
  %p2.1 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %update = bf16[100,16]{1,0} dynamic-update-slice(%p0.1, %p1.1, %p2.1, %zero)
}

%fused_row (p0.2: bf16[100,16], p1.2: s32[]) -> bf16[1,16] {
  %p0.2 = bf16[100,16]{1,0} parameter(0)
  %p1.2 = s32[] parameter(1)
  %zero.2 = s32[] constant(0)
  %cast = bf16[100,16]{1,0} bitcast(%p0.2)
  ROOT %row = bf16[1,16]{1,0} dynamic-slice(%cast, %p1.2, %zero.2), dynamic_slice_sizes={1,16}
}

%body (b: (s32[], bf16[100,16])) -> (s32[], bf16[100,16]) {
  %b = (s32[], bf16[100,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %x = bf16[100,16]{1,0} get-tuple-element(%b), index=1
  %row_fusion = bf16[1,16]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused_row
  %write = bf16[100,16]{1,0} fusion(%x, %row_fusion, %i), kind=kLoop, calls=%fused_write
  ROOT %t = (s32[], bf16[100,16]{1,0}) tuple(%i, %write)
}

%cond (c: (s32[], bf16[100,16])) -> pred[] {
  %c = (s32[], bf16[100,16]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%c), index=0
  %most = s32[] constant(7)
  ROOT %lt = pred[] compare(%j, %most), direction=LT
}

%command_buffer (q0: f32[8,4], q1: f32[8,4]) -> f32[8,4] {
  %q0 = f32[8,4]{1,0} parameter(0)
  %q1 = f32[8,4]{1,0} parameter(1)
  ROOT %sum = f32[8,4]{1,0} fusion(%q0, %q1), kind=kLoop, calls=%fused_add
}

ENTRY %main (a: f32[8,4], b.1: f32[8,4], s: (s32[], bf16[100,16])) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %b.1 = f32[8,4]{1,0} parameter(1)
  %s = (s32[], bf16[100,16]{1,0}) parameter(2)
  %loop = (s32[], bf16[100,16]{1,0}) while(%s), condition=%cond, body=%body, {"known_trip_count":{"n":"7"}}
  ROOT %called = f32[8,4]{1,0} call(%a, %b.1), to_apply=%command_buffer
}
"""


def test_a_loop_counts_by_its_turns_and_called_computations_count():
    kernels = {kernel.name: kernel for kernel in read_kernels(LOOP)}
    assert set(kernels) == {"lt", "row_fusion", "write", "sum"}
    assert [kernels[name].runs for name in ("row_fusion", "write", "sum")] == [7, 7, 1]
    assert kernels["row_fusion"].loop == kernels["write"].loop == "loop" and kernels["sum"].loop == ""
    assert kernels["sum"].bytes == 3 * 8 * 4 * 4


def test_slices_and_updates_in_place_count_by_the_slice():
    kernels = {kernel.name: kernel for kernel in read_kernels(LOOP)}
    row = 16 * 2
    assert kernels["row_fusion"].bytes == row + row + 4  # reads and writes a row, reads its number
    assert kernels["write"].bytes == row + row + 4


def test_a_loop_of_unknown_length_gets_the_turns_that_are_given():
    compared = LOOP.replace(', {"known_trip_count":{"n":"7"}}', "")  # libtpu writes the number in the condition alone
    assert {kernel.runs for kernel in read_kernels(compared) if kernel.loop} == {7}
    unknown = compared.replace("%most = s32[] constant(7)", "%most = s32[] get-tuple-element(%c), index=0")
    assert {kernel.runs for kernel in read_kernels(unknown) if kernel.loop} == {1}
    assert {kernel.runs for kernel in read_kernels(unknown, unknown_turns=5) if kernel.loop} == {5}


def test_the_step_of_a_search_is_a_loop_inside_a_loop():
    """The loop around it may have more kernels, as in the search of a recurrent model."""
    assert largest_loop(read_kernels(LOOP))[0] == "loop"
    rows = "".join(f"  %r{n} = bf16[1,16]{{1,0}} fusion(%y, %k), kind=kLoop, calls=%fused_row\n" for n in range(4))
    outer = f"""
%outer (o: (s32[], bf16[100,16])) -> (s32[], bf16[100,16]) {{
  %o = (s32[], bf16[100,16]{{1,0}}) parameter(0)
  %k = s32[] get-tuple-element(%o), index=0
  %y = bf16[100,16]{{1,0}} get-tuple-element(%o), index=1
{rows}  ROOT %step = (s32[], bf16[100,16]{{1,0}}) while(%o), condition=%cond, body=%body
}}

ENTRY"""
    place = LOOP.rindex("body=%body")
    nested = f"{LOOP[:place]}body=%outer{LOOP[place + len('body=%body') :]}".replace("\nENTRY", outer)
    name, kernels = largest_loop(read_kernels(nested))
    assert name == "step" and {kernel.name for kernel in kernels} == {"lt", "row_fusion", "write"}
    assert {kernel.loops for kernel in kernels} == {("loop", "step")}


MIXED = """
%matmul (p0: bf16[64,32], p1: bf16[32,16]) -> bf16[64,16] {
  %p0 = bf16[64,32]{1,0} parameter(0)
  %p1 = bf16[32,16]{1,0} parameter(1)
  ROOT %dot = bf16[64,16]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%small (s0: f32[4]) -> f32[4] {
  %s0 = f32[4]{0} parameter(0)
  ROOT %c0 = f32[4]{0} copy(%s0)
}

%large (l0: f32[4]) -> f32[4] {
  %l0 = f32[4]{0} parameter(0)
  %wide = f32[1000]{0} broadcast(%l0), dimensions={}
  ROOT %c1 = f32[4]{0} copy(%l0)
}

ENTRY %main (x: bf16[64,32], y: bf16[32,16], i: s32[], z: f32[4], k: s32[4096]) -> f32[4] {
  %x = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %y = bf16[32,16]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %i = s32[] parameter(2)
  %z = f32[4]{0} parameter(3)
  %k = s32[4096]{0} parameter(4)
  %gemm = bf16[64,16]{1,0} fusion(%x, %y), kind=kCustom, calls=%matmul
  %reduced = bf16[64,16]{1,0} all-reduce(%gemm), channel_id=1, to_apply=%small
  %sorted = s32[4096]{0} sort(%k), dimensions={0}, to_apply=%small
  ROOT %branch = f32[4]{0} conditional(%i, %z, %z), branch_computations={%small, %large}
}
"""


def test_products_sorts_exchanges_and_branches():
    kernels = {kernel.name: kernel for kernel in read_kernels(MIXED)}
    assert set(kernels) == {"gemm", "reduced", "sorted", "wide", "c1"}  # of two branches the dearer one
    assert kernels["gemm"].flops == 2 * 64 * 32 * 16 and kernels["gemm"].narrow
    assert kernels["gemm"].bytes == 2 * (64 * 32 + 32 * 16 + 64 * 16)
    assert kernels["reduced"].collective == "all-reduce"
    assert (kernels["sorted"].launches, kernels["sorted"].bytes) == (3, 3 * 2 * 4096 * 4)
    cost = Cost.of(list(kernels.values()), SPEED)
    assert cost.collectives == {"all-reduce": (1, 2 * 2 * 64 * 16)}
    assert cost.launches == 7
    parts = seconds_by(list(kernels.values()), SPEED, lambda kernel: "large" if kernel.bytes > 10_000 else "small")
    assert [name for name, _ in parts] == ["large", "small"]
    assert sum(seconds for _, seconds in parts) == pytest.approx(cost.seconds)


@pytest.mark.parametrize(
    "left, right, result, window, flops",
    [
        ("50,64,512", "512,1024,1", "50,64,1024", "size=1", 2 * 50 * 64 * 512 * 1024),
        (
            "50,64,512,1",
            "512,4,64,1",
            "50,64,4,64",
            "size=1x4 pad=0_0x3_3 rhs_reversal=0x1",
            2 * 50 * 64 * 512 * 4 * 64,
        ),
        ("50,64,4,64", "50,64,4,64", "50,4,64,64", "size=50x4 stride=49x3 lhs_dilate=50x4", 2 * 50 * 4 * 64 * 64 * 64),
    ],
)
def test_products_that_a_tpu_writes_as_convolutions(left, right, result, window, flops):
    (kernel,) = read_kernels(
        f"ENTRY %main (x: bf16[{left}], y: bf16[{right}]) -> bf16[{result}] {{\n  %x = bf16[{left}] parameter(0)\n"
        f"  %y = bf16[{right}] parameter(1)\n  ROOT %c = bf16[{result}] convolution(%x, %y), window={{{window}}}\n}}\n"
    )
    assert kernel.flops == pytest.approx(flops)


def test_an_array_of_fast_memory_moves_nothing():
    line = "ENTRY %main (y: f32[32]) -> f32[32] {\n  %y = f32[32]{0:T(128)S(1)} parameter(0)\n"
    (kernel,) = read_kernels(line + "  ROOT %c = f32[32]{0:T(128)} copy(%y)\n}\n")
    assert kernel.bytes == 128 * 4


@pytest.mark.parametrize(
    "array, stored",
    [
        ("bf16[50,64]{1,0}", 2 * 50 * 64),
        ("bf16[50,64]{1,0:T(8,128)(2,1)}", 2 * 56 * 128),
        ("bf16[50,64]{0,1:T(8,128)(2,1)}", 2 * 128 * 64),  # the first dimension changes fastest
        ("f32[3,4,64]{2,1,0:T(4,128)}", 4 * 3 * 4 * 128),
        ("f32[3200]{0:T(1024)}", 4 * 4096),
        ("f32[]{:T(128)}", 4),
        ("f32[50,64]{1,0:T(8,128)S(1)}", 0),
    ],
)
def test_tiles_pad_the_two_fastest_dimensions(array, stored):
    assert num_bytes(array) == stored


TPU = """
%part (q: bf16[6,512,128]) -> bf16[512,128] {
  %q = bf16[6,512,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %cut = bf16[1,512,128]{2,1,0:T(8,128)(2,1)} slice(%q), slice={[2:3], [0:512], [0:128]}
  ROOT %flat = bf16[512,128]{1,0:T(8,128)(2,1)} bitcast(%cut)
}

%product (r: bf16[256,512], k: bf16[6,512,128], g: bf16[512,64]) -> (bf16[256,128], bf16[512,64]) {
  %r = bf16[256,512]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %k = bf16[6,512,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %g = bf16[512,64]{1,0:T(8,128)(2,1)} parameter(2)
  %one = bf16[512,128]{1,0:T(8,128)(2,1)} fusion(%k), kind=kLoop, calls=%part
  %conv = bf16[256,128]{1,0:T(8,128)(2,1)} convolution(%r, %one), dim_labels=bf_io->bf
  %continued = bf16[512,128]{1,0:T(8,128)(2,1)} all-gather(%g), channel_id=7, dimensions={1}
  ROOT %both = (bf16[256,128]{1,0:T(8,128)(2,1)}, bf16[512,64]{1,0:T(8,128)(2,1)}) tuple(%conv, %g)
}

%begin (b: bf16[512,64]) -> bf16[512,128] {
  %b = bf16[512,64]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %gathered = bf16[512,128]{1,0:T(8,128)(2,1)} all-gather(%b), channel_id=7, dimensions={1}
  ROOT %mark = bf16[512,128]{1,0:T(8,128)(2,1)S(1)} custom-call(%gathered), custom_call_target="AsyncCollectiveStart"
}

%all-reduce-scatter (w: f32[512,128]) -> f32[256,128] {
  %w = f32[512,128]{1,0:T(8,128)S(1)} parameter(0)
  %zero = s32[] constant(0)
  %all = f32[512,128]{1,0:T(8,128)} all-reduce(%w), channel_id=9, to_apply=%part
  ROOT %own = f32[256,128]{1,0:T(8,128)S(1)} dynamic-slice(%all, %zero, %zero), dynamic_slice_sizes={256,128}
}

ENTRY %main (x: bf16[256,512], y: bf16[6,512,128], z: bf16[512,64], v: f32[512,128]) -> f32[256,128] {
  %x = bf16[256,512]{1,0:T(8,128)(2,1)} parameter(0)
  %y = bf16[6,512,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %z = bf16[512,64]{1,0:T(8,128)(2,1)S(1)} parameter(2)
  %v = f32[512,128]{1,0:T(8,128)S(1)} parameter(3)
  %copy = (bf16[256,512]{1,0:T(8,128)(2,1)S(1)}, bf16[256,512]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%x)
  %copied = bf16[256,512]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy)
  %cut = ((bf16[6,512,128]{2,1,0:T(8,128)(2,1)}), bf16[2,512,128]{2,1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%y)
  %half = bf16[2,512,128]{2,1,0:T(8,128)(2,1)S(1)} slice-done(%cut)
  %joined = bf16[4,512,128]{2,1,0:T(8,128)(2,1)S(1)} custom-call(%half, %half), custom_call_target="ConcatBitcast"
  %started = bf16[512,128]{1,0:T(8,128)(2,1)S(1)} fusion(%z), kind=kCustom, calls=%begin
  %made = (bf16[256,128]{1,0:T(8,128)(2,1)}, bf16[512,64]{1,0:T(8,128)(2,1)S(1)}) fusion(%copied, %y, %z), kind=kOutput, output_to_operand_aliasing={{1}: (2, {})}, calls=%product, backend_config={"estimated_cycles":"3000"}
  ROOT %scattered = f32[256,128]{1,0:T(8,128)S(1)} fusion(%v), kind=kCustom, calls=%all-reduce-scatter
}
"""  # noqa: E501


def test_copies_of_a_tpu_overlap_and_count_by_what_they_move():
    kernels = {kernel.name: kernel for kernel in read_kernels(TPU)}
    assert set(kernels) == {"copy", "cut", "started", "made", "scattered"}
    assert (kernels["copy"].launches, kernels["copy"].bytes) == (0, 2 * 256 * 512)  # written to the fast memory
    assert (kernels["cut"].launches, kernels["cut"].bytes) == (0, 2 * 2 * 512 * 128)
    cost = Cost.of(list(kernels.values()), SPEED)
    assert cost.launches == 3 and cost.cycles == 3000
    assert cost.seconds == cost.bytes / SPEED.bandwidth > sum(k.seconds(SPEED) for k in kernels.values() if k.launches)


def test_a_fusion_of_a_tpu_counts_what_its_inner_fusions_read():
    (made,) = [kernel for kernel in read_kernels(TPU) if kernel.name == "made"]
    assert made.flops == pytest.approx(2 * 256 * 512 * 128)
    gathered = 2 * 512 * 128  # 64 columns in a tile of 128
    assert made.bytes == 2 * (512 * 128 + 256 * 128) + gathered  # one of six kernels; no operand that is passed on


def test_an_exchange_in_several_fusions_counts_once():
    cost = Cost.of(read_kernels(TPU), SPEED)
    assert cost.collectives == {
        "all-gather": (1, 2 * 512 * 128 + 2 * 512 * 128),
        "reduce-scatter": (1, 2 * 4 * 512 * 128),
    }


def test_a_kernel_takes_the_longest_of_three_times():
    (gemm,) = [kernel for kernel in read_kernels(MIXED) if kernel.name == "gemm"]
    assert gemm.seconds(SPEED) == gemm.bytes / 1e9
    assert gemm.seconds(Speed(1e18, 1e6, 1e6)) == gemm.flops / 1e6
    assert gemm.seconds(Speed(1e18, 1e18, 1e18)) == 2e-6


def test_calls_of_libraries_have_a_formula():
    batched = library_flops("__cublas$lt$matmul", ["bf16[6,64,32]{2,1,0}", "bf16[6,32,16]{2,1,0}"], "bf16[6,64,16]")
    assert batched == pytest.approx(2 * 6 * 64 * 32 * 16)
    heads = ["bf16[2,64,8,32]{3,2,1,0}", "bf16[2,48,8,32]{3,2,1,0}"]
    assert library_flops("__cudnn$fmhaSoftmax", heads, "bf16[2,64,8,32]") == 2 * 2 * (2 * 8 * 64 * 48 * 32)
    assert library_flops("__cudnn$fmhaSoftmaxBackward", heads, "bf16[2,64,8,32]") == 5 * 2 * (2 * 8 * 64 * 48 * 32)
    joint, own = ["bf16[2,64,3,8,32]", "bf16[3,8,32]"], ["bf16[2,64,1,8,32]", "bf16[2,48,2,8,32]", "bf16[1,8,32]"]
    triton = "__gpu$xla.gpu.triton jit(f)/short_attention"
    assert library_flops(triton, joint, "bf16[2,64,8,32]") == 2 * 2 * (2 * 8 * 64 * 64 * 32)
    assert library_flops(f"{triton}_backward", own, "bf16[2,64,8,32]") == 5 * 2 * (2 * 8 * 64 * 48 * 32)
    blocks = ["s8[1,1,1]", "bf16[2,8,64,32]", "bf16[2,8,48,32]", "bf16[2,8,48,32]"]
    splash = [f"tpu_custom_call splash_mha_{part}_segmented.1" for part in ("fwd", "dq", "dkv")]
    assert [library_flops(target, blocks, "bf16[2]") / (2 * 2 * 8 * 64 * 48 * 32) for target in splash] == [2, 3, 4]
    assert library_flops("Sharding", heads, "bf16[2]") == 0.0


def test_a_call_that_changes_an_operand_in_place_counts_it_once():
    """Also, the workspace of cuBLAS moves nothing."""
    (kernel,) = read_kernels(
        "ENTRY %main (x: f32[64], y: f32[8]) -> f32[8] {\n"
        "  %x = f32[64]{0} parameter(0)\n"
        "  %y = f32[8]{0} parameter(1)\n"
        '  ROOT %c = (f32[8]{0}, f32[64]{0}, s8[99]{0}) custom-call(%x, %y), custom_call_target="f", '
        "output_to_operand_aliasing={{1}: (0, {})}\n}\n"
    )
    assert kernel.bytes == 4 * (64 + 8 + 8)


def test_a_sort_in_one_block_is_one_pass():
    assert [sort_passes(n) for n in (2, 2048, 4096, 25_600)] == [1, 1, 3, 15]


def test_a_compiled_loop_of_products_has_the_products_of_its_turns():
    """The kernels of a CPU program are other ones, but products and turns are written alike."""

    def many(x, kernels):
        return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]

    shapes = jax.ShapeDtypeStruct((256, 64), jnp.float32), jax.ShapeDtypeStruct((5, 64, 64), jnp.float32)
    cost = Cost.of(read_kernels(str(jax.jit(many).lower(*shapes).compile().as_text())), SPEED)
    assert cost.flops == 5 * 2 * 256 * 64 * 64
    once = 256 * 64 * 4
    assert 5 * 2 * once < cost.bytes < 5 * 12 * once
    assert cost.flops_utilization(SPEED) == cost.flops / 1e12 / cost.seconds
