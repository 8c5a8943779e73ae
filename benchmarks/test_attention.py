"""Causal attention on a CPU, queries, keys and values as a layer's projections leave them, against torch's."""

import pytest
import torch

from benchmarks.measure import sample, saved_bytes
from benchmarks.peers import ATTENTION
from benchmarks.shapes import DEVICE, DTYPE, ON_GPU

pytestmark = pytest.mark.parametrize("contender", ATTENTION)


def tensors(shape, trained):
    B, M, N, K = shape.B, shape.M, shape.N, shape.K
    sizes = ((M, shape.H), (N, shape.heads), (N, shape.heads))
    made = (torch.randn(B, rows, heads, K, device=DEVICE, dtype=DTYPE) for rows, heads in sizes)
    return [t.transpose(1, 2).requires_grad_(trained) for t in made]


def test_forward(benchmark, note, self_attention_shape, contender):
    note("attention forward", self_attention_shape, self_attention_shape.variant)
    leaves = tensors(self_attention_shape, False)
    sample(benchmark, lambda: ATTENTION[contender](*leaves), ON_GPU)


def test_forward_backward(benchmark, note, self_attention_shape, contender):
    note("attention forward + backward", self_attention_shape, self_attention_shape.variant)
    leaves, attend = tensors(self_attention_shape, True), ATTENTION[contender]
    dout = torch.randn_like(leaves[0])
    benchmark.extra_info["saved_bytes"] = saved_bytes(lambda: attend(*leaves), leaves)
    sample(benchmark, lambda: torch.autograd.grad(attend(*leaves), leaves, dout), ON_GPU)
