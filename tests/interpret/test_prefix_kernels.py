"""What only the prefix-attention kernels can get wrong: launches, far offsets, writes outside their output."""

import math

import pytest
import torch

from peft_ops.kernels import configs
from peft_ops.kernels import prefix_attention as kernels
from peft_ops.ops import prefix_attention
from peft_ops.reference import prefix_attention as reference

FAR = 2**30 + 64  # three rows of this stride end beyond 2**31


def problem(B=2, H=4, heads=2, T=3, D=10, Dv=None, n=5):
    """(out, lse, query, prefix_key, prefix_value) with a text's out and lse."""
    Dv = Dv or D
    return [torch.randn(s) for s in ((B, H, T, Dv), (B, H, T), (B, H, T, D), (heads, n, D), (heads, n, Dv))]


def far(t, dim):
    """The same values with dimension `dim` in steps of FAR: untouched pages cost no memory."""
    strides = [FAR if i == dim else s for i, s in enumerate(t.contiguous().stride())]
    store = torch.empty(1 + sum((size - 1) * s for size, s in zip(t.shape, strides, strict=True)), dtype=t.dtype)
    return store.as_strided(t.shape, strides).copy_(t)


def both(module, tensors, dout, p=0.0, prefix_p=0.0):
    out, lse, query, pk, pv = (t.clone() if i < 2 else t for i, t in enumerate(tensors))
    seeds = torch.tensor(2**40 + 7), torch.tensor(3)
    rest = None, 0.3, p, seeds[0], prefix_p, seeds[1]
    out, lse = module.prefix_merge_(out, lse, query, pk, pv, *rest)
    dq = torch.ones_like(query)
    return out, lse, *module.prefix_gradients(dout, out, lse, query, pk, pv, None, dq, True, *rest[1:])


@pytest.mark.unpoisoned
@pytest.mark.parametrize("dim", [0, 2, 3])
def test_rows_and_columns_beyond_2_to_the_31(dim):
    """Case 8: batch rows, positions and columns."""
    tensors = problem(B=3, D=3)
    dout = torch.randn(3, 4, 3, 3)
    expected = both(reference, tensors, dout, 0.2)
    out, lse, query, pk, pv = tensors
    given = [out if dim == 3 else far(out, dim), far(lse, dim) if dim != 3 else lse, far(query, dim), pk, pv]
    seed = torch.tensor(2**40 + 7)
    rest = None, 0.3, 0.2, seed, 0.0, None
    kernels.prefix_merge_(*given, *rest)
    dq = far(torch.ones_like(query), dim)
    grads = kernels.prefix_gradients(far(dout, dim), *given, None, dq, True, *rest[1:])
    for ours, theirs in zip((*given[:2], *grads), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.unpoisoned
def test_a_prefix_beyond_2_to_the_31():
    tensors, dout = problem(n=3), torch.randn(2, 4, 3, 10)
    given = [*tensors[:3], far(tensors[3], 1), far(tensors[4], 1)]
    for ours, theirs in zip(both(kernels, given, dout), both(reference, tensors, dout), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("prefix_p", [0.0, 0.3])
@pytest.mark.parametrize(("n", "D", "Dv"), [(5, 10, 10), (40, 10, 24), (40, 70, 9)])
def test_writes_inside_its_views_alone(n, D, Dv, prefix_p):
    """Case 10: out, lse and dq are windows into larger tensors whose frames must not change."""

    def framed(t):
        frame = torch.full([s + 3 for s in t.shape], 5.0)
        view = frame[tuple(slice(1, 1 + s) for s in t.shape)]
        return frame, view.copy_(t)

    out, lse, query, pk, pv = problem(D=D, Dv=Dv, n=n)
    dout = torch.randn(2, 4, 3, Dv)
    expected = both(reference, (out, lse, query, pk, pv), dout, 0.2, prefix_p)
    frames = [framed(t) for t in (out, lse, torch.ones_like(query))]
    views = [view for _, view in frames]
    rest = None, 0.3, 0.2, torch.tensor(2**40 + 7), prefix_p, torch.tensor(3)
    kernels.prefix_merge_(*views[:2], query, pk, pv, *rest)
    grads = kernels.prefix_gradients(dout, *views[:2], query, pk, pv, None, views[2], True, *rest[1:])
    for ours, theirs in zip((*views[:2], *grads), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    for frame, view in frames:
        view.fill_(5.0)
        assert (frame == 5.0).all()


def test_masked_lanes_do_not_turn_infinities_into_nan():
    """Case 11: an infinite value in the last row of the prefix, beside the tail of its block, and a weight of zero."""
    out, lse, query, pk, pv = problem(n=5)
    pv[0, 4] = float("inf")
    merged, _ = kernels.prefix_merge_(out, lse, query, pk, pv, None, 0.3, 0.0, None, 0.0, None)
    assert merged[:, :2].isinf().all()
    assert merged[:, 2:].isfinite().all()


def test_one_launch_forward_two_backward(monkeypatch):
    """A short prefix: the merge, then its gradients and dq in one pass. Nothing is launched where there are no rows."""
    launched = []

    def counted(kernel):
        class Kernel:
            def __getitem__(self, grid):
                launched.append(kernel.fn.__name__)
                return kernel[grid]

        return Kernel()

    for name in ("_prefix_merge_kernel", "_prefix_dq_kernel", "_prefix_gradients_kernel"):
        monkeypatch.setattr(kernels, name, counted(getattr(kernels, name)))
    make = lambda *shape: torch.randn(shape, requires_grad=True)
    for B, n, expected in (
        (0, 5, []), (2, 5, ["merge", "gradients"]), (2, 40, ["merge", "dq", "gradients"]),
    ):  # fmt: skip
        launched.clear()
        tensors = make(B, 4, 1, 8), make(B, 2, 9, 8), make(B, 2, 9, 8), make(2, n, 8), make(2, n, 8)
        prefix_attention(*tensors).sum().backward()
        assert launched == [f"_prefix_{name}_kernel" for name in expected]


def test_an_lse_of_minus_infinity_counts_for_nothing():
    """A text that no row sees: whatever finite number stands in out."""
    out, lse, query, pk, pv = problem()
    lse[:] = -math.inf
    expected = kernels.prefix_merge_(torch.zeros_like(out), lse.clone(), query, pk, pv, None, 0.3, 0.0, None, 0.0, None)
    ours = kernels.prefix_merge_(out, lse, query, pk, pv, None, 0.3, 0.0, None, 0.0, None)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("kernel", configs.PREFIX_ATTENTION)
@pytest.mark.parametrize(("rows", "n", "head_dim"), [(1, 1, 1), (17, 33, 65), (1 << 20, 300, 256)])
def test_blocks_are_powers_of_two_no_wider_than_needed(kernel, rows, n, head_dim):
    for dtype in (torch.float32, torch.bfloat16):
        config = configs.prefix_attention(kernel, "sm_999", dtype, rows, n, head_dim)
        for block, size in (("BLOCK_M", rows), ("BLOCK_N", n), ("BLOCK_C", head_dim)):
            assert config[block] in (16, 32, 64)
            assert config[block] < 2 * max(16, size)
