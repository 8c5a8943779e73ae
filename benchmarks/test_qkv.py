"""Query, key and value of one x with adapters on all three, one training step; nn.Linear is the frozen three."""

import pytest

from benchmarks.block_peers import PROJECTIONS, QKV
from benchmarks.shapes import DEVICE, DTYPE

pytestmark = [pytest.mark.parametrize("contender", PROJECTIONS), pytest.mark.parametrize("p", [0.0, 0.1])]


def test_forward_backward(measure_layer, qkv_shape, p, contender):
    def build(p):
        return PROJECTIONS[contender](QKV(qkv_shape.K, qkv_shape.N, device=DEVICE, dtype=DTYPE), p)

    measure_layer("qkv projections forward + backward", build, qkv_shape, p, backward=True)
