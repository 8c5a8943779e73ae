"""The layer-by-layer schedule: who is trained when, what the optimizer keeps, and going on from a checkpoint."""

import copy

import pytest
import torch
from tiny_models import assert_as_it_was, bert, gpt2, labels, llama, snapshot, t5, tokens
from torch.optim import lr_scheduler

import peft_ops
from peft_ops import FullConfig, LayerwiseSchedule, LoRAConfig, PartialConfig


def adapted(build=llama, config=None):
    return peft_ops.adapt(build(), config or FullConfig())


def scheduled(model, make=torch.optim.AdamW, settings=None, **schedule):
    optimizer = peft_ops.optimizer_for(model, make, **settings or {"lr": 0.01})
    return optimizer, LayerwiseSchedule(model, optimizer, **schedule or {"steps_per_layer": 2})


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def named(model, *prefixes):
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


def one_step(model, optimizer, schedule=None):
    loss = model(tokens(), labels=labels(model)).loss
    loss.backward()
    optimizer.step()
    if schedule is not None:
        schedule.step()
    optimizer.zero_grad()
    return loss.item()


EMBEDDINGS, TOP = "model.embed_tokens.", ("model.norm.", "lm_head.")
LAYERS = [f"model.layers.{i}." for i in range(3)]
WHEN = [
    ("cumulative", "bottom-up", [(EMBEDDINGS, *LAYERS[:1]), (EMBEDDINGS, *LAYERS[:2]), (EMBEDDINGS, *LAYERS, *TOP)]),
    ("cumulative", "top-down", [(LAYERS[2], *TOP), (*LAYERS[1:], *TOP), (EMBEDDINGS, *LAYERS, *TOP)]),
    ("single", "bottom-up", [(EMBEDDINGS, LAYERS[0]), (LAYERS[1],), (LAYERS[2], *TOP)]),
    ("single", "top-down", [(LAYERS[2], *TOP), (LAYERS[1],), (EMBEDDINGS, LAYERS[0])]),
]


@pytest.mark.parametrize("counts", [{"steps_per_layer": 2}, {"milestones": [1, 4]}])
@pytest.mark.parametrize(("mode", "order", "stages"), WHEN)
def test_who_is_trained_when(mode, order, stages, counts):
    model = adapted()
    _, schedule = scheduled(model, mode=mode, order=order, **counts)
    starts = counts.get("milestones", [2, 4])
    for count in range(8):
        stage = sum(count >= start for start in starts)
        assert trainable(model) == named(model, *stages[stage]), count
        assert (schedule.steps, schedule.stage) == (count, stage)
        up = range(stage if mode == "single" else 0, stage + 1)
        expected = [f"model.layers.{i if order == 'bottom-up' else 2 - i}" for i in up]
        assert schedule.trained_layers == expected
        assert peft_ops.trainable_parameters(model).trainable == sum(
            p.numel() for name, p in model.named_parameters() if name.startswith(stages[stage])
        )
        assert schedule.step() is (count + 1 in starts)


MODELS = [
    (
        gpt2, FullConfig(),  # its head is its embedding
        [("transformer.wte", "transformer.wpe", "transformer.h.0."), ("transformer.h.1.", "transformer.ln_f")],
    ),
    (
        bert, FullConfig(task_type="SEQ_CLS"),
        [("classifier", "bert.embeddings", "bert.encoder.layer.0."), ("bert.encoder.layer.1.", "bert.pooler")],
    ),
    (
        t5, FullConfig(),
        [
            ("shared", "encoder.block.0."), ("encoder.block.1.", "encoder.final_layer_norm"),
            ("decoder.block.0.",), ("decoder.block.1.", "decoder.final_layer_norm", "lm_head"),
        ],
    ),
    (llama, PartialConfig(layers=[0, 2]), [("model.layers.0.",), ("model.layers.2.",)]),
    (
        llama, PartialConfig(num_top_layers=2, embeddings=True, final_norm=True, modules_to_save=["lm_head"]),
        [("lm_head", "model.embed", "model.layers.1."), ("model.layers.2.", "model.norm")],
    ),
    (llama, PartialConfig(num_top_layers=1), [("model.layers.2.",)]),
]  # fmt: skip


