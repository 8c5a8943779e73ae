"""NF4Linear and LoRA over it: the stored bytes are exact and stay so."""

import copy
import pickle

import pytest
import torch
from tiny_models import assert_same_bytes
from torch import nn

from peft_ops import nf4
from peft_ops.nn import LoRALinear, NF4Linear

# in, out, blocksize: rows of whole blocks; blocks that cross rows; an odd number of elements
SHAPES = [(128, 48, 64), (40, 24, 64), (7, 5, 32)]


def make(k=128, n=48, blocksize=64, double_quant=True, dtype=torch.float32):
    return NF4Linear.from_linear(nn.Linear(k, n, dtype=dtype), blocksize, double_quant)


def qlora(dtype=torch.float32, **kwargs):
    return LoRALinear.from_linear(make(dtype=dtype), **{"r": 4, "init_lora_weights": False, **kwargs})


@pytest.mark.parametrize(("k", "n", "blocksize"), SHAPES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_forward_is_linear_with_the_dequantised_weight(k, n, blocksize, double_quant):
    linear = nn.Linear(k, n)
    layer = NF4Linear.from_linear(linear, blocksize, double_quant)
    weight = nf4.dequantize(nf4.quantize(linear.weight, blocksize, double_quant))
    x = torch.randn(2, 3, k, requires_grad=True)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, linear.bias), rtol=1e-5, atol=1e-6)
    assert 0 < (weight - linear.weight).abs().max() < 0.25 * linear.weight.abs().max()
    assert torch.equal(layer.to_linear().weight, weight)
    assert layer.bias is linear.bias
    assert linear.weight.requires_grad


def test_gradients_reach_x_and_bias_only():
    layer, x = make(), torch.randn(4, 128, requires_grad=True)
    dy = torch.randn(4, 48)
    layer(x).backward(dy)
    torch.testing.assert_close(x.grad, dy @ layer.to_linear().weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, dy.sum(0))
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"bias"}


@pytest.mark.parametrize(("double_quant", "most"), [(False, 4.6), (True, 4.2)])
def test_bits_per_weight(double_quant, most):
    layer = NF4Linear(1024, 256, bias=False, double_quant=double_quant)
    stored = sum(tensor.nbytes for tensor in layer.state_dict().values())
    assert 4.0 < 8 * stored / (1024 * 256) <= most
    assert layer.weight.nbytes == stored


def test_shards_at_rows():
    weight = make().weight
    assert weight.packed.shape == (48, 64)
    assert weight.absmax_codes.shape == (48, 2)
    names = {name for name, _ in make().named_parameters()}
    assert names == {"packed", "absmax_codes", "bias"}
    assert {name for name, _ in make(double_quant=False).named_parameters()} == {"packed", "absmax", "bias"}
    assert all(p.dim() > 0 for p in make().parameters())


