"""DoRALinear over dense, Conv1D and NF4 weights: what it computes, merging, copies, and equality with PEFT's layer."""

import copy
import io
import pickle

import peft
import pytest
import torch
from tiny_models import assert_same_bytes
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from peft_ops import nf4
from peft_ops.nn import DoRALinear, LoRALinear, NF4Linear

K, N, R = 64, 40, 3
ADAPTER = {"lora_A", "lora_B", "lora_magnitude_vector"}


def linear(dtype=torch.float32):
    return nn.Linear(K, N, dtype=dtype)


def conv1d(dtype=torch.float32):
    layer = Conv1D(N, K).to(dtype)
    nn.init.normal_(layer.weight, std=K**-0.5)
    nn.init.normal_(layer.bias)
    return layer


def nf4_linear(dtype=torch.float32):
    return NF4Linear.from_linear(linear(dtype), 32)


BASES = {"linear": linear, "conv1d": conv1d, "nf4": nf4_linear}
on_every_base = pytest.mark.parametrize("make", BASES.values(), ids=BASES)


def dora(base, **kwargs):
    """A layer that has left its start: no direction is the base's, no scale is 1."""
    layer = LoRALinear.from_linear(base, **{"r": R, "init_lora_weights": False, "use_dora": True, **kwargs})
    with torch.no_grad():
        layer.lora_magnitude_vector.mul_(0.5 + torch.rand(N))
    return layer


def matrix(layer):
    """The base weight [N, K] in float64."""
    if not isinstance(layer.weight, torch.Tensor):
        return nf4.dequantize(layer.weight, torch.float32).double()
    return (layer.weight.T if layer.fan_in_fan_out else layer.weight).double()


def adapted(layer):
    """Equation 5 in float64."""
    w = matrix(layer) + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    return layer.lora_magnitude_vector.double()[:, None] * w / w.square().sum(1, keepdim=True).sqrt()


@on_every_base
@pytest.mark.parametrize("shape", [(K,), (5, K), (2, 3, K), (0, K)])
def test_forward_is_the_formula(make, shape):
    layer, x = dora(make(), lora_alpha=6), torch.randn(shape)
    expected = x.double() @ adapted(layer).T + layer.bias.double()
    torch.testing.assert_close(layer(x), expected.float(), rtol=1e-5, atol=1e-5)
    assert isinstance(layer, DoRALinear)


@on_every_base
def test_starts_as_the_base(make):
    """B = 0 and the magnitude is the norm of each row: g is 1."""
    base, x = make(), torch.randn(5, K)
    layer = DoRALinear.from_linear(base, r=4)
    assert not layer.lora_B.any()
    torch.testing.assert_close(layer.lora_magnitude_vector, matrix(layer).norm(dim=1).float())
    torch.testing.assert_close(layer(x), base(x))
    drawn = LoRALinear.from_linear(make(), r=4, use_dora=True, init_lora_weights=False)
    torch.testing.assert_close(drawn(x), x @ drawn.merged_weight().T + drawn.bias, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        drawn.lora_magnitude_vector.zero_()
    drawn.reset_magnitude()
    w = matrix(drawn) + drawn.scaling * drawn.lora_B.double() @ drawn.lora_A.double()
    torch.testing.assert_close(drawn.lora_magnitude_vector, w.norm(dim=1).float())


@on_every_base
def test_base_is_shared_and_frozen_and_the_adapter_learns(make):
    base = make()
    layer = dora(base)
    assert layer.bias is base.bias
    layer(torch.randn(4, K)).square().sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == ADAPTER
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == ADAPTER
    assert all(getattr(layer, name).grad.abs().max() > 0 for name in ADAPTER)


@pytest.mark.parametrize("make", [linear, conv1d])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_equals_pefts_layer(make, dropout):
    """Output and gradients in eval mode, where PEFT's dropout rests; the magnitude that both start with."""
    base = make().requires_grad_(False)
    config = peft.LoraConfig(r=R, lora_alpha=6, use_dora=True, target_modules=["0"], init_lora_weights=False,
                             lora_dropout=dropout, fan_in_fan_out=make is conv1d)  # fmt: skip
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config).base_model.model[0].eval()
    layer = DoRALinear.from_linear(base, R, 6, dropout).eval()
    values = [theirs.lora_A.default.weight, theirs.lora_B.default.weight, theirs.lora_magnitude_vector.default.weight]
    with torch.no_grad():
        for mine, value in zip((layer.lora_A, layer.lora_B), values, strict=False):
            mine.copy_(value)
        layer.reset_magnitude()
        torch.testing.assert_close(layer.lora_magnitude_vector, values[2])
        values[2].mul_(0.5 + torch.rand(N))
        layer.lora_magnitude_vector.copy_(values[2])
    x, dy = torch.randn(2, 5, K, requires_grad=True), torch.randn(2, 5, N)
    mine = [x, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector]
    torch.testing.assert_close(layer(x), theirs(x), rtol=1e-5, atol=1e-5)
    for ours, other in zip(
        torch.autograd.grad(layer(x), mine, dy), torch.autograd.grad(theirs(x), [x, *values], dy), strict=True
    ):
        assert other.norm() > 0
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)
    theirs.merge(safe_merge=True)
    merged = theirs.base_layer.weight.T if make is conv1d else theirs.base_layer.weight
    torch.testing.assert_close(layer.merged_weight(), merged, rtol=1e-5, atol=1e-5)


