"""DoRA over a dense base, one training step of the layer; LoRA is our own, nn.Linear the frozen layer.

In PEFT dropout reaches the base weight too, which costs a second product with it.
"""

import pytest

from benchmarks.peers import DORA

pytestmark = [pytest.mark.parametrize("contender", DORA), pytest.mark.parametrize("p", [0.0, 0.1])]


def test_forward_backward(measure, shape, p, contender):
    measure("dora_linear forward + backward", DORA[contender], shape, p, backward=True)
