"""The native CPU library: right on every instruction set that the machine runs, and called only where it may be."""

import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from numerics import assert_as_accurate
from peft_ops import _backend, nf4
from peft_ops.reference import down_project as reference_down
from peft_ops.reference import low_rank as reference_low_rank
from peft_ops.reference import nf4 as reference
from peft_ops.reference.dropout import dropout_keep

try:
    from peft_ops.kernels.cpu import down_project, low_rank, native, nf4_linear
    from peft_ops.kernels.cpu import nf4 as cpu_nf4
except ImportError:
    native = None

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
built = pytest.mark.skipif(native is None, reason="the native library is not built")


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


@pytest.mark.skipif(shutil.which("c++") is None, reason="no compiler")
def test_a_machine_with_a_compiler_has_the_library():
    assert native is not None


@built
@pytest.mark.parametrize("n", [1, 63, 64, 333, 3 * 4096 + 32, 40_001])
@pytest.mark.parametrize("dtype", FLOATS)
def test_bytes_are_the_references(isa, dtype, n):
    w = torch.randn(n) * torch.logspace(-44, 4, n)  # subnormal scales too
    w[n // 2] = -0.0
    for blocksize in (32, 64, 4096):
        for ours, expected in zip(
            cpu_nf4.nf4_quantize(w.to(dtype), blocksize), reference.nf4_quantize(w.to(dtype), blocksize), strict=True
        ):
            assert torch.equal(ours, expected)


@built
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_blocks_without_a_scale_are_the_references(isa, value):
    w = torch.randn(5, 32)
    w[1], w[2, 7], w[4, 30:] = value, value, value
    (packed, absmax), (expected, scales) = (
        f(w.view(-1)[:-1], 32) for f in (cpu_nf4.nf4_quantize, reference.nf4_quantize)
    )
    assert torch.equal(packed, expected)
    assert torch.equal(absmax.isfinite(), scales.isfinite())


@built
@pytest.mark.parametrize("n", [0, 1, 255, 1000])
def test_nested_scales_are_the_references(isa, n):
    absmax = torch.rand(n)
    for ours, expected in zip(cpu_nf4.absmax_quantize(absmax), reference.absmax_quantize(absmax), strict=True):
        assert torch.equal(ours, expected)


@built
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(1,), (333,), (37, 53), (6, 64), (3, 4128)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_values_are_the_references(isa, dtype, shape, double_quant):
    for scale in (1.0, 1e-37, 1e-6, 1e5):  # subnormals of bfloat16 and of float16, infinities of float16
        weight = nf4.quantize(torch.randn(shape) * scale, 32, double_quant)
        assert torch.equal(cpu_nf4.nf4_dequantize(weight, dtype), reference.nf4_dequantize(weight, dtype))


@built
@pytest.mark.parametrize("columns", [(0, 64), (1, 2), (3, 40), (63, 130)])
@pytest.mark.parametrize("K", [130, 131])
def test_any_part_of_a_weight_is_decoded(isa, K, columns):
    """Columns that start inside bytes and blocks, and nothing is written around them."""
    weight = nf4.quantize(torch.randn(7, K), 32)
    first, last = columns
    out = torch.full((7 * (last - first) + 8,), 9.0)
    arguments, _held = native.weight_arguments(weight)
    native.lib.nf4_columns(out[4:].data_ptr(), 0, *arguments, 7, K, first, last, 1)
    assert torch.equal(out[4:-4].view(7, -1), nf4.dequantize(weight)[:, first:last])
    assert out[:4].tolist() == out[-4:].tolist() == [9.0] * 4


@built
@pytest.mark.parametrize("shape", [(1, 8), (3, 37), (9, 300), (2, 1031)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_masks_are_the_references(isa, dtype, shape):
    """Into y, seen as it is; on x, through a = identity."""
    seed, p = torch.tensor(-12345678901), 0.3
    keep = dropout_keep(shape, p, seed)
    M, N = shape
    y = low_rank.low_rank_update_(torch.zeros(shape, dtype=dtype), torch.ones(M, 1), torch.ones(N, 1), 1.0, p, seed)
    assert torch.equal(y != 0, keep)
    s = down_project.down_project(torch.ones(shape, dtype=dtype), torch.eye(N), p, seed)
    assert torch.equal(s != 0, keep)
    da = down_project.down_project_da(torch.eye(M), torch.ones(shape, dtype=dtype), p, seed)
    assert torch.equal(da != 0, keep)


@built
def test_a_seed_for_each_group_of_rows_of_a(isa):
    """G seeds: each group of rows of a has the mask of its own seed, as in a call of its own."""
    x, a, y = torch.randn(19, 70), torch.randn(6, 70), torch.randn(19, 70)
    seeds = torch.tensor([3, 4, 5])
    parts = [slice(0, 2), slice(2, 4), slice(4, 6)]
    s = down_project.down_project(x, a, 0.4, seeds)
    da = down_project.down_project_da(s, x, 0.4, seeds)
    updated = y.clone()
    for part, seed in zip(parts, seeds, strict=True):
        assert torch.equal(s[:, part], down_project.down_project(x, a[part], 0.4, seed))
        assert torch.equal(da[part], down_project.down_project_da(s[:, part], x, 0.4, seed))
        reference_low_rank.low_rank_update_(updated, s[:, part], a[part].t(), 0.5, 0.4, seed)
    torch.testing.assert_close(low_rank.low_rank_update_(y, s, a.t(), 0.5, 0.4, seeds), updated)


@built
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("M", "N", "K", "R"), [(1, 37, 53, 3), (13, 64, 128, 16), (20, 300, 70, 40), (155, 270, 31, 5)]
)
def test_skinny_products_are_those_of_the_reference(isa, M, N, K, R, dtype):
    x, dy, a, b = torch.randn(M, K, dtype=dtype), torch.randn(M, N, dtype=dtype), torch.randn(R, K), torch.randn(N, R)
    s, ds, seed = torch.randn(M, R), torch.randn(M, R), torch.tensor(7)

    def results(down, low, cast):
        wide_x, wide_dy, wide_a, wide_b, wide_s, wide_ds = map(cast, (x, dy, a, b, s, ds))
        yield "s", down.down_project(wide_x, wide_a, 0.25, seed)
        yield "da", down.down_project_da(wide_ds, wide_x, 0.25, seed)
        yield from zip(("ds", "db"), low.low_rank_gradients(wide_dy, wide_s, wide_b, 0.5), strict=True)
        for p in (0.0, 0.25):
            yield f"y at p={p}", low.low_rank_update_(wide_dy.clone(), wide_s, wide_b, 0.5, p, seed)

    keep, double = lambda t: t, lambda t: t.double()
    plain = results(reference_down, reference_low_rank, keep)
    exact = results(reference_down, reference_low_rank, double)
    for (name, ours), (_, same), (_, truth) in zip(results(down_project, low_rank, keep), plain, exact, strict=True):
        assert_as_accurate(name, ours, same, truth)


@built
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("N", "K", "blocksize"), [(37, 128, 64), (8, 96, 64), (11, 53, 64), (70, 640, 64), (133, 1024, 256)]
)
def test_linear_is_that_of_the_reference(isa, N, K, blocksize, dtype, double_quant):
    """The last: more parts than one, x in more pieces than one, blocks of several groups."""
    weight = nf4.quantize(torch.randn(N, K), blocksize, double_quant)
    bias = torch.randn(N)
    for M in (1, 2, 3, 4, 7, 9, 16, 33):
        x, dy = torch.randn(M, K, dtype=dtype), torch.randn(M, N, dtype=dtype)
        w = reference.nf4_dequantize(weight, dtype).view(N, K)
        assert_as_accurate(
            f"y, M={M}", nf4_linear.nf4_linear(x, weight, bias), F.linear(x, w, bias.to(dtype)),
            F.linear(x.double(), w.double(), bias.to(dtype).double()),
        )  # fmt: skip
        assert_as_accurate(f"dx, M={M}", nf4_linear.nf4_linear_dx(dy, weight), dy @ w, dy.double() @ w.double())


@built
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("N", "R"), [(1, 1), (37, 1), (15, 2), (53, 3), (64, 16), (65, 16), (64, 17), (130, 40)])
@pytest.mark.parametrize("more", [0, 5])
def test_an_operand_is_a_copy_in_float32_with_zeros_behind(isa, N, R, more, dtype):
    b = torch.randn(N, R + more).to(dtype)[:, :R]
    for given in (b.t(), b[:1].expand(N, R).t(), b.t().contiguous()[:, ::2]):
        wide = native.operand(given)
        if wide is given:
            continue
        rows = wide.as_strided((R, wide.stride(0)), (wide.stride(0), 1))
        assert torch.equal(rows[:, : given.shape[1]], given.float())
        assert not rows[:, given.shape[1] :].any()