def test_dropout_only_in_training():
    layer, x = dora(linear(), lora_dropout=0.5), torch.randn(64, K)
    assert torch.equal(layer.eval()(x), layer(x))
    clean = layer(x)
    assert not torch.equal(layer.train()(x), layer(x))
    mean = torch.stack([layer(x) for _ in range(300)]).mean(0)
    assert (mean - clean).abs().mean() < (layer(x) - clean).abs().mean() / 10


@pytest.mark.parametrize("reentrant", [False, True])
@on_every_base
def test_gradient_checkpointing(make, reentrant):
    layer, x, results = dora(make(), lora_dropout=0.4), torch.randn(5, K, requires_grad=True), []
    parameters = [x, *(getattr(layer, name) for name in sorted(ADAPTER))]
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        torch.manual_seed(3)
        for parameter in parameters:
            parameter.grad = None
        run(x).square().sum().backward()
        results.append([parameter.grad for parameter in parameters])
    assert all(torch.equal(g, h) and g.abs().max() > 0 for g, h in zip(*results, strict=True))


@on_every_base
def test_disabled_is_the_base_to_the_bit(make):
    base, x = make(), torch.randn(2, 5, K)
    layer = dora(base)
    assert not torch.allclose(layer(x), base(x), atol=1e-2)
    layer.adapter_enabled = False
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("make", [linear, conv1d])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_rounds_once_and_unmerges_exactly(make, dtype):
    base = make(dtype)
    layer, x = dora(base, lora_alpha=6), torch.randn(5, K, dtype=dtype)
    value, before, exact = layer.weight.clone(), layer(x), adapted(layer)
    layer.merge()
    layer.merge()
    assert layer.merged
    once = exact.to(dtype)
    merged = layer.weight.T if make is conv1d else layer.weight
    assert (merged != once).sum() <= 0.01 * once.numel() or dtype == torch.float32
    torch.testing.assert_close(merged, once, rtol=8e-3 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    torch.testing.assert_close(layer(x), before, rtol=5e-2, atol=5e-2 if dtype == torch.bfloat16 else 1e-5)
    assert torch.equal(base.weight, value)
    layer.unmerge()
    assert torch.equal(layer.weight, value)
    assert torch.equal(layer(x), before)


def test_merge_over_nf4_is_lossy_and_unmerges_exactly():
    layer, x = dora(nf4_linear()), torch.randn(5, K)
    before, stored = layer(x), [t.clone() for t in layer.stored()]
    torch.testing.assert_close(layer.to_linear()(x), before, rtol=1e-5, atol=1e-5)
    with pytest.warns(UserWarning, match="lossy"):
        layer.merge()
    assert 0 < (layer(x) - before).norm() < 0.2 * before.norm()
    layer.unmerge()
    assert all(torch.equal(t, s) for t, s in zip(layer.stored(), stored, strict=True))
    assert torch.equal(layer(x), before)
    assert isinstance(layer.to_nf4_linear(), NF4Linear)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_merging_nan_is_refused(bad):
    layer = dora(linear())
    with torch.no_grad():
        layer.lora_magnitude_vector[3] = bad
    before = layer.weight
    with pytest.raises(ValueError, match="NaN or infinite"):
        layer.merge()
    assert not layer.merged
    assert layer.weight is before


@pytest.mark.parametrize("make", [linear, conv1d])
def test_to_linear_gives_the_layer_back(make):
    base = make()
    layer, x = dora(base).eval(), torch.randn(5, K)
    plain = layer.to_linear()
    assert type(plain) is type(base)
    assert repr(plain) == repr(base)
    assert plain.bias is base.bias
    torch.testing.assert_close(plain(x), layer(x), rtol=1e-5, atol=1e-5)


@on_every_base
def test_copies_are_exact(make):
    layer, x, buffer = dora(make(), lora_dropout=0.1).eval(), torch.randn(5, K), io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        assert repr(other) == repr(layer)
        assert_same_bytes(other.state_dict(), layer.state_dict())
        assert torch.equal(other(x), layer(x))
        with torch.no_grad():
            other.lora_magnitude_vector.zero_()
        assert layer.lora_magnitude_vector.all()


@pytest.mark.parametrize("assign", [True, False])
def test_loads_onto_meta(assign):
    layer, x = dora(linear(torch.bfloat16), r=8), torch.randn(5, K, dtype=torch.bfloat16)
    empty = DoRALinear(K, N, device="meta", dtype=torch.bfloat16)
    assert empty.lora_magnitude_vector.is_meta
    if not assign:
        empty.to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict(), assign=assign)
    assert_same_bytes(empty.state_dict(), layer.state_dict())
    assert {n for n, p in empty.named_parameters() if p.requires_grad} == ADAPTER
    assert torch.equal(DoRALinear.from_linear(linear(torch.bfloat16))(x).isfinite(), torch.ones(5, N, dtype=torch.bool))


