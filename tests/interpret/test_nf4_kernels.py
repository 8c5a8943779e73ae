"""What only the NF4 kernels can get wrong: routes, far offsets, writes outside their output."""

import pytest
import torch

from numerics import assert_as_accurate
from peft_ops import nf4
from peft_ops.kernels import configs
from peft_ops.kernels import nf4 as kernels
from peft_ops.kernels import nf4_linear as linear
from peft_ops.reference import nf4 as reference
from peft_ops.reference import nf4_linear as reference_linear

CANARY = 7.0


def fenced(shape, dtype=torch.float32, edge=4096):
    """(store, view): a view in the middle of memory full of canaries."""
    n = torch.Size(shape).numel()
    store = torch.full((n + 2 * edge,), CANARY, dtype=dtype)
    return store, store[edge : edge + n].view(shape)


def assert_fence_stands(store, n, edge=4096):
    assert torch.equal(store[:edge], torch.full_like(store[:edge], CANARY))
    assert torch.equal(store[edge + n :], torch.full_like(store[edge + n :], CANARY))


@pytest.mark.parametrize("n", [1, 63, 64, 65, 4095, 4161])
@pytest.mark.parametrize("double_quant", [False, True])
def test_dequantize_writes_its_output_only(n, double_quant):
    weight = nf4.quantize(torch.randn(n), 64, double_quant)
    store, out = fenced((n,), torch.bfloat16)
    kernels._decode_into(out, weight, 0, None)
    assert torch.equal(out, reference.nf4_dequantize(weight, torch.bfloat16))
    assert_fence_stands(store, n)


@pytest.mark.parametrize("n", [1, 63, 65, 4161])
def test_quantize_writes_its_output_only(monkeypatch, n):
    fences = []

    def empty(*shape, dtype, device):
        store, view = fenced(shape, dtype)
        fences.append((store, view.numel()))
        return view

    monkeypatch.setattr(torch, "empty", empty)
    w = torch.randn(n)
    packed, absmax = kernels.nf4_quantize(w, 32)
    codes, _, _ = kernels.absmax_quantize(absmax)
    monkeypatch.undo()
    expected = reference.nf4_quantize(w, 32)
    assert torch.equal(packed, expected[0])
    assert torch.equal(codes, reference.absmax_quantize(expected[1])[0])
    assert len(fences) == 4
    for store, size in fences:
        assert_fence_stands(store, size)


@pytest.mark.parametrize(("M", "N", "K"), [(1, 37, 64), (17, 70, 192)])
def test_linear_writes_its_output_only(monkeypatch, M, N, K):
    weight = nf4.quantize(torch.randn(N, K), 64)
    x, dy = torch.randn(M, K), torch.randn(M, N)
    fences, real = [], torch.Tensor.new_empty

    def new_empty(tensor, *shape, dtype=torch.float32, **elsewhere):
        if elsewhere:  # the interpreter's own
            return real(tensor, *shape, dtype=tensor.dtype, **elsewhere)
        store, view = fenced(shape[0] if isinstance(shape[0], torch.Size) else shape, dtype)
        fences.append((store, view.numel()))
        return view

    monkeypatch.setattr(configs, "nf4_fused", lambda *_: True)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    y, dx = linear.nf4_linear(x, weight, None), linear.nf4_linear_dx(dy, weight)
    monkeypatch.undo()
    torch.testing.assert_close(y, reference_linear.nf4_linear(x, weight, None), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dx, reference_linear.nf4_linear_dx(dy, weight), rtol=1e-4, atol=1e-4)
    for store, size in fences:
        assert_fence_stands(store, size)


@pytest.mark.parametrize("rows", [1, 20, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("splits", [1, 2])
def test_fused_and_slab_agree(monkeypatch, rows, dtype, splits):
    """Both routes, each row count's tile, one or several parts of the reduction, one slab or many, tails everywhere."""
    N, K = 131, 192
    weight = nf4.quantize(torch.randn(N, K) / 10, 64, True)
    x, bias, dy = (torch.randn(shape).to(dtype) for shape in ((rows, K), (N,), (rows, N)))
    same = reference_linear.nf4_linear(x, weight, bias), reference_linear.nf4_linear_dx(dy, weight)
    w = reference.nf4_dequantize(weight, dtype).view(N, K).double()
    exact = torch.nn.functional.linear(x.double(), w, bias.double()), dy.double() @ w
    monkeypatch.setattr(configs, "splits", lambda programs, steps: splits)
    for fused, slab_bytes in ((True, 0), (False, 1 << 20), (False, 20000)):
        monkeypatch.setattr(configs, "nf4_fused", lambda *_, fused=fused: fused)
        monkeypatch.setattr(configs, "NF4_SLAB_BYTES", slab_bytes)
        assert_as_accurate("y", linear.nf4_linear(x, weight, bias), same[0], exact[0])
        assert_as_accurate("dx", linear.nf4_linear_dx(dy, weight), same[1], exact[1], times=3.0)
        added = linear.nf4_linear_dx_add_(x.clone(), dy, weight)
        assert_as_accurate("x + dx", added, x + same[1], x.double() + exact[1], times=3.0)


def test_columns_are_decoded_exactly():
    """A slab of columns: whole blocks of every row."""
    weight = nf4.quantize(torch.randn(37, 320), 64, True)
    whole = reference.nf4_dequantize(weight, torch.float16).view(37, 320)
    for first, last in ((0, 2), (1, 4), (4, 5)):
        out = torch.empty(37, 64 * (last - first), dtype=torch.float16)
        kernels._decode_into(out, weight, first, last - first)
        assert torch.equal(out, whole[:, 64 * first : 64 * last])


@pytest.mark.unpoisoned
def test_offsets_beyond_2_to_the_31():
    """The last blocks of a tensor of 2**32 elements and more: untouched pages cost no memory."""
    blocks = 2**26 + 5  # of 64: the last element is beyond 2**32, the last byte beyond 2**31
    packed, absmax = torch.empty(blocks * 32, dtype=torch.uint8), torch.empty(blocks)
    small = nf4.quantize(torch.randn(3 * 64))
    packed[-96:], absmax[-3:] = small.packed, small.absmax
    weight = nf4.NF4Weight(packed, absmax, 64, torch.Size((blocks * 64,)), torch.float32)
    out = torch.empty(192)
    kernels._decode_into(out, weight, blocks - 3, None)
    assert torch.equal(out, nf4.dequantize(small))


def test_nothing_is_launched_for_nothing(monkeypatch):
    class Kernel:
        def __getitem__(self, grid):
            raise AssertionError(f"launched with grid {grid}")

    for module, name in (
        (kernels, "_nf4_quantize_kernel"), (kernels, "_absmax_quantize_kernel"), (kernels, "_nf4_dequantize_kernel"),
        (linear, "_nf4_linear_kernel"), (linear, "_nf4_linear_dx_kernel"), (linear, "_sum_splits_kernel"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, Kernel())
    weight = nf4.quantize(torch.empty(0, 64), double_quant=True)
    assert nf4.dequantize(weight).shape == (0, 64)
    assert linear.nf4_linear(torch.randn(3, 64), weight, None).shape == (3, 0)
    assert torch.equal(linear.nf4_linear_dx(torch.empty(3, 0), weight), torch.zeros(3, 64))
