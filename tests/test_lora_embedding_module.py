"""LoRAEmbedding over plain and scaled embeddings: what it computes, merging, copies, and layers that are refused."""

import copy
import pickle

import pytest
import torch
from tiny_models import assert_same_bytes
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_ops.nn import LoRAEmbedding

V, D, R = 50, 37, 3
ADAPTER = {"lora_embedding_A", "lora_embedding_B"}


def indices(*shape):
    return torch.randint(0, V, shape)


def plain():
    return nn.Embedding(V, D)


def padded():
    return nn.Embedding(V, D, padding_idx=-2, scale_grad_by_freq=True)


def gemma():
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    return Gemma3TextScaledWordEmbedding(V, D, padding_idx=0, embed_scale=6.1)


def bart():
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

    return BartScaledWordEmbedding(V, D, padding_idx=1, embed_scale=6.1)


on_every_base = pytest.mark.parametrize("make", [plain, padded, gemma, bart])


def lora(base, **kwargs):
    return LoRAEmbedding.from_embedding(base, **{"r": R, "init_lora_weights": False, **kwargs})


@on_every_base
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_is_the_formula_and_off_the_base_to_the_bit(make, dtype):
    base, x = make().to(dtype), indices(2, 9)
    layer = lora(base, lora_alpha=6)
    scale = float(torch.as_tensor(getattr(base, "embed_scale", 1.0)).to(dtype)) if make is gemma else None
    scale = scale or getattr(base, "embed_scale", 1.0)
    a, b = layer.lora_embedding_A.double(), layer.lora_embedding_B.double()
    expected = scale * (base.weight.double() + 2.0 * (b @ a).T)[x]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(
        layer(x).double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item()
    )
    assert layer(x).dtype == dtype
    assert layer.weight is base.weight
    layer.adapter_enabled = False
    assert torch.equal(layer(x), base(x))


@on_every_base
def test_layer_starts_as_the_base_and_trains_its_adapter(make):
    base, x = make(), indices(2, 9)
    layer = LoRAEmbedding.from_embedding(base, r=R)
    assert torch.equal(layer(x), base(x))
    assert not layer.lora_embedding_A.any()
    assert 0.7 < layer.lora_embedding_B.std() < 1.3
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == ADAPTER
    layer(x).square().sum().backward()
    assert layer.lora_embedding_A.grad.any()
    assert layer.lora_embedding_A.grad.is_contiguous()
    if base.padding_idx is not None:
        assert not layer.lora_embedding_A.grad[:, base.padding_idx].any()


@on_every_base
def test_layer_merges_and_gives_the_embedding_back(make):
    base, x = make(), indices(2, 9)
    value, layer = base.weight.clone(), lora(base)
    before = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), before)
    assert torch.equal(base.weight, value)
    back = layer.to_embedding()
    layer.unmerge()
    assert layer.weight is base.weight
    assert torch.equal(layer(x), before)
    for plain in (back, layer.to_embedding()):
        assert type(plain) is type(base)
        assert repr(plain) == repr(base)
        assert plain.state_dict().keys() == base.state_dict().keys()
        torch.testing.assert_close(plain(x), before)
        assert torch.equal(plain.to(torch.bfloat16)(x).isfinite(), torch.ones(2, 9, D, dtype=torch.bool))


@on_every_base
def test_layer_copies_casts_and_moves(make):
    layer, x = lora(make()), indices(5)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(other) == repr(layer)
        assert_same_bytes(other.state_dict(), layer.state_dict())
        assert torch.equal(other(x), layer(x))
        assert other.weight.data_ptr() != layer.weight.data_ptr()
    layer.merge()
    layer.to(torch.float64).unmerge()
    assert layer(x).dtype == torch.float64
    narrow = lora(make().bfloat16())
    assert narrow.lora_embedding_A.dtype == torch.float32
    assert narrow.to(torch.bfloat16)(x).dtype == torch.bfloat16


@pytest.mark.parametrize("reentrant", [False, True])
def test_layer_under_gradient_checkpointing(reentrant):
    layer, x, results = lora(plain()), indices(9), []
    mix = torch.randn(D, D, requires_grad=True)  # reentrant checkpoints want an input with a gradient
    run = lambda mix: layer(x) @ mix
    for wrapped in (run, lambda mix: checkpoint(run, mix, use_reentrant=reentrant)):
        layer.zero_grad()
        wrapped(mix).square().sum().backward()
        results.append([layer.lora_embedding_A.grad, layer.lora_embedding_B.grad])
    assert all(torch.equal(g, h) and g.any() for g, h in zip(*results, strict=True))


@pytest.mark.unpoisoned
@on_every_base
def test_layer_compiles_without_breaks(make):
    layer, x = lora(make()), indices(9)
    compiled, dy = torch.compile(layer, fullgraph=True, backend="aot_eager"), torch.randn(9, D)
    parameters = [layer.lora_embedding_A, layer.lora_embedding_B]
    for actual, expected in zip(*(torch.autograd.grad(f(x), parameters, dy) for f in (compiled, layer)), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


class OwnForward(nn.Embedding):
    def forward(self, x):
        return super().forward(x) + 1


def test_other_layers_are_refused():
    from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
    from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2TextScaledWordEmbedding

    for base in (
        OwnForward(4, 5), OPTLearnedPositionalEmbedding(4, 5), T5Gemma2TextScaledWordEmbedding(9, 5, 0), nn.Linear(4, 5)
    ):  # fmt: skip
        with pytest.raises(TypeError, match=type(base).__name__):
            LoRAEmbedding.from_embedding(base)
        assert base.weight.requires_grad
    with pytest.raises(ValueError, match=r"max_norm=1.0"):
        LoRAEmbedding.from_embedding(nn.Embedding(4, 5, max_norm=1.0))
    with pytest.raises(ValueError, match="r must be at least 1"):
        LoRAEmbedding.from_embedding(plain(), r=0)
    with pytest.raises(TypeError, match="from_embedding"):
        LoRAEmbedding(4, 5)
