"""What only the DoRA kernels can get wrong: far offsets, writes outside their output, slabs of an NF4 weight."""

import pytest
import torch

from far import far_rows
from numerics import assert_as_accurate
from peft_ops import nf4
from peft_ops.kernels import configs, dora
from peft_ops.reference import dora as reference


@pytest.mark.unpoisoned
@pytest.mark.parametrize("transposed", [False, True])
def test_offsets_beyond_2_to_the_31(transposed):
    """Case 8, for every operand that is as large as the activations or the weight."""
    dy, u, g = torch.randn(3, 40), torch.randn(3, 40), torch.rand(40)
    if transposed:
        dy, u, g = dy.t().contiguous(), u.t().contiguous(), torch.rand(3)
    far = far_rows(dy if not transposed else dy.t().contiguous())
    far = far.t() if transposed else far
    torch.testing.assert_close(dora.dora_gradients(far, u, g, True), reference.dora_gradients(dy, u, g, True))
    torch.testing.assert_close(dora.dora_gradients(u, far, g, True), reference.dora_gradients(u, dy, g, True))
    a, b = torch.randn(2, dy.shape[1]), torch.randn(dy.shape[0], 2)
    torch.testing.assert_close(dora.dora_norm(far, a, b, 0.5), reference.dora_norm(dy, a, b, 0.5))


@pytest.mark.parametrize(("M", "N"), [(1, 1), (17, 37), (70, 300)])
@pytest.mark.parametrize("keep_u", [False, True])
def test_update_writes_its_output_alone(monkeypatch, M, N, keep_u):
    """Case 10: canaries around y; u stays as it is where it is kept."""
    frame = torch.full((M + 8, N), 5.0)
    x, w, bias, s, b, g = (torch.randn(*size) for size in ((M, 8), (N, 8), (N,), (M, 3), (N, 3), (N,)))
    plain = torch.nn.functional.linear(x, w)

    def inside(*args, **kwargs):
        return frame[4:-4]

    monkeypatch.setattr(torch.nn.functional, "linear", lambda *_: inside().copy_(plain))
    monkeypatch.setattr(torch, "empty_like", inside)
    if keep_u:
        monkeypatch.setattr(torch.nn.functional, "linear", lambda *_: plain)
    y, u = dora.dora_linear(x, w, bias, s, b, 0.5, g, keep_u)
    monkeypatch.undo()
    assert y.data_ptr() == frame[4].data_ptr()
    expected, expected_u = reference.dora_linear(x, w, bias, s, b, 0.5, g, keep_u)
    torch.testing.assert_close(y, expected)
    assert (frame[:4] == 5.0).all()
    assert (frame[-4:] == 5.0).all()
    assert torch.equal(u, expected_u) if keep_u else u is None


def test_gradients_are_written_where_asked_alone():
    dy, u, g = torch.randn(70, 37), torch.randn(70, 37), torch.rand(37)
    dz, dg = dora.dora_gradients(dy, None, g, True)
    assert torch.equal(dz, dy * g)
    assert dg is None
    dz, dg = dora.dora_gradients(dy, u, g, False)
    assert dz is None
    assert_as_accurate("dg", dg, (dy * u).sum(0), (dy.double() * u.double()).sum(0))
    assert dora.dora_gradients(dy, None, g, False) == (None, None)


def test_masked_lanes_do_not_turn_infinities_into_nan():
    """Case 11: an infinite value beside the tail of a block."""
    w = torch.randn(3, 70)
    w[1, 69] = float("inf")
    norm = dora.dora_norm(w, torch.ones(2, 70), torch.ones(3, 2), 1.0)
    assert norm[1] == float("inf")
    assert norm[[0, 2]].isfinite().all()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("K", "blocksize", "slab_bytes"), [(96, 64, 32 << 20), (96, 64, 1), (320, 64, 1), (64, 64, 1)])
def test_norm_of_nf4_by_slabs_and_in_one_kernel(monkeypatch, K, blocksize, slab_bytes, nested):
    """Blocks that end with the rows take one kernel; others slabs, one or several."""
    monkeypatch.setattr(configs, "NF4_SLAB_BYTES", slab_bytes)
    weight = nf4.quantize(torch.randn(75, K), blocksize, nested)
    a, b = torch.randn(3, K), torch.randn(75, 3)
    same = reference.dora_norm(weight, a, b, 0.5)
    exact = reference.dora_norm(nf4.dequantize(weight).double(), a.double(), b.double(), 0.5)
    assert_as_accurate("norm", dora.dora_norm(weight, a, b, 0.5), same, exact)


@pytest.mark.parametrize("blocksize", [32, 4096])
def test_norm_of_nf4_at_the_ends_of_block_sizes(blocksize):
    weight = nf4.quantize(torch.randn(5, 4096), blocksize)
    a, b = torch.randn(3, 4096), torch.randn(5, 3)
    exact = reference.dora_norm(nf4.dequantize(weight).double(), a.double(), b.double(), 0.5)
    assert_as_accurate("norm", dora.dora_norm(weight, a, b, 0.5), reference.dora_norm(weight, a, b, 0.5), exact)
