"""TRL's trainers on models that we adapted: they train, on exact log-probs, against the base as the reference."""

import copy
import math
import re
import runpy
from pathlib import Path

import pytest
import torch
import transformers

import peft_ops

pytest.importorskip("trl")  # needs Python >= 3.11

from trl.trainer.utils import add_fused_lm_head

from peft_ops.rlhf.trl import ReferenceModel, remove_fused_head, use_fused_head, use_reference

ROOT = Path(__file__).parents[1]
EXAMPLE = runpy.run_path(str(ROOT / "examples" / "train_with_trl.py"))
tiny, make = EXAMPLE["tiny"], EXAMPLE["make"]
LORA = peft_ops.LoRAConfig(r=4, target_modules=["q_proj", "v_proj"])
WITH_HEAD = peft_ops.LoRAConfig(r=4, target_modules=["q_proj", "lm_head"])
WHOLE = peft_ops.LoRAConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
QLORA = peft_ops.QLoRAConfig(r=4, target_modules="all-linear")
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def small(family="Llama", **changes):
    config = getattr(transformers, f"{family}Config")(vocab_size=61, initializer_range=0.3, **SMALL, **changes)
    torch.manual_seed(1)
    return getattr(transformers, f"{family}ForCausalLM")(config)


def trained(model):
    """The adapter's B as after some steps: at its start it adds nothing."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


def adapted(model, config=WITH_HEAD):
    return trained(peft_ops.adapt(model, config))


def batch(n=61):
    tokens = torch.randint(n, (3, 12), generator=torch.Generator().manual_seed(3))
    labels = tokens.clone()
    labels[0, :7] = labels[1, :3] = labels[1, -2:] = -100
    return tokens, labels


def scores(model, temperature=1.0):
    """Every output, of materialised logits."""
    tokens, labels = batch()
    z = model(input_ids=tokens).logits[:, :-1].float() / temperature
    mask = labels[:, 1:] != -100
    target = labels[:, 1:].clamp(min=0)
    logp = z.log_softmax(-1)
    found = {
        "log_probs": logp.gather(-1, target[..., None])[..., 0],
        "entropy": -(logp.exp() * logp).sum(-1),
        "mean_logits": z.mean(-1),
        "is_top1": logp.argmax(-1) == target,
        "log_sum_sq_probs": logp.exp().square().sum(-1).log(),
    }
    return {**{name: v.masked_fill(~mask, 0) for name, v in found.items()}, "label_mask": mask}


def fused(model):
    tokens, labels = batch()
    return model(input_ids=tokens, labels=labels, fused_lm_head=True)


def gradients(model):
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def backward(model, log_probs):
    model.zero_grad()
    (log_probs * torch.randn(log_probs.shape, generator=torch.Generator().manual_seed(4))).sum().backward()
    return {name: gradient.clone() for name, gradient in gradients(model).items()}


# The heads.


def frozen():
    return adapted(small(), LORA)


def nf4_head(config=LORA):
    model = small()
    model.lm_head = peft_ops.nn.NF4Linear.from_linear(model.lm_head)
    return adapted(model, config)


HEADS = {
    "frozen": frozen,
    "LoRA": lambda: adapted(small()),
    "LoRA, tied": lambda: adapted(small(tie_word_embeddings=True)),
    "NF4": nf4_head,
    "LoRA over NF4": lambda: nf4_head(WITH_HEAD),
    "trained whole": lambda: adapted(small(), WHOLE),
    "LoRA, softcap": lambda: adapted(small("Gemma2", final_logit_softcapping=2.0, head_dim=8)),
    "LoRA, logits divided": lambda: adapted(small("Granite", logits_scaling=4.0)),
    "LoRA, logits multiplied": lambda: adapted(small("Cohere", logit_scale=0.3)),
    "prompt tuning": lambda: peft_ops.adapt(
        small(), peft_ops.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    ),
}  # fmt: skip


@pytest.mark.parametrize("head", HEADS)
def test_outputs_and_gradients_are_those_of_materialised_logits(head):
    model = HEADS[head]()
    expected = scores(model, temperature=0.7)
    expected_gradients = backward(model, expected["log_probs"])
    use_fused_head(model, temperature=0.7, outputs=("entropy", "mean_logits", "is_top1", "log_sum_sq_probs"))
    out = fused(model)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(out, name), value, rtol=1e-4, atol=1e-5, msg=name)
    count = expected["label_mask"].sum()
    torch.testing.assert_close(out.loss, -expected["log_probs"].sum() / count, rtol=1e-4, atol=1e-5)
    found = backward(model, out.log_probs)
    assert found.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert gradient.norm() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_trls_own_head_agrees_where_it_is_right():
    model = frozen()
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy", "is_top1", "mean_logits"))
    theirs = fused(model)
    their_gradients = backward(model, theirs.log_probs)
    use_fused_head(model, temperature=0.7, outputs=("log_probs", "entropy", "is_top1", "mean_logits"))
    ours = fused(model)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5, msg=name)
    for name, gradient in backward(model, ours.log_probs).items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-3, atol=1e-5, msg=name)


def test_trls_own_head_leaves_an_adapter_on_it_out():
    """Why this module is there. TRL refuses PEFT's models with such a head; ours it cannot tell from others."""
    model = adapted(small())
    expected = scores(model)["log_probs"]
    add_fused_lm_head(model)
    theirs = fused(model).log_probs
    theirs.sum().backward()
    assert (theirs - expected).abs().max() > 0.9
    assert model.lm_head.lora_B.grad is None
    model.zero_grad()

    use_fused_head(model)
    ours = fused(model).log_probs
    ours.sum().backward()
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert model.lm_head.lora_B.grad.norm() > 0
    assert model.lm_head.weight.grad is None


