"""LoRALinear: what it computes, what it shares, and that merging, copying and loading are exact."""

import copy
import io
import math
import pickle

import pytest
import torch
from tiny_models import assert_same_bytes
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_ops.nn import LoRALinear, NF4Linear

K, N, R = 24, 40, 3


def linear(dtype=torch.float32, bias=True):
    return nn.Linear(K, N, bias=bias, dtype=dtype)


def conv1d(dtype=torch.float32):
    layer = Conv1D(N, K).to(dtype)
    nn.init.normal_(layer.bias)
    return layer


def lora(base, **kwargs):
    return LoRALinear.from_linear(base, **{"r": R, "init_lora_weights": False, **kwargs})


def expected(layer, weight, x):
    """In float64, from the formula; weight [N, K]."""
    a, b = layer.lora_A.double(), layer.lora_B.double()
    y = x.double() @ (weight.double() + layer.scaling * b @ a).T
    return y if layer.bias is None else y + layer.bias.double()


@pytest.mark.parametrize("make", [linear, conv1d])
@pytest.mark.parametrize("shape", [(K,), (5, K), (2, 3, K), (0, K)])
def test_forward_is_the_formula(make, shape):
    base = make()
    layer = lora(base, lora_alpha=6)
    x = torch.randn(shape)
    weight = base.weight.T if make is conv1d else base.weight
    torch.testing.assert_close(layer(x), expected(layer, weight, x).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 6 / R), (True, 6 / math.sqrt(R))])
def test_scaling(rslora, scaling):
    assert lora(linear(), lora_alpha=6, use_rslora=rslora).scaling == scaling


def test_defaults_and_initialisation():
    torch.manual_seed(3)
    layer = LoRALinear(K, N)
    assert (layer.r, layer.lora_alpha, layer.scaling, layer.lora_dropout) == (8, 16, 2.0, 0.0)
    assert layer.lora_A.shape == (8, K)
    assert layer.lora_B.shape == (N, 8)
    assert not layer.lora_B.any()
    bound = 1 / math.sqrt(K)  # kaiming_uniform with a = sqrt(5)
    assert 0.9 * bound < layer.lora_A.abs().max() <= bound
    gaussian = LoRALinear.from_linear(nn.Linear(4000, 2), r=16, init_lora_weights="gaussian")
    assert gaussian.lora_A.std().item() == pytest.approx(1 / 16, rel=0.02)
    assert not gaussian.lora_B.any()


def test_base_is_shared_and_frozen():
    base = linear()
    layer = lora(base)
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    layer(torch.randn(4, K)).square().sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}
    assert all(p.grad.abs().max() > 0 for p in (layer.lora_A, layer.lora_B))


