"""NF4 quantise and dequantise of a 16-bit weight, with scales in 32 bits and nested in 8; also into a given tensor."""

import pytest
import torch

from benchmarks.measure import peak_bytes, sample
from benchmarks.peers import CODECS
from benchmarks.shapes import DEVICE, DTYPE, ON_GPU

pytestmark = [
    pytest.mark.parametrize("contender", CODECS),
    pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"]),
]


@pytest.fixture
def codec(benchmark, note):
    def measured(op, which, shape, nested, contender):
        note(op, shape, "nested" if nested else "plain")
        call = CODECS[contender](torch.randn(shape.N, shape.K, device=DEVICE, dtype=DTYPE), nested)[which]
        if call is None:
            pytest.skip("it has no such function")
        benchmark.extra_info["peak_bytes"] = peak_bytes(call)
        sample(benchmark, call, ON_GPU)

    return measured


def test_quantize(codec, weight_shape, nested, contender):
    codec("nf4 quantize", 0, weight_shape, nested, contender)


def test_dequantize(codec, weight_shape, nested, contender):
    codec("nf4 dequantize", 1, weight_shape, nested, contender)


def test_dequantize_into(codec, weight_shape, nested, contender):
    codec("nf4 dequantize into out", 2, weight_shape, nested, contender)