def test_trls_own_head_fails_on_four_bits():
    model = nf4_head()
    add_fused_lm_head(model)
    with pytest.raises(TypeError, match="not subscriptable"):
        fused(model)
    use_fused_head(model)
    torch.testing.assert_close(fused(model).log_probs, scores(model)["log_probs"], rtol=1e-4, atol=1e-5)


def test_a_batch_without_labels_gives_a_zero_that_can_go_backward():
    model = use_fused_head(adapted(small()), outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    tokens, _ = batch()
    out = model(input_ids=tokens, labels=torch.full_like(tokens, -100), fused_lm_head=True)
    out.loss.backward()
    assert all(not v.any() for v in (out.loss, out.log_probs, out.entropy, out.mean_logits, out.is_top1))
    assert all(g is not None and not g.any() for g in gradients(model).values())


def test_shifted_labels_and_a_given_count():
    model = use_fused_head(adapted(small()))
    tokens, labels = batch()
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    out = model(input_ids=tokens, shift_labels=shifted, num_items_in_batch=10, fused_lm_head=True)
    assert torch.equal(out.log_probs[:, :-1], fused(model).log_probs)
    assert not out.log_probs[:, -1].any()
    torch.testing.assert_close(out.loss, -out.log_probs.sum() / 10)
    with pytest.raises(ValueError, match="needs labels"):
        model(input_ids=tokens, fused_lm_head=True)


def test_the_router_loss_of_a_mixture_is_the_models():
    model = small("Mixtral", num_local_experts=4, output_router_logits=True)
    peft_ops.adapt(model, LORA)
    tokens, labels = batch()
    expected = model(input_ids=tokens, labels=labels)
    out = fused(use_fused_head(model))
    torch.testing.assert_close(out.aux_loss, expected.aux_loss)
    torch.testing.assert_close(out.loss, expected.loss)


def test_other_calls_are_left_alone_and_it_comes_out_again():
    model = adapted(small()).eval()
    tokens, labels = batch()
    expected = model(input_ids=tokens, labels=labels)
    text = model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
    add_fused_lm_head(model)
    theirs = model.forward
    for _ in range(2):
        assert use_fused_head(model) is model
    assert model.forward.previous == theirs
    out = model(input_ids=tokens, labels=labels)
    assert torch.equal(out.logits, expected.logits)
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0), text)
    assert remove_fused_head(model).forward == theirs
    with pytest.raises(ValueError, match="not one of use_fused_head"):
        remove_fused_head(model)


def test_a_copy_scores_with_its_own_weights():
    model = use_fused_head(adapted(small()).eval())
    before = fused(model).log_probs.detach()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(fused(twin).log_probs, before)
    assert torch.equal(twin(batch()[0]).logits, remove_fused_head(twin)(batch()[0]).logits)