@pytest.mark.parametrize(
    ("base", "adapter"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_adapter_dtype(base, adapter):
    layer = lora(linear(base))
    assert layer.lora_A.dtype == layer.lora_B.dtype == adapter
    y = layer(torch.randn(4, K, dtype=base, requires_grad=True))
    y.square().sum().backward()
    assert y.dtype == base
    assert layer.lora_A.grad.dtype == adapter


def test_dropout_only_in_training():
    layer = lora(linear(), lora_dropout=0.5)
    x = torch.randn(64, K)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    once = layer(x)
    torch.manual_seed(5)
    assert torch.equal(layer(x), once)
    mean = torch.stack([layer(x) for _ in range(400)]).mean(0)
    noise, error = (first - second).abs().mean(), (mean - layer.eval()(x)).abs().mean()
    assert error < noise / 10


@pytest.mark.parametrize("training", [True, False])
def test_from_linear_keeps_the_mode(training):
    assert lora(linear().train(training)).training is training


@pytest.mark.parametrize("make", [linear, conv1d])
def test_disabled_is_the_base_to_the_bit(make):
    base = make()
    layer, x = lora(base), torch.randn(2, 5, K)
    assert not torch.equal(layer(x), base(x))
    layer.adapter_enabled = False
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("make", [linear, conv1d])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_rounds_once_and_unmerges_exactly(make, dtype):
    base = make(dtype)
    layer, x = lora(base, lora_alpha=6), torch.randn(5, K, dtype=dtype)
    original, value, before = layer.weight, layer.weight.clone(), layer(x)
    layer.merge()
    layer.merge()
    assert layer.merged
    matrix, dense = (t.T if make is conv1d else t for t in (layer.weight, value))
    once = (dense.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()).to(dtype)
    assert (matrix != once).sum() <= 0.01 * once.numel() or dtype == torch.float32
    torch.testing.assert_close(matrix, once, rtol=8e-3 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    torch.testing.assert_close(layer(x), before, rtol=5e-2, atol=5e-2 if dtype == torch.bfloat16 else 1e-5)
    assert torch.equal(base.weight, value)  # tied weights see nothing
    layer.unmerge()
    assert layer.weight is original
    assert torch.equal(layer.weight, value)
    assert torch.equal(layer(x), before)


def test_merge_survives_a_move():
    layer, x = lora(linear()), torch.randn(5, K)
    expected_after = copy.deepcopy(layer).to(torch.float64)(x.double())
    layer.merge()
    layer.to(torch.float64)
    layer.unmerge()
    assert layer.weight.dtype == torch.float64
    assert torch.equal(layer(x.double()), expected_after)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_merging_nan_is_refused(bad):
    layer = lora(linear())
    with torch.no_grad():
        layer.lora_B[3, 1] = bad
    before = layer.weight
    with pytest.raises(ValueError, match="NaN or infinite"):
        layer.merge()
    assert not layer.merged
    assert layer.weight is before


@pytest.mark.parametrize("make", [linear, conv1d])
def test_to_linear_gives_the_layer_back(make):
    base = make()
    layer, x = lora(base).eval(), torch.randn(5, K)
    plain = layer.to_linear()
    assert type(plain) is type(base)
    assert repr(plain) == repr(base)
    assert plain.bias is base.bias
    assert not plain.training
    torch.testing.assert_close(plain(x), layer(x), rtol=1e-5, atol=1e-5)
    layer.merge()
    assert torch.equal(layer.to_linear().weight, plain.weight)


def copies(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    yield copy.deepcopy(layer)
    yield pickle.loads(pickle.dumps(layer))
    yield torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("merged", [False, True])
def test_copies_are_exact(merged):
    layer, x = lora(conv1d(), lora_dropout=0.1), torch.randn(5, K)
    if merged:
        layer.merge()
    for other in copies(layer):
        assert repr(other) == repr(layer)
        assert_same_bytes(other.state_dict(), layer.state_dict())
        assert torch.equal(other.eval()(x), layer.eval()(x))
        assert other.weight.data_ptr() != layer.weight.data_ptr()
        other.unmerge()
        assert torch.equal(other.to_linear().weight, layer.to_linear().weight)


@pytest.mark.parametrize("assign", [True, False])
def test_loads_onto_meta(assign):
    layer, x = lora(linear(torch.bfloat16), r=8), torch.randn(5, K, dtype=torch.bfloat16)
    empty = LoRALinear(K, N, device="meta", dtype=torch.bfloat16)
    if not assign:
        empty.to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict(), assign=assign)
    assert_same_bytes(empty.state_dict(), layer.state_dict())
    assert {n for n, p in empty.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert torch.equal(LoRALinear.from_linear(linear(torch.bfloat16))(x).isfinite(), torch.ones(5, N, dtype=torch.bool))


@pytest.mark.unpoisoned
@pytest.mark.parametrize("base", [linear, conv1d, lambda: NF4Linear(K, N)])
def test_compiles_without_breaks(base):
    layer = lora(base(), lora_dropout=0.3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, dy = torch.randn(5, K), torch.randn(5, N)

    def gradients(run):
        torch.manual_seed(4)
        return torch.autograd.grad(run(x), (layer.lora_A, layer.lora_B), dy)

    for actual, expected in zip(gradients(compiled), gradients(layer), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_base_checkpoints_load():
    base, layer = linear(), LoRALinear(K, N)
    result = layer.load_state_dict(base.state_dict(), strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["lora_A", "lora_B"], [])
    assert torch.equal(layer(torch.eye(K)), base(torch.eye(K)))


def test_repr():
    assert repr(lora(linear(), lora_alpha=6, lora_dropout=0.1)) == (
        "LoRALinear(in_features=24, out_features=40, bias=True, r=3, lora_alpha=6, lora_dropout=0.1, scaling=2)"
    )


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"r": 0}, ValueError, "r must be at least 1, got 0"),
        ({"r": 2.0}, TypeError, "r must be an int, got 2.0"),
        ({"r": True}, TypeError, "r must be an int, got True"),
        ({"lora_alpha": "16"}, TypeError, "lora_alpha must be a number"),
        ({"lora_alpha": float("inf")}, ValueError, "lora_alpha must be finite"),
        ({"lora_dropout": 1.5}, ValueError, r"lora_dropout must be in \[0, 1\], got 1.5"),
        ({"lora_dropout": -0.1}, ValueError, "lora_dropout"),
        ({"lora_dropout": float("nan")}, ValueError, "lora_dropout"),
        ({"init_lora_weights": "pissa"}, ValueError, "init_lora_weights must be .* got 'pissa'"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    base = linear()
    with pytest.raises(error, match=message):
        LoRALinear.from_linear(base, **kwargs)
    assert base.weight.requires_grad
    if "init_lora_weights" not in kwargs:
        with pytest.raises(error, match=message):
            LoRALinear(K, N, **kwargs)


def test_an_equal_forward_of_a_subclass_is_taken():
    from transformers.models.falcon.modeling_falcon import FalconLinear

    base, x = FalconLinear(K, N), torch.randn(3, K)
    layer = lora(base)
    torch.testing.assert_close(layer(x), expected(layer, base.weight, x).float(), rtol=1e-5, atol=1e-5)
    layer.adapter_enabled = False
    assert torch.equal(layer(x), base(x))
    assert type(layer.to_linear()) is FalconLinear


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize(
    "base", [nn.Embedding(4, 5), nn.Bilinear(2, 2, 2), OwnForward(4, 5), LoRALinear(4, 5), nn.Conv1d(2, 2, 1), "linear"]
)
def test_other_layers_are_refused(base):
    with pytest.raises(TypeError, match=type(base).__name__):
        LoRALinear.from_linear(base)


def test_weight_without_gradient_dtype_is_refused():
    base = linear()
    base.weight = nn.Parameter(torch.zeros(N, K, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"int8 \(40, 24\)"):
        LoRALinear.from_linear(base)