@pytest.mark.parametrize(("build", "config", "stages"), MODELS)
def test_other_models_and_configs(build, config, stages):
    model = adapted(build, config)
    everything = trainable(model)
    _, schedule = scheduled(model, steps_per_layer=1)
    for stage in range(len(stages)):
        assert trainable(model) == named(model, *(prefix for names in stages[: stage + 1] for prefix in names))
        schedule.step()
    assert trainable(model) == everything


def test_what_lora_adds_is_trained_layer_by_layer():
    model = adapted(llama, LoRAConfig(r=2, modules_to_save=["lm_head"]))
    everything = trainable(model)
    _, schedule = scheduled(model, steps_per_layer=1)
    for layer in range(3):
        prefixes = tuple(f"model.layers.{i}." for i in range(layer + 1))
        assert trainable(model) == {n for n in everything if n.startswith((*prefixes, "lm_head"))}
        schedule.step()


def adamw_by_hand(state, p, grad, lr, decay, betas=(0.9, 0.999), eps=1e-8):
    """Loshchilov & Hutter 2019, algorithm 2; the count of steps is the parameter's own."""
    t, m, v = state.get("t", 0) + 1, state.get("m", 0), state.get("v", 0)
    m, v = betas[0] * m + (1 - betas[0]) * grad, betas[1] * v + (1 - betas[1]) * grad**2
    state.update(t=t, m=m, v=v)
    return p - lr * decay * p - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)


def momentum_by_hand(state, p, grad, lr, decay, momentum=0.9):
    grad = grad + decay * p
    state["b"] = momentum * state["b"] + grad if "b" in state else grad
    return p - lr * state["b"]


RULES = {
    "AdamW": (torch.optim.AdamW, adamw_by_hand, {"lr": 0.01, "weight_decay": 0.5}),
    "fused": (torch.optim.AdamW, adamw_by_hand, {"lr": 0.01, "weight_decay": 0.5, "fused": True}),
    "SGD": (torch.optim.SGD, momentum_by_hand, {"lr": 0.02, "weight_decay": 0.5, "momentum": 0.9}),
}


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize(("mode", "order", "stages"), WHEN)
@pytest.mark.parametrize("rule", RULES)
def test_the_optimizer_moves_what_is_trained_and_keeps_its_state(rule, mode, order, stages, set_to_none):
    """Every parameter goes the way that its own updates alone give; a frozen one has neither decay nor momentum."""
    make, update, settings = RULES[rule]
    model = adapted(lambda: llama().double())
    optimizer, schedule = scheduled(model, make, settings, steps_per_layer=2, mode=mode, order=order)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    states = {name: {} for name in expected}
    for count in range(7):
        model(tokens(), labels=tokens()).loss.backward()
        for name, p in model.named_parameters():
            if name.startswith(stages[min(count // 2, 2)]):
                expected[name] = update(states[name], expected[name], p.grad, settings["lr"], settings["weight_decay"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), expected[name], rtol=1e-9, atol=1e-12, msg=f"{name} {count}")
    assert len(optimizer.param_groups) == 1
    assert {name for name, p in model.named_parameters() if optimizer.state[p]} == set(expected)


def test_state_is_made_when_a_layer_joins():
    model = adapted()
    optimizer, schedule = scheduled(model)
    kept = []
    for _ in range(6):
        one_step(model, optimizer, schedule)
        kept.append({name for name, p in model.named_parameters() if p in optimizer.state})
    assert kept[1] == named(model, EMBEDDINGS, LAYERS[0])
    assert kept[3] == named(model, EMBEDDINGS, *LAYERS[:2])
    assert kept[5] == named(model, "")


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda n: 0.9**n),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=10),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
    ),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("masters", [False, True])