@pytest.mark.parametrize(("base", "adapter"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_dtypes(base, adapter):
    layer = dora(linear(base))
    assert {getattr(layer, name).dtype for name in ADAPTER} == {adapter}
    y = layer(torch.randn(4, K, dtype=base, requires_grad=True))
    y.square().sum().backward()
    assert y.dtype == base
    assert layer.lora_magnitude_vector.grad.dtype == adapter


@on_every_base
def test_casting(make):
    layer = dora(make()).to(torch.bfloat16)
    x = torch.randn(5, K, dtype=torch.bfloat16)
    assert {getattr(layer, name).dtype for name in ADAPTER} == {torch.bfloat16}
    expected = x.double() @ adapted(layer).T + layer.bias.double()
    assert (layer(x).double() - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.unpoisoned
@on_every_base
def test_compiles_without_breaks(make):
    layer = dora(make(), lora_dropout=0.3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, dy, parameters = torch.randn(5, K), torch.randn(5, N), [getattr(layer, name) for name in sorted(ADAPTER)]

    def gradients(run):
        torch.manual_seed(4)
        return torch.autograd.grad(run(x), parameters, dy)

    for actual, expected in zip(gradients(compiled), gradients(layer), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_bad_arguments_and_repr():
    with pytest.raises(ValueError, match="r must be at least 1"):
        DoRALinear.from_linear(linear(), r=0)
    with pytest.raises(TypeError, match="Embedding"):
        DoRALinear.from_linear(nn.Embedding(3, 4))
    assert repr(dora(linear(), lora_alpha=6)) == (
        "DoRALinear(in_features=64, out_features=40, bias=True, r=3, lora_alpha=6, lora_dropout=0.0, scaling=2)"
    )
