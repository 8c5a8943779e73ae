"""What holds for every method on every kind of model: it trains, it checkpoints, it saves and goes on, it copies."""

import copy
import pickle

import pytest
import tiny_models
import torch
from tiny_models import TASKS, tokens

import peft_ops

# {method: its config for a task}; the models are BERT (classification), a Llama with grouped queries, T5.
METHODS = {
    "full": lambda task: peft_ops.FullConfig(task_type=task),
    "top layer": lambda task: peft_ops.PartialConfig(num_top_layers=1, task_type=task),
    "bottom frozen": lambda task: peft_ops.PartialConfig(frozen_bottom_layers=1, task_type=task),
    "prompt tuning": lambda task: peft_ops.PromptTuningConfig(num_virtual_tokens=3, task_type=task),
    "P-tuning": lambda task: peft_ops.PTuningConfig(num_virtual_tokens=3, task_type=task),
    "prefix-tuning": lambda task: peft_ops.PrefixTuningConfig(num_virtual_tokens=3, task_type=task),
    "prefix-tuning, projected": lambda task: peft_ops.PrefixTuningConfig(
        num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8, task_type=task
    ),
    "P-tuning v2": lambda task: peft_ops.PTuningV2Config(num_virtual_tokens=3, dropout=0.1, task_type=task),
    "LoRA": lambda task: peft_ops.LoRAConfig(r=4, lora_dropout=0.1, target_modules="all-linear", task_type=task),
    "LoRA, embeddings too": lambda task: peft_ops.LoRAConfig(
        r=4, target_modules=["word_embeddings", "embed_tokens", "q_proj", "query", "q"], task_type=task
    ),
    "DoRA": lambda task: peft_ops.LoRAConfig(
        r=4, lora_dropout=0.1, target_modules="all-linear", use_dora=True, task_type=task
    ),
    "QLoRA with DoRA": lambda task: peft_ops.QLoRAConfig(
        r=4, target_modules="all-linear", use_dora=True, task_type=task
    ),
    "QLoRA": lambda task: peft_ops.QLoRAConfig(r=4, target_modules="all-linear", task_type=task),
}
IN_PLACE = ("full", "top layer", "bottom frozen")  # no copy of the base is kept
MODELS = ("bert", "llama", "t5")
every_method = pytest.mark.parametrize("method", METHODS)
on_every_model = pytest.mark.parametrize("name", MODELS)


def build(name):
    return getattr(tiny_models, name)()


def adapted(method, name):
    torch.manual_seed(5)
    return peft_ops.adapt(build(name), METHODS[method](TASKS[name])).train()


def loss_of(model):
    torch.manual_seed(6)  # of dropout
    return model(tokens(), labels=tiny_models.labels(model)).loss


def run(model, optimizer, steps):
    losses = []
    for _ in range(steps):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adamw(model, lr=0.01):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


@every_method
@on_every_model
def test_it_trains_saves_and_goes_on(name, method, tmp_path):
    """The losses of a run that was saved and loaded into a fresh model are those of one that was not, to the bit."""
    frozen = {n: p.clone() for n, p in adapted(method, name).named_parameters() if not p.requires_grad}
    model = adapted(method, name)
    optimizer = adamw(model)
    first = run(model, optimizer, 4)
    peft_ops.save_adapter(model, tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    uninterrupted = run(model, optimizer, 4)
    assert uninterrupted[-1] < first[0]
    for n, p in model.named_parameters():
        assert n not in frozen or torch.equal(p, frozen[n]), n

    again = peft_ops.load_adapter(adapted(method, name), tmp_path)
    optimizer = adamw(again)
    optimizer.load_state_dict(state)
    assert run(again, optimizer, 4) == uninterrupted


@every_method
@on_every_model
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(name, method, reentrant):
    def gradients(checkpointing):
        model = adapted(method, name)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        loss_of(model).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    assert any(g.norm() > 0 for g in plain.values())
    for key, gradient in plain.items():
        torch.testing.assert_close(checkpointed[key], gradient, msg=key, rtol=1e-4, atol=1e-6)


@every_method
@on_every_model
def test_the_base_is_there_while_adapters_are_disabled(name, method):
    base, model = build(name).requires_grad_(False), adapted(method, name)
    run(model, adamw(model), 2)
    model.eval()
    if method in IN_PLACE:
        with pytest.raises(ValueError, match="keeps no copy of the base model"), peft_ops.adapters_disabled(model):
            pass
        return
    if "QLoRA" in method:
        return  # its base is the quantised one: tests/test_adapt.py
    with torch.no_grad(), peft_ops.adapters_disabled(model):
        logits = model(tokens(), labels=tiny_models.labels(base)).logits
    with torch.no_grad():
        assert torch.equal(logits, base(tokens(), labels=tiny_models.labels(base)).logits)


@every_method
@on_every_model
def test_copies_are_of_their_own(name, method):
    model = adapted(method, name).eval()
    with torch.no_grad():
        before = model(tokens(), labels=tiny_models.labels(model)).logits
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    with torch.no_grad():
        assert torch.equal(twin(tokens(), labels=tiny_models.labels(model)).logits, before)
    run(twin, adamw(twin, lr=0.1), 2)
    with torch.no_grad():
        assert torch.equal(model(tokens(), labels=tiny_models.labels(model)).logits, before)
        assert not torch.equal(twin.eval()(tokens(), labels=tiny_models.labels(model)).logits, before)


@every_method
def test_a_16_bit_base_trains(method):
    """What is added is float32; what is trained in place keeps its dtype."""
    torch.manual_seed(5)
    model = peft_ops.adapt(tiny_models.llama().bfloat16(), METHODS[method]("CAUSAL_LM")).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.bfloat16 if method in IN_PLACE else torch.float32}
    losses = run(model, adamw(model), 6)
    assert losses[-1] < losses[0]
    assert model(tokens()).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("method", [m for m in METHODS if m not in (*IN_PLACE, "LoRA", "QLoRA")])
@pytest.mark.unpoisoned
def test_torch_compile_captures_it_whole(method):
    """Forward without a graph break, of methods that hang on hooks (the layers: tests/aot/test_capture.py)."""
    model = adapted(method, "llama").eval()
    with torch.no_grad():
        plain = model(tokens(), use_cache=False).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens(), use_cache=False).logits.detach(), plain)
