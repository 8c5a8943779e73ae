"""The gated MLP of a Llama with adapters on its three projections; nn.Linear is the frozen block."""

import pytest

from benchmarks.block_peers import GATED_MLP, MLP
from benchmarks.shapes import DEVICE, DTYPE

pytestmark = [pytest.mark.parametrize("contender", GATED_MLP), pytest.mark.parametrize("p", [0.0, 0.1])]


def built(contender, shape):
    return lambda p: GATED_MLP[contender](MLP(shape.K, shape.N, device=DEVICE, dtype=DTYPE), p)


def test_forward(measure_layer, mlp_shape, p, contender):
    measure_layer("gated_mlp forward", built(contender, mlp_shape), mlp_shape, p, backward=False)


def test_forward_backward(measure_layer, mlp_shape, p, contender):
    measure_layer("gated_mlp forward + backward", built(contender, mlp_shape), mlp_shape, p, backward=True)
