"""The reference policy in the policy's model: it computes the base or a frozen adapter, and all is as before."""

import pytest
import torch
from tiny_models import assert_as_it_was, bert, llama, logits, snapshot, tokens, train

import peft_ops
from peft_ops import LoRAConfig, QLoRAConfig
from peft_ops.nn import head_of
from peft_ops.rlhf import DPOLoss, completion_log_probs, freeze_adapter_copy, reference_policy

CONFIG = LoRAConfig(
    r=4, lora_dropout=0.5, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
)
PLAIN = LoRAConfig(r=4, lora_dropout=0.5, target_modules=["q_proj", "down_proj", "embed_tokens"])


def trained(config, model=None):
    torch.manual_seed(3)
    model = peft_ops.adapt(model or llama(), config)
    train(model)
    return model


@pytest.mark.parametrize("config", [CONFIG, PLAIN], ids=["modules_to_save", "embedding"])
def test_the_base_without_dropout_or_gradient(config):
    model, base = trained(config), logits(llama())
    model.train()
    model.model.layers[1].eval()  # a mode of its own
    next(model.parameters()).requires_grad_(True)  # a flag of its own
    before = snapshot(model)
    with reference_policy(model) as reference:
        assert reference is model
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        assert torch.equal(model(tokens()).logits, base)
        with reference_policy(model):
            assert torch.equal(model(tokens()).logits, base)
        assert torch.equal(model(tokens()).logits, base)
    assert_as_it_was(model, before)
    assert torch.is_grad_enabled()
    model.eval()
    assert not torch.equal(logits(model), base)


@pytest.mark.parametrize("config", [CONFIG, PLAIN], ids=["modules_to_save", "embedding"])
def test_a_frozen_copy_stays_while_the_adapter_goes_on(config):
    model = trained(config)
    start, before = logits(model), snapshot(model)
    freeze_adapter_copy(model, "reference")
    before["attributes"].add("_peft_ops_named")
    assert_as_it_was(model, before)
    assert peft_ops.adapter_names(model) == ["default", "reference"]
    trainable = peft_ops.trainable_parameters(model)
    train(model)
    now = logits(model)
    assert not torch.equal(now, start)
    model.train()
    before = snapshot(model)
    with reference_policy(model, "reference"):
        assert not any(module.training for module in model.modules())
        assert torch.equal(model(tokens()).logits, start)
    assert_as_it_was(model, before)
    assert torch.equal(logits(model.eval()), now)
    with reference_policy(model):
        assert torch.equal(model(tokens()).logits, logits(llama()))
    peft_ops.set_adapter(model, "reference")
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(logits(model), start)
    peft_ops.set_adapter(model, "default")
    assert peft_ops.trainable_parameters(model) == trainable


@pytest.mark.parametrize("double", [False, True])
def test_a_frozen_copy_over_4_bits_shares_the_base(double, tmp_path):
    model = trained(QLoRAConfig(r=2, target_modules=["q_proj", "v_proj"], blocksize=32, double_quant=double))
    start = logits(model)
    freeze_adapter_copy(model, "reference")
    packed = model.model.layers[0].self_attn.q_proj.packed
    train(model)
    with reference_policy(model, "reference"):
        assert model.model.layers[0].self_attn.q_proj.packed is packed
        assert torch.equal(model(tokens()).logits, start)
    peft_ops.save_adapter(model, tmp_path, adapter_name="reference")
    peft_ops.delete_adapter(model, "reference")
    assert peft_ops.adapter_names(model) == ["default"]


def test_dora_and_pissa_are_copied_whole():
    for changes in (dict(use_dora=True), dict(init_lora_weights="pissa")):
        model = trained(LoRAConfig(r=2, target_modules=["q_proj"], **changes))
        start = logits(model)
        freeze_adapter_copy(model, "reference")
        train(model)
        with reference_policy(model, "reference"):
            assert torch.equal(model(tokens()).logits, start)


def test_all_is_restored_after_an_error():
    model = trained(CONFIG)
    freeze_adapter_copy(model, "reference")
    model.train()
    for adapter in (None, "reference"):
        before, active = snapshot(model), peft_ops.adapter_names(model)
        with pytest.raises(RuntimeError, match="inside"), reference_policy(model, adapter):
            raise RuntimeError("inside")
        assert_as_it_was(model, before)
        assert peft_ops.adapter_names(model) == active
        assert torch.is_grad_enabled()


def test_prompts_and_adapters_in_blocks_have_a_base_too():
    for config in (peft_ops.PromptTuningConfig(num_virtual_tokens=3), peft_ops.AdapterConfig(task_type="CAUSAL_LM")):
        model = peft_ops.adapt(llama(), config)
        train(model)
        with reference_policy(model):
            assert torch.equal(model(tokens()).logits, logits(llama()))
        with pytest.raises(ValueError, match="takes no second adapter"):
            freeze_adapter_copy(model, "reference")


def test_dpo_of_a_model_against_its_base():
    """Hidden states of policy and reference, one pass of the head: the loss from both models' logits."""
    model, ids = trained(PLAIN), tokens(4)
    targets = ids[:, 1:].clone()
    targets[:, :3] = -100

    def hidden():
        return model.model(ids).last_hidden_state[:, :-1]

    with reference_policy(model):
        reference_hidden = hidden()
        head = head_of(model)
        reference_logp = completion_log_probs(head, reference_hidden, targets).logp
    out = DPOLoss()(head_of(model), hidden(), targets, reference_hidden)
    torch.testing.assert_close(out.loss, DPOLoss()(head_of(model), hidden(), targets, None, reference_logp).loss)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    at_start = peft_ops.adapt(llama(), LoRAConfig(r=2, target_modules=["q_proj"]))
    states = at_start.model(ids).last_hidden_state[:, :-1]
    with reference_policy(at_start):
        same = at_start.model(ids).last_hidden_state[:, :-1]
    loss = DPOLoss()(head_of(at_start), states, targets, same).loss
    torch.testing.assert_close(loss, torch.tensor(2.0).log())


def test_bad_input():
    for act, message in (
        (lambda: reference_policy(llama()).__enter__(), "has no adapters to disable"),
        (lambda: reference_policy(peft_ops.adapt(llama(), peft_ops.FullConfig())).__enter__(), "keeps no copy"),
        (lambda: reference_policy(trained(PLAIN), "x").__enter__(), "no adapter is called 'x'; there are: default"),
        (lambda: freeze_adapter_copy(trained(PLAIN), "default"), "'default' exists already"),
        (lambda: freeze_adapter_copy(trained(PLAIN), "a.b"), "must be a string without dots"),
        (lambda: freeze_adapter_copy(bert(), "x"), "is not adapted"),
    ):
        with pytest.raises(ValueError, match=message):
            act()
        assert torch.is_grad_enabled()
    model = trained(PLAIN)
    with peft_ops.adapters_disabled(model), pytest.raises(ValueError, match="adapters are disabled"):
        freeze_adapter_copy(model, "x")
