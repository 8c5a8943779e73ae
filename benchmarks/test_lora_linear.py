"""LoRA over a dense base: one layer against the frozen linear below it, PEFT, and two plain passes."""

import pytest

from benchmarks.peers import LORA

pytestmark = [pytest.mark.parametrize("contender", LORA), pytest.mark.parametrize("p", [0.0, 0.1])]


def test_forward(measure, shape, p, contender):
    measure("lora_linear forward", LORA[contender], shape, p, backward=False)


def test_forward_backward(measure, shape, p, contender):
    measure("lora_linear forward + backward", LORA[contender], shape, p, backward=True)
