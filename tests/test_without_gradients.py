"""An op of which no gradient is asked computes without its Function; whatever else watches still gets the Function."""

from importlib import import_module

import pytest
import torch
from torch.autograd import forward_ad

from peft_ops import nf4
from peft_ops.ops import lora_linear, nf4_linear

WEIGHT = nf4.quantize(torch.randn(48, 64) / 8, double_quant=True)
BIAS, A, B = torch.randn(48), torch.randn(3, 64) / 8, torch.randn(48, 3)
OPS = {
    "_NF4Linear": lambda x: nf4_linear(x, WEIGHT, BIAS),
    "_LoRALinear": lambda x: lora_linear(x, WEIGHT, BIAS, A, B, 0.5),
}
each_op = pytest.mark.parametrize("name", OPS)


def function_of(name):
    module = "nf4_linear" if name == "_NF4Linear" else "lora_linear"
    return getattr(import_module(f"peft_ops.ops.{module}"), name)


@each_op
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 1, 64), (0, 64)])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_result_is_that_of_the_function(name, shape, autocast, monkeypatch):
    op, x = OPS[name], torch.randn(shape)
    with torch.autocast("cpu", enabled=autocast):
        recorded = op(x.clone().requires_grad_())
        assert recorded.requires_grad
        monkeypatch.setattr(function_of(name), "apply", lambda *args: pytest.fail("a Function"))
        for given in (x, x.clone().requires_grad_()):
            with torch.set_grad_enabled(given is x):
                y = op(given)
            assert not y.requires_grad
            assert torch.equal(y, recorded)
            assert y.dtype == recorded.dtype == (torch.bfloat16 if autocast else torch.float32)


@each_op
def test_tangents_raise_and_are_not_lost(name):
    x = torch.randn(3, 64)
    with forward_ad.dual_level(), torch.no_grad(), pytest.raises(NotImplementedError, match="jvp"):
        OPS[name](forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.filterwarnings("ignore")
def test_a_trace_keeps_the_function():
    op = lambda x: lora_linear(x, W, BIAS, A, B, 0.5)
    W = torch.randn(48, 64)
    with torch.no_grad():
        traced = torch.jit.trace(op, torch.randn(3, 64), check_trace=False)
        x = torch.randn(3, 64)
        assert torch.equal(traced(x), op(x))
