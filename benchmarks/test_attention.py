"""Causal attention over text on a CPU, where it is ours, against torch's; on a GPU it is torch's."""

import pytest
import torch

from benchmarks.measure import sample, saved_bytes
from benchmarks.peers import ATTENTION
from benchmarks.shapes import DTYPE, ON_GPU

pytestmark = [
    pytest.mark.parametrize("contender", ATTENTION),
    pytest.mark.skipif(ON_GPU, reason="ours is torch's on a GPU"),
]


def tensors(s, trained):
    """query, key and value as a layer's projections leave them."""
    shapes = (s.B, s.M, s.H, s.K), (s.B, s.N, s.heads, s.K), (s.B, s.N, s.heads, s.K)
    return [torch.randn(shape, dtype=DTYPE).transpose(1, 2).requires_grad_(trained) for shape in shapes]


def test_forward(benchmark, note, text_shape, contender):
    note("attention forward", text_shape, text_shape.variant)
    given = tensors(text_shape, False)
    sample(benchmark, lambda: ATTENTION[contender](*given), ON_GPU)


def test_forward_backward(benchmark, note, text_shape, contender):
    note("attention forward + backward", text_shape, text_shape.variant)
    leaves = tensors(text_shape, True)
    dout = torch.randn_like(leaves[0])
    benchmark.extra_info["saved_bytes"] = saved_bytes(lambda: ATTENTION[contender](*leaves), leaves)
    sample(benchmark, lambda: torch.autograd.grad(ATTENTION[contender](*leaves), leaves, dout), ON_GPU)
