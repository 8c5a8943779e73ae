"""PiSSA and LoftQ: how factors start, what the layers compute, and that the base is there again."""

import peft
import pytest
import torch
from tiny_models import llama, logits, snapshot, tokens, train
from torch import nn

import peft_ops
from peft_ops.nn.lora_init import loftq, pissa_iterations, principal_factors
from peft_ops.nn.principal_lora import PrincipalLoRALinear, ResidualNF4LoRALinear
from peft_ops.reference.nf4 import NF4_LEVELS

R = 4


def weight(n=24, k=32, seed=3):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def linear(dtype=torch.float32, bias=True):
    layer = nn.Linear(64, 24, bias=bias)
    with torch.no_grad():
        layer.weight.copy_(weight(24, 64))
    return layer.to(dtype)


@pytest.mark.parametrize(("n", "k"), [(24, 32), (32, 24), (3, 7)])
@pytest.mark.parametrize("iterations", [0, 16])
def test_factors_are_the_best_of_their_rank(n, k, iterations):
    """Eckart and Young: the error is what the singular values beyond r hold; A and B share the values evenly."""
    w = weight(n, k)
    a, b = principal_factors(w, R, 2.0, iterations)
    values = torch.linalg.svdvals(w)
    error = (w - 2.0 * b @ a).norm()
    torch.testing.assert_close(error, values[R:].square().sum().sqrt(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(a.norm(dim=1)[: len(values)], b.norm(dim=0)[: len(values)], rtol=1e-3, atol=1e-5)


def test_names_of_initialisations():
    assert pissa_iterations("pissa") == 0
    assert pissa_iterations("pissa_niter_4") == 4
    for other in (True, False, "gaussian", "pissa_niter_", "pissa_niter_x", "xpissa", "loftq"):
        assert pissa_iterations(other) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pissa_starts_as_the_base_and_is_the_authors_formula(dtype):
    base = linear(dtype)
    layer = PrincipalLoRALinear.decompose(base, r=R, lora_alpha=8, lora_dropout=0.3).train()
    x = torch.randn(5, 64).to(dtype)
    torch.testing.assert_close(layer(x), base(x), rtol=2e-2, atol=1e-4 if dtype == torch.float32 else 5e-2)
    a0, b0 = layer.lora_A.detach().double(), layer.lora_B.detach().double()
    with torch.no_grad():
        layer.lora_A += 0.1 * torch.randn_like(layer.lora_A)
        layer.lora_B += 0.1 * torch.randn_like(layer.lora_B)
    residual = base.weight.double() - 2.0 * b0 @ a0
    layer.eval()
    exact = x.double() @ (residual + 2.0 * layer.lora_B.double() @ layer.lora_A.double()).t() + base.bias.double()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (layer(x).double() - exact).norm() <= tolerance * exact.norm()
    layer.merge()
    assert (layer(x).double() - exact).norm() <= tolerance * exact.norm()
    layer.unmerge()
    assert layer.weight is base.weight
    merged = layer.to_linear()(x)
    assert (merged.double() - exact).norm() <= tolerance * exact.norm()


def test_pissa_trains_its_factors_alone():
    layer = PrincipalLoRALinear.decompose(linear(), r=R)
    before = layer.initial_a.clone()
    layer(torch.randn(6, 64)).square().mean().backward()
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    assert layer.lora_A.grad.norm() > 0
    assert layer.lora_B.grad.norm() > 0
    assert layer.weight.grad is None
    assert torch.equal(layer.initial_a, before)


def independent_loftq(w, r, scaling, iterations):
    """Algorithm 1 of the paper with an NF4 that looks every element up."""
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float64)

    def q(m):
        blocks = m.reshape(-1, 64)
        absmax = blocks.abs().amax(1, keepdim=True)
        return (levels[((blocks / absmax)[..., None] - levels).abs().argmin(-1)] * absmax).view_as(m)

    w, low_rank = w.double(), torch.zeros_like(w, dtype=torch.float64)
    for _ in range(iterations):
        quantised = q(w - low_rank)
        u, s, vh = torch.linalg.svd(w - quantised, full_matrices=False)
        low_rank = (u[:, :r] * s[:r]) @ vh[:r]
    return quantised, low_rank


@pytest.mark.parametrize("iterations", [1, 5])
@pytest.mark.parametrize("scaling", [1.0, 2.0])
def test_loftq_is_the_authors_algorithm_and_closer_than_nf4(iterations, scaling):
    w = weight(24, 128)
    quantised, a, b = loftq(w, R, scaling, iterations, 64, False)
    q, low_rank = independent_loftq(w, R, scaling, iterations)
    ours = peft_ops.nf4.dequantize(quantised, torch.float32).double() + scaling * (b @ a).double()
    error, theirs = (ours - w).norm(), (q + low_rank - w).norm()
    plain = (peft_ops.nf4.dequantize(peft_ops.nf4.quantize(w)).double() - w).norm()
    torch.testing.assert_close(error, theirs, rtol=1e-3, atol=0)
    assert error < 0.9 * plain
    assert iterations == 1 or error < (independent_loftq(w, R, scaling, 1)[0] - w).norm()


@pytest.mark.parametrize("pissa", [None, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_4_bit_base_is_what_the_factors_leave(dtype, pissa):
    base = linear(dtype)
    layer = ResidualNF4LoRALinear.quantize(base, r=R, lora_alpha=8, pissa_iterations=pissa, loftq_iterations=3)
    w = base.weight.double()
    start = peft_ops.nf4.dequantize(layer.weight, torch.float32).double() + 2.0 * (layer.lora_B @ layer.lora_A).double()
    plain = (peft_ops.nf4.dequantize(peft_ops.nf4.quantize(base.weight)).double() - w).norm()
    assert (start - w).norm() < plain
    assert layer.weight.dtype == dtype
    x = torch.randn(5, 64).to(dtype)
    exact = x.double() @ start.t() + base.bias.double()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (layer(x).double() - exact).norm() <= tolerance * exact.norm()
    with torch.no_grad():
        layer.lora_B.zero_()
    layer.adapter_enabled = False  # the model before training, not the residual alone
    assert (layer(x).double() - exact).norm() <= tolerance * exact.norm()


# In models


def adapted(config):
    return peft_ops.adapt(llama(), config)


def pissa(**fields):
    return peft_ops.LoRAConfig(r=R, lora_alpha=8, target_modules="all-linear", init_lora_weights="pissa", **fields)


def loftq_config(**fields):
    return peft_ops.QLoRAConfig(r=R, target_modules="all-linear", init_lora_weights="loftq", loftq_iter=2, **fields)


def qpissa():
    return peft_ops.QLoRAConfig(r=R, target_modules="all-linear", init_lora_weights="pissa_niter_16")


def test_models_start_as_their_base():
    base = logits(llama())
    torch.testing.assert_close(logits(adapted(pissa())), base, rtol=1e-4, atol=1e-4)
    plain = (logits(adapted(peft_ops.QLoRAConfig(r=R, target_modules="all-linear"))) - base).norm()
    for config in (loftq_config(), qpissa()):
        model = adapted(config)
        start = logits(model)
        assert (start - base).norm() < plain
        train(model)
        assert not torch.equal(logits(model), start)
        with peft_ops.adapters_disabled(model):
            torch.testing.assert_close(logits(model), start, rtol=1e-4, atol=1e-4)


def test_pissa_is_pefts(tmp_path):
    """The same function and the same gradient steps as PEFT's, which changes the base weights."""
    theirs = peft.get_peft_model(
        llama(),
        peft.LoraConfig(
            r=R, lora_alpha=8, target_modules="all-linear", init_lora_weights="pissa", task_type="CAUSAL_LM"
        ),
    )
    ours = adapted(pissa(task_type="CAUSAL_LM"))
    for _ in range(3):
        for model in (theirs, ours):
            model.train()
            model(input_ids=tokens(), labels=tokens()).loss.backward()
            with torch.no_grad():
                for p in model.parameters():
                    if p.grad is not None:
                        p -= 0.05 * p.grad
                        p.grad = None
    theirs.eval()
    with torch.no_grad():
        expected = theirs(input_ids=tokens()).logits
    torch.testing.assert_close(logits(ours.eval()), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("config", [pissa(), pissa(use_rslora=True, rank_pattern={"q_proj": 2})])
def test_peft_loads_it_over_the_untouched_base(config, tmp_path):
    model = adapted(config)
    train(model)
    peft_ops.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=tokens()).logits, logits(model), rtol=1e-3, atol=1e-3)
    plain = peft_ops.load_adapter(llama(), tmp_path)  # of rank 2 r
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-3, atol=1e-3)
    merged = peft_ops.merge(adapted_and_loaded(config, tmp_path))
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-3, atol=1e-3)


