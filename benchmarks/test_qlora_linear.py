"""LoRA over a 4-bit base, one training step of the layer; nn.Linear is the frozen 16-bit layer."""

import pytest

from benchmarks.peers import QLORA

pytestmark = [pytest.mark.parametrize("contender", QLORA), pytest.mark.parametrize("p", [0.0, 0.1])]


def test_forward_backward(measure, shape, p, contender):
    measure("qlora_linear forward + backward", QLORA[contender], shape, p, backward=True)