def test_the_head_is_read_at_each_call():
    model = use_fused_head(adapted(small()))
    with peft_ops.adapters_disabled(model):
        torch.testing.assert_close(fused(model).log_probs, scores(small())["log_probs"], rtol=1e-4, atol=1e-5)
    merged = peft_ops.merge(model)
    torch.testing.assert_close(fused(merged).log_probs, scores(merged)["log_probs"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=["DoRA", "PiSSA"])
def test_a_head_that_is_no_low_rank_term_is_refused(change):
    config = peft_ops.LoRAConfig(r=4, target_modules=["q_proj", "lm_head"], **change)
    model = peft_ops.adapt(small(), config)
    with pytest.raises(TypeError, match="output head"):
        use_fused_head(model)
    assert "forward" not in vars(model)


# The reference.


def test_the_reference_is_the_base_and_leaves_the_model_as_it_was():
    policy = adapted(small(), peft_ops.LoRAConfig(r=4, lora_dropout=0.5, target_modules=["q_proj", "lm_head"])).train()
    policy.model.layers[0].eval()
    modes = {name: module.training for name, module in policy.named_modules()}
    use_fused_head(policy)
    reference = ReferenceModel(policy)
    out = fused(reference)
    torch.testing.assert_close(out.log_probs, scores(small())["log_probs"], rtol=1e-4, atol=1e-5)
    assert not out.log_probs.requires_grad
    assert torch.equal(reference(batch()[0]).logits, small()(batch()[0]).logits)
    assert modes == {name: module.training for name, module in policy.named_modules()}
    assert not list(reference.parameters())
    assert list(reference.modules()) == [reference]
    assert reference.to("cpu").eval() is reference
    assert (scores(policy)["log_probs"] - out.log_probs).abs().max() > 0.1
    assert torch.equal(reference.state_dict()["lm_head.weight"], policy.lm_head.weight)

    with pytest.raises(ValueError, match="input_ids"):
        reference()
    assert modes == {name: module.training for name, module in policy.named_modules()}
    assert policy.lm_head.adapter_enabled


def test_without_a_base_there_is_no_reference():
    with pytest.raises(ValueError, match="no adapters"):
        ReferenceModel(small())
    with pytest.raises(ValueError, match="keeps no copy"):
        ReferenceModel(peft_ops.adapt(small(), peft_ops.FullConfig()))


def log_probs_of_a_batch(trainer, model):
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    out = model(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels, fused_lm_head=True
    )
    return out.log_probs.detach()


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_trainers_reference_is_the_base(kind, tmp_path):
    trainer = make(kind, peft_ops.adapt(tiny(), WITH_HEAD), str(tmp_path), max_steps=2, data_seed=1)
    trainer.train()
    base = use_fused_head(tiny().eval())
    torch.manual_seed(5)
    expected = log_probs_of_a_batch(trainer, base)
    torch.manual_seed(5)
    torch.testing.assert_close(log_probs_of_a_batch(trainer, trainer.ref_model), expected, rtol=1e-4, atol=1e-5)
    torch.manual_seed(5)
    assert not torch.allclose(log_probs_of_a_batch(trainer, trainer.model.eval()), expected, rtol=1e-4, atol=1e-5)


def test_precomputed_references_are_those_of_their_model(tmp_path):
    """TRL keeps them in a file named after a hash of the reference."""

    def reference_of(seed):
        model = tiny()
        with torch.no_grad():
            torch.manual_seed(seed)
            model.lm_head.weight.normal_(std=0.3)
        trainer = make("dpo", peft_ops.adapt(model, LORA), str(tmp_path), max_steps=1, precompute_ref_log_probs=True)
        return torch.tensor(trainer.train_dataset["ref_chosen_logps"])

    assert (reference_of(1) - reference_of(2)).abs().max() > 1


# The trainers.

KINDS = ("sft", "dpo", "kto", "grpo")


def assert_it_trains(kind, model, base, out, **settings):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    trainer = make(kind, model, out, **{"max_steps": 3, **settings})
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert all(math.isfinite(loss) for loss in losses)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in learns), name
    with peft_ops.adapters_disabled(model):
        assert torch.equal(base_logits(model), base)
    return trainer


def base_logits(model):
    with torch.no_grad():
        return model.eval()(batch(256)[0]).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [LORA, WITH_HEAD, QLORA], ids=["LoRA", "LoRA with lm_head", "QLoRA"])
def test_it_trains(kind, config, tmp_path):
    model = peft_ops.adapt(tiny(), config)
    with peft_ops.adapters_disabled(model):
        base = base_logits(model)
    trainer = assert_it_trains(kind, model, base, str(tmp_path))
    if kind == "grpo":
        assert trainer.state.log_history[2]["kl"] > 0
        assert trainer.ref_model.policy is model


@pytest.mark.parametrize("config", [
    peft_ops.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    peft_ops.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    peft_ops.AdapterConfig.pfeiffer(bottleneck=4),
], ids=["prompt tuning", "prefix-tuning", "adapters"])  # fmt: skip
def test_other_methods_train_too(config, tmp_path):
    base = base_logits(tiny())
    model = peft_ops.adapt(tiny(), config)
    assert_it_trains("dpo", model, base, str(tmp_path))


def test_a_reward_model_trains(tmp_path):
    model = tiny(transformers.LlamaForSequenceClassification, num_labels=1)
    base = base_logits(model)
    config = peft_ops.LoRAConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")
    model = peft_ops.adapt(model, config)
    trainer = assert_it_trains("reward", model, base, str(tmp_path))
    with pytest.raises(ValueError, match="RewardTrainer is not known to read log-probs"):
        use_fused_head(trainer)


