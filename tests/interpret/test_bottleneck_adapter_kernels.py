"""What only the bottleneck adapter's kernels can get wrong: far offsets, their own activations, split reductions."""

import pytest
import torch
import triton
import triton.language as tl

from far import far_rows
from peft_ops.kernels import bottleneck_adapter as kernels
from peft_ops.kernels import configs
from peft_ops.kernels.activations import activate, derivative
from peft_ops.reference import activations
from peft_ops.reference import bottleneck_adapter as reference


@triton.jit
def _activation_kernel(z_ptr, h_ptr, d_ptr, SIZE: tl.constexpr, ACTIVATION: tl.constexpr):
    i = tl.arange(0, SIZE)
    z = tl.load(z_ptr + i)
    tl.store(h_ptr + i, activate(z, ACTIVATION))
    tl.store(d_ptr + i, derivative(z, ACTIVATION))


@pytest.mark.parametrize("name", activations.ACTIVATIONS)
def test_activations_elementwise(name):
    """Relative to the value itself, from 1e-30 to where they saturate; NaN in, NaN out; zero at zero."""
    z = torch.logspace(-30, 2, 2047).repeat_interleave(2) * torch.tensor([1.0, -1.0]).repeat(2047)
    z = torch.cat((z, torch.tensor([0.0, float("nan")])))
    h, d = torch.empty_like(z), torch.empty_like(z)
    _activation_kernel[(1,)](z, h, d, len(z), name)
    exact, slope = activations.activate(z.double(), name), activations.derivative(z.double(), name)
    plain = activations.activate(z, name)
    assert h[-2] == 0
    assert h[-1].isnan()
    for ours, truth in ((h, exact), (d, slope)):
        torch.testing.assert_close(ours[:-2].double(), truth[:-2], rtol=1e-6, atol=1e-6)
    small = (z.abs() < 0.5) & (exact != 0)  # beyond, some cancel: in plain torch too
    ours, theirs = (((t.double() - exact) / exact)[small].abs().max() for t in (h, plain))
    assert ours <= 2 * theirs + 3e-7


@pytest.mark.unpoisoned
@pytest.mark.parametrize("far", [far_rows, lambda values: far_rows(values.t()).t()], ids=["rows", "columns"])
def test_offsets_beyond_2_to_the_31(far):
    """Case 8, for the operands that are as large as the activations."""
    tall, wide = torch.randn(40, 3), torch.randn(3, 40)
    large = wide if far is far_rows else tall
    (M, N), R = large.shape, 4
    s, bias, w = torch.randn(M, R), torch.randn(R), torch.randn(N, R)
    rest = (s, bias, w, "gelu", 0.5, True, True)
    ours, theirs = kernels.up_project_gradients(far(large), *rest), reference.up_project_gradients(large, *rest)
    torch.testing.assert_close(ours, theirs)
    up = lambda module, residual: module.up_project(s, bias, w, None, "gelu", 0.5, residual, torch.float32)
    torch.testing.assert_close(up(kernels, far(large)), up(reference, large))


@pytest.mark.unpoisoned
def test_a_far_weight():
    """W_up as a column slice of something very wide."""
    w, s = torch.randn(3, 4), torch.randn(5, 4)
    up = lambda module, weight: module.up_project(s, None, weight, None, "relu", 0.5, None, torch.float32)
    torch.testing.assert_close(up(kernels, far_rows(w)), up(reference, w))


@pytest.mark.parametrize(("need_weight", "need_bias"), [(True, True), (True, False), (False, True), (False, False)])
def test_split_reductions(monkeypatch, need_weight, need_bias):
    """Many parts, whose sums lie side by side."""
    monkeypatch.setattr(configs, "splits", lambda programs, steps: min(5, steps))
    dy, s, bias, w = torch.randn(200, 70), torch.randn(200, 40), torch.randn(40), torch.randn(70, 40)
    rest = (dy, s, bias, w, "silu", 0.5, need_weight, need_bias)
    ours, theirs = kernels.up_project_gradients(*rest), reference.up_project_gradients(*rest)
    assert [t is not None for t in ours] == [t is not None for t in theirs] == [True, need_weight, need_bias]
    for name, mine, other in zip(("dz", "dweight", "dup_bias"), ours, theirs, strict=True):
        if other is not None:
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4, msg=name)


def test_masked_lanes_do_not_turn_infinities_into_nan():
    """Case 11: an infinite value beside the tail of a block."""
    s, w = torch.ones(3, 5), torch.ones(70, 5)
    w[69, 4] = float("inf")
    y = kernels.up_project(s, None, w, None, "gelu", 1.0, None, torch.float32)
    assert y[:, 69].isinf().all()
    assert y[:, :69].isfinite().all()