def test_learning_rate_schedulers_see_no_change(name, masters):
    def rates(make_schedule):
        model = adapted(lambda: llama().bfloat16(), FullConfig(fp32_masters=masters))
        optimizer = peft_ops.optimizer_for(model, torch.optim.SGD, lr=0.01)
        rate, schedule = SCHEDULERS[name](optimizer), make_schedule(model, optimizer)
        seen = []
        for _ in range(7):
            one_step(model, optimizer, schedule)
            rate.step()
            seen.append([group["lr"] for group in optimizer.param_groups])
        return seen

    plain = rates(lambda model, optimizer: None)
    assert rates(lambda model, optimizer: LayerwiseSchedule(model, optimizer, 2)) == plain
    assert plain[0] != plain[-1]


@pytest.mark.parametrize("mode", ["cumulative", "single"])
@pytest.mark.parametrize("order", ["bottom-up", "top-down"])
@pytest.mark.parametrize("stop", [1, 3, 6])
@pytest.mark.parametrize("masters", [False, True])
def test_a_run_goes_on_exactly(mode, order, stop, masters, tmp_path):
    def fresh(model):
        settings = {"lr": 0.01, "weight_decay": 0.1}
        optimizer, schedule = scheduled(model, settings=settings, steps_per_layer=2, mode=mode, order=order)
        rate = lr_scheduler.CosineAnnealingLR(optimizer, 20)
        return optimizer, schedule, rate

    def run(model, optimizer, schedule, rate, steps):
        losses = []
        for _ in range(steps):
            losses.append(one_step(model, optimizer, schedule))
            rate.step()
        return losses

    def build():
        return llama().bfloat16() if masters else llama()

    model = adapted(build, FullConfig(fp32_masters=masters))
    parts = fresh(model)
    run(model, *parts, stop)
    peft_ops.save_adapter(model, tmp_path)
    torch.save([part.state_dict() for part in parts], tmp_path / "run.pt")
    expected, flags = run(model, *parts, 5), trainable(model)
    model = peft_ops.load_adapter(build(), tmp_path)
    parts = fresh(model)
    for part, state in zip(parts, torch.load(tmp_path / "run.pt"), strict=True):
        part.load_state_dict(state)
    assert run(model, *parts, 5) == expected
    assert trainable(model) == flags
    assert len(set(expected)) == 5


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("mode", "order", "stages"), WHEN)
def test_checkpointing_in_every_stage(mode, order, stages, reentrant):
    def gradients(checkpointed):
        model = adapted(lambda: llama().double())
        _, schedule = scheduled(model, steps_per_layer=1, mode=mode, order=order)
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        found = []
        for _ in stages:
            model.train()(tokens(), labels=tokens()).loss.backward()
            found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            model.zero_grad()
            schedule.step()
        return found

    for actual, expected, prefixes in zip(gradients(True), gradients(False), stages, strict=True):
        assert actual.keys() == expected.keys() == named(llama(), *prefixes)
        for name, grad in expected.items():
            assert grad.any(), name
            torch.testing.assert_close(actual[name], grad, rtol=1e-8, atol=1e-12, msg=name)


def test_a_frozen_layer_keeps_no_gradient():
    model = adapted()
    _, schedule = scheduled(model, steps_per_layer=1, mode="single")
    model(tokens(), labels=tokens()).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None
    schedule.step()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("build", "config", "message"),
    [
        (llama, PartialConfig(num_top_layers=3), "the state is of another model: .* of LlamaForCausalLM with 3 layers"),
        (lambda: llama(attention_bias=True), FullConfig(), "the state is of another model"),
        (llama, PartialConfig(num_top_layers=2), r"a schedule with milestones=\[2, 4\], not \[2\]"),
        (gpt2, FullConfig(), r"a schedule with milestones=\[2, 4\], not \[2\]"),
    ],
)
def test_a_state_of_another_model_is_refused(build, config, message):
    state = scheduled(adapted())[1].state_dict()
    model = adapted(build, config)
    _, schedule = scheduled(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        schedule.load_state_dict(state | {"steps": 3})
    assert_as_it_was(model, before)
    assert schedule.steps == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mode": "single"}, ValueError, "of a schedule with mode='single', not 'cumulative'"),
        ({"order": "top-down"}, ValueError, "of a schedule with order='top-down', not 'bottom-up'"),
        ({"milestones": [3, 6]}, ValueError, r"with milestones=\[3, 6\], not \[2, 4\]"),
        ({"model": "0"}, ValueError, "of another model: .* not those of LlamaForCausalLM with 3 layers"),
        ({"steps": -1}, ValueError, "steps must be at least 0, got -1"),
        ({"steps": "3"}, TypeError, "steps must be an int, got '3'"),
        ({"more": 1}, TypeError, "state must be what LayerwiseSchedule.state_dict gives"),
    ],
)
def test_a_state_of_something_else_is_refused(change, error, message):
    model = adapted()
    _, schedule = scheduled(model)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        schedule.load_state_dict(schedule.state_dict() | change)
    assert_as_it_was(model, before)
    assert schedule.steps == 0


