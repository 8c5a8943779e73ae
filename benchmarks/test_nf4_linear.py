"""A frozen 4-bit linear without adapter, nested scales; nn.Linear is the 16-bit layer that it replaces."""

import pytest

from benchmarks.peers import NF4_LINEAR

pytestmark = pytest.mark.parametrize("contender", NF4_LINEAR)


def test_forward(measure, shape, contender):
    measure("nf4_linear forward", NF4_LINEAR[contender], shape, None, backward=False)


def test_forward_backward(measure, shape, contender):
    measure("nf4_linear forward + backward", NF4_LINEAR[contender], shape, None, backward=True)