def adapted_and_loaded(config, folder):
    return peft_ops.load_adapter(adapted(config), folder)


@pytest.mark.parametrize("config", [pissa(), loftq_config(), qpissa()])
def test_training_goes_on_to_the_bit(config, tmp_path):
    model = adapted(config)
    train(model)
    peft_ops.save_adapter(model, tmp_path)
    again = adapted_and_loaded(config, tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert train(again) == train(model)


def test_bad_input(tmp_path):
    for fields, message in (
        ({"init_lora_weights": "loftq"}, "use a QLoRAConfig"),
        ({"init_lora_weights": "pissa", "use_dora": True}, "cannot be used with use_dora"),
        ({"init_lora_weights": "pissa_niter_x"}, "init_lora_weights must be"),
    ):
        with pytest.raises(ValueError, match=message):
            peft_ops.LoRAConfig(**fields)
    with pytest.raises(ValueError, match="loftq_iter must be at least 1"):
        peft_ops.QLoRAConfig(loftq_iter=0)
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    before = snapshot(model)
    with pytest.raises(ValueError, match="up_proj.weight holds NaN or infinite values and cannot be decomposed"):
        peft_ops.adapt(model, pissa())
    with pytest.raises(ValueError, match="decomposes dense weights"):
        peft_ops.adapt(model, peft_ops.LoRAConfig(target_modules=["embed_tokens"], init_lora_weights="pissa"))
    assert before["types"] == snapshot(model)["types"]
    peft_ops.save_adapter(adapted(peft_ops.LoRAConfig(r=R, lora_alpha=8, target_modules="all-linear")), tmp_path)
    with pytest.raises(ValueError, match="does not go on from init_lora_weights='pissa'"):
        peft_ops.load_adapter(adapted(pissa()), tmp_path)
    peft_ops.save_adapter(adapted(loftq_config()), tmp_path)
    other = llama()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.1).add_(0.05)
    with pytest.raises(ValueError, match="made on another base: model.layers.0.mlp.up_proj"):
        peft_ops.load_adapter(peft_ops.adapt(other, loftq_config()), tmp_path)
