"""A bottleneck adapter of 64 features on x [M, d], its own residual, against the plain modules of its formula."""

import pytest

from benchmarks.peers import ADAPTER

pytestmark = pytest.mark.parametrize("contender", ADAPTER)


def test_forward(measure, adapter_shape, contender):
    measure("bottleneck_adapter forward", ADAPTER[contender], adapter_shape, None, backward=False)


def test_forward_backward(measure, adapter_shape, contender):
    measure("bottleneck_adapter forward + backward", ADAPTER[contender], adapter_shape, None, backward=True)
