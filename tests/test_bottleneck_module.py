"""nn.BottleneckAdapter: its initialisations, its residual, and what a module has to withstand."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

from peft_ops.nn import BottleneckAdapter


def exact(layer, x, residual):
    """Written out with nn.functional, in float64."""
    x, residual = x.double(), residual.double()
    p = {name: parameter.detach().double() for name, parameter in layer.named_parameters()}
    h = torch.nn.functional.gelu(torch.nn.functional.linear(x, p["down_weight"], p.get("down_bias")))
    return residual + layer.scaling * torch.nn.functional.linear(h, p["up_weight"], p.get("up_bias"))


@pytest.fixture
def layer():
    layer = BottleneckAdapter(24, 6, scaling=0.5)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def test_adds_to_x_or_to_another_residual(layer):
    x, other = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    for residual in (None, other):
        truth = exact(layer, x, x if residual is None else other)
        torch.testing.assert_close(layer(x, residual), truth.float())


def test_without_biases(layer):
    layer = BottleneckAdapter(24, 6, init="bert", bias=False)
    assert [name for name, _ in layer.named_parameters()] == ["down_weight", "up_weight"]
    x = torch.randn(5, 24)
    torch.testing.assert_close(layer(x), exact(layer, x, x).float())


def test_houlsbys_initialisation_is_near_the_identity():
    """A normal of std 1e-3 cut off at two of them, whose own std is 0.88 of that."""
    layer = BottleneckAdapter(512, 64)
    for weight in (layer.down_weight, layer.up_weight):
        assert weight.abs().max() <= 2e-3
        assert 0.86e-3 < weight.std() < 0.90e-3
    assert not layer.down_bias.any()
    assert not layer.up_bias.any()
    x = torch.randn(8, 512)
    assert 0 < (layer(x) - x).norm() < 1e-3 * x.norm()


def test_berts_initialisation():
    layer = BottleneckAdapter(512, 64, init="bert")
    for weight in (layer.down_weight, layer.up_weight):
        assert 0.0195 < weight.std() < 0.0205
        assert weight.abs().max() > 0.05
    assert not layer.down_bias.any()
    assert not layer.up_bias.any()


def test_the_parallel_adapters_initialisation_is_the_identity():
    layer = BottleneckAdapter(512, 64, "relu", scaling=4.0, init="mam_adapter")
    bound = 1 / math.sqrt(512)  # kaiming_uniform with a = sqrt(5)
    assert 0.99 * bound < layer.down_weight.abs().max() <= bound
    assert not parameters_to_vector([layer.down_bias, layer.up_weight, layer.up_bias]).any()
    x, residual = torch.randn(8, 512), torch.randn(8, 512)
    assert torch.equal(layer(x, residual), residual)


@pytest.mark.parametrize(("d", "m"), [(768, 64), (1024, 64)])
def test_parameter_count(d, m):
    assert sum(p.numel() for p in BottleneckAdapter(d, m, device="meta").parameters()) == 2 * d * m + m + d


def test_trains_in_float32_on_a_16_bit_x():
    layer = BottleneckAdapter(24, 6, dtype=torch.float32)
    y = layer(torch.randn(5, 24, dtype=torch.bfloat16))
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in layer.parameters())


def test_state_dict_copy_pickle_and_meta(layer):
    """Case 32."""
    x = torch.randn(5, 24)
    y = layer(x)
    names = ["down_weight", "up_weight", "down_bias", "up_bias"]
    assert list(layer.state_dict()) == names
    store = io.BytesIO()
    torch.save(layer.state_dict(), store)
    store.seek(0)
    fresh = BottleneckAdapter(24, 6, scaling=0.5, device="meta")
    fresh.load_state_dict(torch.load(store), assign=True)
    for other in (fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), y)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_repr(layer):
    shown = "in_features=24, bottleneck=6, activation=gelu, scaling=0.5, init=houlsby, bias=True"
    assert repr(layer) == f"BottleneckAdapter({shown})"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"in_features": 0}, ValueError, "in_features must be at least 1, got 0"),
        ({"in_features": "8"}, TypeError, "in_features must be an int, got '8'"),
        ({"bottleneck": 0}, ValueError, "bottleneck must be at least 1, got 0"),
        ({"bottleneck": 2.0}, TypeError, "bottleneck must be an int, got 2.0"),
        ({"bottleneck": True}, TypeError, "bottleneck must be an int, got True"),
        ({"activation": "elu"}, ValueError, "activation must be one of linear, .* got 'elu'"),
        ({"scaling": "learned"}, TypeError, "scaling must be a number, got 'learned'"),
        ({"scaling": math.nan}, ValueError, "scaling must be finite, got nan"),
        ({"init": "zero"}, ValueError, "init must be one of houlsby, bert, mam_adapter, got 'zero'"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        BottleneckAdapter(**({"in_features": 8, "bottleneck": 2} | arguments))