@built
@pytest.mark.parametrize("R", [1, 4, 16])
def test_a_row_does_not_depend_on_the_others(isa, R):
    x, a, y, b = torch.randn(11, 130), torch.randn(R, 130), torch.randn(11, 50), torch.randn(50, R)
    s = down_project.down_project(x, a, 0.0, None)
    updated = low_rank.low_rank_update_(y.clone(), s, b, 1.0, 0.0, None)
    for i in range(11):
        alone = down_project.down_project(x[i:], a, 0.0, None)
        assert torch.equal(alone, s[i:])
        assert torch.equal(low_rank.low_rank_update_(y[i:].clone(), alone, b, 1.0, 0.0, None), updated[i:])


@built
@pytest.mark.parametrize("name", ["packed", "absmax"])
def test_a_weight_with_too_few_bytes_is_refused(name):
    weight = nf4.quantize(torch.randn(640))
    with pytest.raises(ValueError, match="an NF4 weight of this shape needs"):
        nf4.dequantize(replace(weight, **{name: getattr(weight, name)[:-1]}))


@built
def test_seeds_and_scales_of_other_types(isa):
    """An int32 seed is the same seed; scales in another dtype are read as float32."""
    x, a = torch.randn(3, 64), torch.randn(2, 64)
    one, other = (down_project.down_project(x, a, 0.5, torch.tensor(7, dtype=t)) for t in (torch.int32, torch.int64))
    assert torch.equal(one, other)
    weight = nf4.quantize(torch.randn(640))
    wide = replace(weight, absmax=weight.absmax.double())
    assert torch.equal(nf4.dequantize(wide), nf4.dequantize(weight))