@pytest.mark.parametrize("reentrant", [False, True])
def test_grpo_generates_and_trains_under_checkpointing(reentrant, tmp_path):
    def gradient_norms(**settings):
        torch.manual_seed(0)
        trainer = make("grpo", adapted(tiny()), str(tmp_path), max_steps=2, **settings)
        trainer.train()
        on = any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules())
        assert on == settings["gradient_checkpointing"]  # after generation too
        return [entry["grad_norm"] for entry in trainer.state.log_history[:2]]

    settings = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    norms = gradient_norms(**settings)
    assert norms[0] > 0
    assert norms == pytest.approx(gradient_norms(gradient_checkpointing=False), rel=1e-3)


def test_autocast_wraps_our_forward(tmp_path):
    model = peft_ops.adapt(tiny(), WITH_HEAD)
    trainer = make("dpo", model, str(tmp_path), max_steps=2, bf16=True)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["rewards/margins"] == 0  # the reference is computed in the same precision
    assert first["grad_norm"] > 0
    with pytest.raises(ValueError, match="wrapped since"):
        remove_fused_head(trainer)


def test_a_checkpoint_of_trainer_is_gone_on_with(tmp_path):
    def run(resume, **settings):
        trainer = make("sft", peft_ops.adapt(tiny(), WITH_HEAD), str(tmp_path), max_steps=4, **settings)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.state_dict()

    whole = run(None, save_strategy="steps", save_steps=2)
    again = run(str(tmp_path / "checkpoint-2"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, again[name]), name


# What is refused.


def trainer_of(kind, tmp_path, config=LORA, **settings):
    return EXAMPLE["bare"](kind, peft_ops.adapt(tiny(), config), str(tmp_path), **settings)


def test_arguments_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="'logits'.* not known"):
        use_fused_head(small(), outputs=("log_probs", "logits"))
    with pytest.raises(ValueError, match="temperature must be positive"):
        use_fused_head(small(), temperature=0.0)
    sft, grpo = trainer_of("sft", tmp_path), trainer_of("grpo", tmp_path)
    with pytest.raises(ValueError, match="SFTTrainer has no reference"):
        use_reference(sft)
    with pytest.raises(ValueError, match="beta is 0"):
        use_reference(grpo)
    grpo.args.sync_ref_model = True
    with pytest.raises(ValueError, match="weights of its own"):
        use_reference(grpo, beta=0.1)


def test_a_float32_head_of_trl_leaves_an_adapter_out(tmp_path):
    with pytest.raises(ValueError, match="leaves its adapter out"):
        use_fused_head(trainer_of("grpo", tmp_path, WITH_HEAD, cast_lm_head_to_fp32=True))
    trainer = use_fused_head(trainer_of("grpo", tmp_path, LORA, cast_lm_head_to_fp32=True, max_steps=1))
    trainer.train()


def test_the_trainer_gives_temperature_and_outputs(tmp_path):
    for kind, outputs in (
        ("sft", {"is_top1"}),
        ("dpo", {"is_top1", "mean_logits", "log_sum_sq_probs"}),
        ("grpo", set()),
    ):
        settings = {"use_weighting": True} if kind == "dpo" else {}
        forward = use_fused_head(trainer_of(kind, tmp_path, **settings)).model.forward
        assert set(forward.outputs) == {"log_probs", "entropy"} | outputs
        assert forward.temperature == (0.9 if kind == "grpo" else 1.0)


def test_an_entropy_bonus_trains(tmp_path):
    trainer = use_fused_head(trainer_of("grpo", tmp_path, entropy_coef=0.1, max_steps=1))
    assert trainer.model.forward.entropy_bonus
    trainer.train()
    entropy = fused(trainer.model).entropy
    entropy.sum().backward()
    assert entropy.requires_grad
    assert trainer.model.model.layers[0].self_attn.q_proj.lora_B.grad.norm() > 0


def test_dropout_of_adapters_that_trl_does_not_reach_is_said(tmp_path):
    config = peft_ops.LoRAConfig(r=4, target_modules=["q_proj"], lora_dropout=0.1)
    trainer = trainer_of("dpo", tmp_path, config)
    with pytest.warns(UserWarning, match="not lora_dropout"):
        use_fused_head(trainer)


def test_the_example_runs_and_its_adapter_loads(tmp_path, capsys):
    losses = EXAMPLE["main"]("sft", str(tmp_path / "adapter"), steps=8)
    assert losses[-1] < losses[0] - 0.1
    assert "adapter saved" in capsys.readouterr().out
    model = peft_ops.load_adapter(tiny(), tmp_path / "adapter")
    assert model.lm_head.lora_B.any()


def test_the_pages_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "trl.md").read_text(), re.M | re.S):
        exec(compile(block, "docs/trl.md", "exec"), namespace)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
