"""The loss over a large vocabulary: of hidden states where that is the same, of logits elsewhere."""

import pytest
import tiny_models
import torch

import peft_ops
from peft_ops.cli import loss
from peft_ops.cli.data import IGNORED, Sequences


@pytest.fixture(autouse=True)
def large(monkeypatch):
    """Vocabularies of 64 count as large."""
    monkeypatch.setattr(loss, "_SMALL", 8)


def sequences():
    tokens = torch.randint(64, (3, 12))
    labels = tokens.roll(-1, 1)
    labels[0, :5] = labels[2] = IGNORED
    return Sequences(tokens, labels)


MODELS = {
    "Llama, LoRA": lambda: peft_ops.adapt(tiny_models.llama(), peft_ops.LoRAConfig(r=2, target_modules="all-linear")),
    "Llama, LoRA on the head": lambda: peft_ops.adapt(
        tiny_models.llama(), peft_ops.LoRAConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    ),
    "Llama, all of it": lambda: peft_ops.adapt(tiny_models.llama(), peft_ops.FullConfig()),
    "Llama, prompt": lambda: peft_ops.adapt(
        tiny_models.llama(), peft_ops.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    ),
    "GPT-2": lambda: peft_ops.adapt(tiny_models.gpt2(), peft_ops.LoRAConfig(r=2, target_modules=["c_attn"])),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_it_is_the_loss_of_the_logits(kind, monkeypatch):
    model, data = MODELS[kind]().eval(), sequences()
    assert loss.loss_of_hidden_states(model)
    assert not model.training
    ours = loss.loss_sum(model, data, torch.float32)
    monkeypatch.setitem(loss._fits, model, False)
    theirs = loss.loss_sum(model, data, torch.float32)
    torch.testing.assert_close(ours, theirs)
    trained = [p for p in model.parameters() if p.requires_grad]
    for g, h in zip(*(torch.autograd.grad(t, trained) for t in (ours, theirs)), strict=True):
        torch.testing.assert_close(g, h, rtol=1e-3, atol=1e-4)


def test_a_model_that_does_more_keeps_its_logits():
    """Logits that are not those of the head and the config, a head that the op does not take, a small vocabulary."""
    odd = tiny_models.llama()
    odd.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    assert not loss.loss_of_hidden_states(odd)
    config = peft_ops.LoRAConfig(r=2, target_modules=["lm_head"], use_dora=True)
    assert not loss.loss_of_hidden_states(peft_ops.adapt(tiny_models.llama(), config))
    loss._SMALL = 64
    assert not loss.loss_of_hidden_states(tiny_models.llama())
    assert loss.loss_sum(odd, sequences(), torch.float32).isfinite()


def test_nothing_as_wide_as_the_vocabulary_is_kept():
    from peft_ops.cli.measure import saved_for_backward

    model, data = MODELS["Llama, LoRA"](), sequences()
    ours = saved_for_backward(model, data, torch.float32)
    loss._fits[model] = False
    assert ours <= saved_for_backward(model, data, torch.float32) - 3 * 12 * 64 * 4 + 3 * 12 * 32 * 4