CASTS = {
    "to": lambda m: m.to(torch.bfloat16),
    "bfloat16": lambda m: m.bfloat16(),
    "type": lambda m: m.type(torch.bfloat16),
    "to meta and dtype": lambda m: m.to("meta", torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
def test_casting_leaves_the_bytes(cast, double_quant, adapter):
    layer = make(double_quant=double_quant)
    layer = LoRALinear.from_linear(layer, r=2) if adapter else layer
    before = {name: tensor.clone() for name, tensor in zip("abcde", layer.stored(), strict=False)}
    CASTS[cast](layer)
    for old, new in zip(before.values(), layer.stored(), strict=True):
        assert new.dtype == old.dtype
        assert new.is_meta or torch.equal(new, old)
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    assert layer.weight.shape == (48, 128)
    if cast == "to":
        assert layer(torch.randn(3, 128, dtype=torch.bfloat16)).dtype == torch.bfloat16
        assert layer.to_linear().weight.dtype == torch.bfloat16


@pytest.mark.parametrize("build", [make, lambda: make(double_quant=False), qlora])
def test_copies_are_exact(build):
    layer, x = build(), torch.randn(3, 128)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_same_bytes(other.state_dict(), layer.state_dict())
        assert torch.equal(other(x), layer(x))
        assert repr(other) == repr(layer)
        assert other.packed.data_ptr() != layer.packed.data_ptr()


@pytest.mark.parametrize(("k", "n", "blocksize"), SHAPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("assign", [True, False])
def test_loads_onto_meta(k, n, blocksize, double_quant, assign):
    layer = make(k, n, blocksize, double_quant, torch.bfloat16)
    empty = NF4Linear(k, n, blocksize=blocksize, double_quant=double_quant, device="meta", dtype=torch.bfloat16)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    if not assign:
        empty.to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict(), assign=assign)
    assert_same_bytes(empty.state_dict(), layer.state_dict())
    x = torch.randn(3, k, dtype=torch.bfloat16)
    assert torch.equal(empty(x), layer(x))
    assert not empty.packed.requires_grad


def test_lora_over_nf4_loads_onto_meta():
    layer, x = qlora(torch.bfloat16), torch.randn(3, 128, dtype=torch.bfloat16)
    empty = LoRALinear.from_linear(NF4Linear(128, 48, device="meta", dtype=torch.bfloat16), r=4)
    assert empty.lora_A.is_meta
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert_same_bytes(empty.state_dict(), layer.state_dict())
    empty.scaling = layer.scaling
    assert torch.equal(empty(x), layer(x))


def test_lora_over_nf4_shares_the_storage():
    base = make()
    layer = LoRALinear.from_linear(base, r=4, lora_alpha=8, init_lora_weights=False)
    assert isinstance(layer, LoRALinear)
    assert layer.packed is base.packed
    assert layer.absmax_codes is base.absmax_codes
    assert layer.nested_absmax is base.nested_absmax
    assert layer.bias is base.bias
    x = torch.randn(3, 128)
    dense = nf4.dequantize(base.weight) + 2.0 * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer(x), nn.functional.linear(x, dense, base.bias), rtol=1e-4, atol=1e-4)
    layer.adapter_enabled = False
    assert torch.equal(layer(x), base(x))
    layer.adapter_enabled = True
    layer(x).square().sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}


def test_merging_requantises_and_unmerging_is_exact():
    layer, x = qlora(lora_alpha=8), torch.randn(3, 128)
    state, before, base = copy.deepcopy(layer.state_dict()), layer(x), nf4.dequantize(layer.weight)
    dense = layer.to_linear()
    assert type(dense) is nn.Linear
    torch.testing.assert_close(dense(x), before, rtol=1e-4, atol=1e-4)
    packed = layer.packed
    with pytest.warns(UserWarning, match="lossy"):
        layer.merge()
    merged = nf4.quantize(dense.weight, 64, double_quant=True)
    assert torch.equal(layer.packed, merged.packed)
    assert torch.equal(layer.absmax_codes, merged.absmax_codes)
    assert torch.equal(layer(x), NF4Linear.from_linear(dense)(x))
    error, change = (layer(x) - before).norm(), (before - nn.functional.linear(x, base, layer.bias)).norm()
    assert 0 < error < change
    layer.double().float()
    layer.unmerge()
    assert layer.packed is packed
    assert_same_bytes(layer.state_dict(), state)
    assert torch.equal(layer(x), before)
    assert torch.equal(layer.to_nf4_linear().packed, merged.packed)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_blocksize_is_checked(device):
    with pytest.raises(ValueError, match=r"blocksize must be one of 32, .* 4096, got 48"):
        NF4Linear(128, 48, blocksize=48, device=device)


def test_bad_layers_are_refused():
    with pytest.raises(TypeError, match="float64"):
        NF4Linear.from_linear(nn.Linear(64, 4, dtype=torch.float64))
    with pytest.raises(TypeError, match="Embedding"):
        NF4Linear.from_linear(nn.Embedding(4, 64))
    linear = nn.Linear(64, 4)
    with torch.no_grad():
        linear.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        NF4Linear.from_linear(linear)


def test_repr():
    assert repr(make()) == ("NF4Linear(in_features=128, out_features=48, bias=True, blocksize=64, double_quant=True)")
    assert "base=nf4, blocksize=64, double_quant=True" in repr(qlora())