@built
def test_an_update_writes_its_part_alone(isa):
    whole = torch.zeros(9, 90)
    low_rank.low_rank_update_(whole[2:7, 11:61], torch.ones(5, 2), torch.ones(50, 2), 1.0, 0.0, None)
    assert torch.equal(whole[2:7, 11:61], torch.full((5, 50), 2.0))
    assert whole.sum() == 500


@built
@pytest.mark.parametrize("strides", [(50, 1), (1, 9)], ids=["rows", "columns"])
def test_an_update_in_place_is_seen_by_autograd(strides):
    y = torch.zeros(450).as_strided((9, 50), strides)
    before = y._version
    low_rank.low_rank_update_(y, torch.ones(9, 2), torch.ones(50, 2), 1.0, 0.0, None)
    assert y._version > before
    x = torch.ones(9, 50, requires_grad=True)
    squared = x.exp().square()
    low_rank.low_rank_update_(squared.grad_fn._saved_self, torch.ones(9, 2), torch.ones(50, 2), 1.0, 0.0, None)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.sum().backward()
    with torch.inference_mode():
        low_rank.low_rank_update_(torch.zeros(9, 50), torch.ones(9, 2), torch.ones(50, 2), 1.0, 0.0, None)


@built
@pytest.mark.skipif(_backend._FORCED is not None, reason="a backend is forced")
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_float64_adapter_is_summed_in_float64(dtype, p):
    """The bits of the reference, and s and the gradients within float64 of the truth."""
    x, dy = torch.randn(5, 70, dtype=dtype), torch.randn(5, 37, dtype=dtype)
    w, a, b = torch.randn(37, 70, dtype=dtype), torch.randn(3, 70).double() / 3, torch.randn(37, 3).double() / 3
    seed = torch.tensor(3) if p else None

    def results(of):
        y, s = of("linear_low_rank").lora_linear(x, w, None, a, b, 0.5, p, seed)
        ds, db = of("low_rank").low_rank_gradients(dy, s, b, 0.5)
        da = of("down_project").down_project_da(ds, x, p, seed)
        return y, s, ds, db, da, of("linear_low_rank").linear_low_rank_dx(dy, w, ds, a, p, seed)

    ours = results(lambda op: _backend.implementation(op, x))
    for mine, expected in zip(ours, results(lambda op: getattr(_backend._reference(), op)), strict=True):
        assert torch.equal(mine, expected)
    s, ds = ours[1:3]
    assert s.dtype == ds.dtype == torch.float64
    torch.testing.assert_close(s, reference_down.down_project(x.double(), a, p, seed), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(ds, 0.5 * dy.double() @ b, rtol=1e-14, atol=1e-14)


@built
@pytest.mark.usefixtures("two_threads")
def test_results_do_not_depend_on_the_number_of_threads():
    x, w = torch.randn(40, 2048, dtype=torch.bfloat16), torch.randn(300, 2048)
    weight, a, seed = nf4.quantize(w), torch.randn(16, 2048), torch.tensor(1)
    dy, dx = torch.randn(40, 300, dtype=torch.bfloat16), torch.randn(40, 2048, dtype=torch.bfloat16)

    def results():
        s = down_project.down_project(x, a, 0.1, seed)
        yield from (s, down_project.down_project_da(s, x, 0.1, seed), *low_rank.low_rank_gradients(dx, s, a.t(), 1.0))
        yield low_rank.low_rank_update_(dx.clone(), s, a.t(), 1.0, 0.1, seed)
        yield from (cpu_nf4.nf4_quantize(w, 64)[0], cpu_nf4.nf4_dequantize(weight, torch.float16))
        for M in (1, 3, 8):
            yield from (nf4_linear.nf4_linear(x[:M], weight, None), nf4_linear.nf4_linear_dx(dy[:M], weight))

    two = list(results())
    torch.set_num_threads(1)
    assert all(torch.equal(ours, other) for ours, other in zip(two, results(), strict=True))


@built
def test_threads_of_python_have_workspaces_of_their_own():
    weights = [nf4.quantize(torch.randn(256, 256)) for _ in range(2)]
    x, wrong = torch.randn(64, 256), []
    expected = [nf4_linear.nf4_linear(x, weight, None) for weight in weights]

    def call(i):
        wrong.extend(0 for _ in range(30) if not torch.equal(nf4_linear.nf4_linear(x, weights[i], None), expected[i]))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(2)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


@built
@pytest.mark.skipif(_backend._FORCED is not None, reason="a backend is forced")
def test_the_door_opens_to_plain_tensors_alone():
    """Whatever traces or watches operations sees the reference's."""
    x = torch.randn(2, 2)
    chosen = lambda t: _backend.implementation("nf4", t).__name__
    assert chosen(x) == chosen(torch.nn.Parameter(x)) == "peft_ops.kernels.cpu.nf4"
    assert chosen(x.double()) == chosen(x.to("meta")) == "peft_ops.reference.nf4"
    with FakeTensorMode() as mode:
        assert chosen(torch.empty(2)) == "peft_ops.reference.nf4"
    assert chosen(mode.from_tensor(x)) == "peft_ops.reference.nf4"
    with FlopCounterMode(display=False):
        assert chosen(x) == "peft_ops.reference.nf4"
    fake_bytes = mode.from_tensor(torch.zeros(4, dtype=torch.uint8))
    assert chosen(fake_bytes.new_empty(0, dtype=torch.float32)) == "peft_ops.reference.nf4"  # as dequantize asks
    assert torch.func.vmap(lambda t: t if chosen(t) == "peft_ops.reference.nf4" else t * 0)(x).equal(x)


def test_without_the_library_the_reference_serves():
    code = (
        "import sys; sys.modules['peft_ops.kernels.cpu.native'] = None\n"
        "import torch; from peft_ops import _backend, nf4\n"
        "assert nf4.dequantize(nf4.quantize(torch.randn(64))).norm() > 1\n"
        "print(_backend.implementation('nf4', torch.empty(1)).__name__)"
    )
    done = run(code)
    assert done.stdout.strip() == "peft_ops.reference.nf4", done.stderr


@built
@pytest.mark.parametrize(
    ("name", "message"),
    [("sse9", "PEFT_OPS_CPU_ISA must be one of avx512bf16, avx512, avx2, portable, got sse9"), ("portable", None)],
)
def test_an_instruction_set_is_forced_by_name(name, message):
    done = run("from peft_ops.kernels.cpu import native; print(native.ISA)", PEFT_OPS_CPU_ISA=name)
    assert (message in done.stderr) if message else (done.stdout.strip() == name)
