"""Attention over [prefix; text], a float32 prefix beside a 16-bit text, against joining them and against no prefix.

Training joins keys and values at every forward; decoding finds them joined in the cache.
"""

import pytest
import torch

from benchmarks.measure import peak_bytes, sample, saved_bytes
from benchmarks.peers import PREFIX, attend_joined, joined
from benchmarks.shapes import DEVICE, DTYPE, ON_GPU

pytestmark = pytest.mark.parametrize("contender", PREFIX)


def tensors(shape, trained):
    B, H, heads, n, M, N, K = shape.B, shape.H, shape.heads, shape.n, shape.M, shape.N, shape.K
    text = [torch.randn(B, rows, h, K, device=DEVICE, dtype=DTYPE) for rows, h in ((M, H), (N, heads), (N, heads))]
    prefix = [torch.randn(heads, n, K, device=DEVICE, requires_grad=trained) for _ in range(2)]
    return [*(t.transpose(1, 2).requires_grad_(trained) for t in text), *prefix]


def test_forward_backward(benchmark, note, attention_shape, contender):
    note("prefix_attention forward + backward", attention_shape, attention_shape.variant)
    leaves, attend = tensors(attention_shape, True), PREFIX[contender]
    dout = torch.randn_like(leaves[0])

    def step():
        return torch.autograd.grad(attend(*leaves, True), leaves, dout, allow_unused=True)

    benchmark.extra_info["saved_bytes"] = saved_bytes(lambda: attend(*leaves, True), leaves)
    if ON_GPU:
        benchmark.extra_info["peak_bytes"] = peak_bytes(step)
    sample(benchmark, step, ON_GPU)


def test_decode(benchmark, note, decoding_shape, contender):
    note("prefix_attention decode", decoding_shape, decoding_shape.variant)
    query, key, value, prefix_key, prefix_value = (t.contiguous() for t in tensors(decoding_shape, False))
    cache = joined(key, value, prefix_key, prefix_value)

    @torch.no_grad()
    def step():
        if contender == "joined SDPA":
            return attend_joined(query, *cache, False)
        return PREFIX[contender](query, key, value, prefix_key, prefix_value, False)

    sample(benchmark, step, ON_GPU)