def test_a_state_is_plain_and_shown():
    model = adapted()
    _, schedule = scheduled(model)
    for _ in range(3):
        schedule.step()
    state = schedule.state_dict()
    assert {type(value) for value in state.values()} == {int, str, list}
    assert repr(schedule) == (
        "LayerwiseSchedule(cumulative, bottom-up, milestones=[2, 4], steps=3: model.layers.0, model.layers.1)"
    )
    other = adapted()
    again = scheduled(other)[1]
    again.load_state_dict(copy.deepcopy(state))
    assert trainable(other) == trainable(model)
    assert again.state_dict() == state


BAD = [
    ({}, ValueError, "give one of steps_per_layer and milestones"),
    ({"steps_per_layer": 1, "milestones": [1, 2]}, ValueError, "give one of steps_per_layer and milestones"),
    ({"steps_per_layer": 0}, ValueError, "steps_per_layer must be at least 1, got 0"),
    ({"steps_per_layer": 1.5}, TypeError, "steps_per_layer must be an int, got 1.5"),
    ({"milestones": [1]}, ValueError, "milestones must be 2 rising counts, one for each of 3 layers but the first"),
    ({"milestones": [3, 3]}, ValueError, r"milestones must be 2 rising counts, .* got \[3, 3\]"),
    ({"milestones": [1, "2"]}, TypeError, "milestones must be an int, got '2'"),
    ({"steps_per_layer": 1, "mode": "both"}, ValueError, "mode must be one of 'cumulative', 'single', got 'both'"),
    ({"steps_per_layer": 1, "order": "up"}, ValueError, "order must be one of 'bottom-up', 'top-down', got 'up'"),
]


@pytest.mark.parametrize(("settings", "error", "message"), BAD)
def test_bad_settings_leave_the_model(settings, error, message):
    model = adapted()
    optimizer = peft_ops.optimizer_for(model, torch.optim.SGD, lr=0.1)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        LayerwiseSchedule(model, optimizer, **settings)
    assert_as_it_was(model, before)


def test_an_optimizer_that_lacks_parameters_is_refused():
    model = adapted()
    before = snapshot(model)
    optimizer = torch.optim.SGD(model.model.layers.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"optimizer lacks 3 of the 30 parameters .*\(model.embed_tokens"):
        LayerwiseSchedule(model, optimizer, 1)
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got list"):
        LayerwiseSchedule(model, [], 1)
    assert_as_it_was(model, before)
    LayerwiseSchedule(model, torch.optim.SGD(model.parameters(), lr=0.1), 1)
    assert len(peft_ops.optimizer_for(model, torch.optim.SGD).param_groups[0]["params"]) == 30  # frozen ones too


def test_models_that_it_does_not_fit():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    with pytest.raises(ValueError, match=r"model \(LlamaForCausalLM\) is not adapted"):
        LayerwiseSchedule(llama(), optimizer, 1)
    with pytest.raises(ValueError, match="LlamaForCausalLM as it is adapted has no layers that are trained"):
        LayerwiseSchedule(adapted(llama, PartialConfig(head=True)), optimizer, 1)
    with pytest.raises(ValueError, match="Linear as it is adapted has no layers that are trained"):
        LayerwiseSchedule(peft_ops.adapt(torch.nn.Linear(2, 2), FullConfig()), optimizer, 1)
