"""A frozen 4-bit linear without adapter, nested scales; nn.Linear is the 16-bit layer that it replaces.

On a CPU bitsandbytes has a packed layout and a kernel for inference; in training mode it decodes and multiplies.
"""

import pytest

from benchmarks.peers import NF4_LINEAR

pytestmark = pytest.mark.parametrize("contender", NF4_LINEAR)


def test_forward(measure, nf4_shape, contender):
    measure("nf4_linear forward", NF4_LINEAR[contender], nf4_shape, None, backward=False)


def test_forward_of_a_step(measure, few_rows_shape, contender):
    measure(
        "nf4_linear forward", NF4_LINEAR[contender], few_rows_shape, None, backward=False, forward_mode="training mode"
    )


def test_forward_backward(measure, nf4_shape, contender):
    measure("nf4_linear forward + backward", NF4_LINEAR[contender], nf4_shape, None, backward=True)
