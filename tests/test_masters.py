"""float32 masters of 16-bit parameters: equal to a float32 run, resumed to the bit, out of everything's way."""

import copy
import pickle

import pytest
import torch
from tiny_models import llama, tokens
from torch import nn

import peft_ops
from peft_ops import FullConfig, LoRAConfig, MasterWeights, PartialConfig

HALVES = [torch.bfloat16, torch.float16]


def test_small_updates_stall_without_masters_and_add_up_with_them():
    def run(wrap, dtype):
        p = nn.Parameter(torch.ones(4, dtype=dtype))
        optimizer = wrap(torch.optim.SGD([p], lr=1e-3))
        for _ in range(100):
            p.grad = torch.ones_like(p)
            optimizer.step()
        return p.detach()

    exact = run(lambda o: o, torch.float32)
    assert torch.allclose(exact, torch.tensor(0.9))
    assert torch.equal(run(lambda o: o, torch.bfloat16), torch.ones(4, dtype=torch.bfloat16))
    for dtype in HALVES:
        assert torch.equal(run(MasterWeights, dtype), exact.to(dtype))


MAKERS = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.01),
    "foreach": lambda ps: torch.optim.AdamW(ps, lr=0.01, foreach=True),
    "fused": lambda ps: torch.optim.AdamW(ps, lr=0.01, fused=True),
    "amsgrad": lambda ps: torch.optim.Adam(ps, lr=0.01, amsgrad=True),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, lr=0.01, centered=True, momentum=0.5),
    "Adafactor": lambda ps: torch.optim.Adafactor(ps, lr=0.01),
    "groups": lambda ps: torch.optim.SGD([{"params": ps[:1], "lr": 0.1}, {"params": ps[1:]}], lr=0.01),
}


def parameters(dtype):
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((5, 7), (11,), ())]


def give_gradients(ps, step):
    generator = torch.Generator().manual_seed(step)
    for p in ps:
        p.grad = torch.randn(p.shape, generator=generator).to(torch.bfloat16).to(p.dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", MAKERS)
def test_every_step_is_that_of_float32_rounded_once(name, dtype):
    ours, exact = parameters(dtype), [nn.Parameter(p.detach().float()) for p in parameters(dtype)]
    optimizer, theirs = MasterWeights(MAKERS[name](ours)), MAKERS[name](exact)
    start = ours[0].detach().clone()
    for step in range(6):
        give_gradients(ours, step)
        given = [p.grad for p in ours]
        for p, q in zip(ours, exact, strict=True):
            q.grad = p.grad.float()
        optimizer.step()
        theirs.step()
        for p, q, grad in zip(ours, exact, given, strict=True):
            assert torch.equal(p, q.to(dtype))
            assert p.grad is grad
            assert p.grad.dtype == dtype
    assert not torch.equal(ours[0], start)
    floats = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor) and v.numel() > 1]
    assert {v.dtype for v in floats} <= {torch.float32}


@pytest.mark.parametrize("name", MAKERS)
def test_a_state_resumes_to_the_bit(name, tmp_path):
    def run(ps, optimizer, steps):
        for step in steps:
            give_gradients(ps, step)
            optimizer.step()

    ps = parameters(torch.bfloat16)
    optimizer = MasterWeights(MAKERS[name](ps))
    run(ps, optimizer, range(3))
    torch.save((ps, optimizer.state_dict()), tmp_path / "run.pt")
    run(ps, optimizer, range(3, 6))

    def resumed(weights_first):
        kept, state = torch.load(tmp_path / "run.pt")
        fresh = parameters(torch.bfloat16)
        again = MasterWeights(MAKERS[name](fresh))
        for part in (0, 1) if weights_first else (1, 0):
            if part:
                again.load_state_dict(state)
            else:
                with torch.no_grad():
                    for p, q in zip(fresh, kept, strict=True):
                        p.copy_(q)
        run(fresh, again, range(3, 6))
        return fresh, again

    for order in (True, False):
        fresh, again = resumed(order)
        assert all(torch.equal(p, q) for p, q in zip(fresh, ps, strict=True))
        for i, state in again.state_dict()["state"].items():
            for key, value in state.items():
                expected = optimizer.state_dict()["state"][i][key]
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(expected)), (i, key)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on_alike(copied):
    ps = parameters(torch.bfloat16)
    optimizer = MasterWeights(MAKERS["AdamW"](ps))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1.0)  # it puts a wrapped step on the optimizer
    give_gradients(ps, 0)
    optimizer.step()
    qs, other = copied((ps, optimizer))
    for pair in ((ps, optimizer), (qs, other)):
        give_gradients(pair[0], 1)
        pair[1].step()
    assert all(torch.equal(p, q) and p is not q for p, q in zip(ps, qs, strict=True))
    assert qs[0] is other.param_groups[0]["params"][0]


def test_masters_are_made_for_what_moves_and_float32_is_left_alone():
    half, wide, idle = (nn.Parameter(torch.ones(3, dtype=d)) for d in (torch.half, torch.float, torch.half))
    optimizer = MasterWeights(torch.optim.AdamW([half, wide, idle], lr=0.1))
    half.grad, wide.grad = torch.ones_like(half), torch.ones_like(wide)
    optimizer.step()
    state = optimizer.state_dict()["state"]
    assert state.keys() == {0, 1}
    assert state[0]["master"].dtype == torch.float32
    assert "master" not in state[1]
    assert torch.equal(half.float(), wide.half().float())
    assert torch.equal(idle, torch.ones(3).half())


def test_what_else_writes_to_a_parameter_counts():
    p = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = MasterWeights(torch.optim.SGD([p], lr=1e-3))
    for _ in range(3):
        p.grad = torch.ones_like(p)
        optimizer.step()
    with torch.no_grad():
        p[0] = 5.0
    optimizer.step()
    master = optimizer.state_dict()["state"][0]["master"]
    torch.testing.assert_close(master, torch.tensor([4.999, 0.996]), rtol=1e-6, atol=0)


def test_a_step_that_fails_leaves_parameters_and_gradients():
    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            raise RuntimeError("out of memory")

    ps = parameters(torch.bfloat16)
    optimizer = MasterWeights(Broken(ps, lr=0.1))
    give_gradients(ps, 0)
    before, grads = [p.detach().clone() for p in ps], [p.grad for p in ps]
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ps, before, strict=True))
    assert all(p.grad is grad for p, grad in zip(ps, grads, strict=True))
    assert all(p is q for p, q in zip(optimizer.param_groups[0]["params"], ps, strict=True))


def test_the_surface_of_an_optimizer():
    ps = parameters(torch.bfloat16)
    optimizer = MasterWeights(torch.optim.SGD(ps[:2], lr=0.1))
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert repr(optimizer).startswith("MasterWeights(SGD (")
    assert optimizer.defaults["lr"] == 0.1
    optimizer.add_param_group({"params": ps[2:], "lr": 0.5})
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]
    seen = []
    optimizer.register_step_post_hook(lambda *args: seen.append(1))
    before = ps[2].item()

    def closure():
        optimizer.zero_grad()
        loss = sum(p.float().square().sum() for p in ps)
        loss.backward()
        nn.utils.clip_grad_norm_(ps, 1e-3)
        return loss

    loss = optimizer.step(closure)
    assert loss.requires_grad
    assert seen == [1]
    assert 0 < sum(p.grad.float().square().sum() for p in ps) < 2e-6
    master = optimizer.state_dict()["state"][2]["master"]
    assert master.item() == pytest.approx(before - 0.5 * ps[2].grad.item(), abs=1e-7)
    optimizer.zero_grad()
    assert all(p.grad is None for p in ps)


def test_what_is_refused():
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got list"):
        MasterWeights([])
    ps = parameters(torch.bfloat16)
    stepped = torch.optim.AdamW(ps)
    give_gradients(ps, 0)
    stepped.step()
    with pytest.raises(ValueError, match="optimizer has state already"):
        MasterWeights(stepped)
    optimizer = MasterWeights(torch.optim.AdamW(ps))
    optimizer.step()
    before = optimizer.state_dict()
    wrong = copy.deepcopy(before)
    wrong["state"][0]["master"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"the master of parameter 0 is \(3,\), expected \(5, 7\)"):
        optimizer.load_state_dict(wrong)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(before | {"param_groups": []})
    after = optimizer.state_dict()
    assert all(torch.equal(after["state"][i]["master"], state["master"]) for i, state in before["state"].items())
    assert optimizer.param_groups[0]["params"][0] is ps[0]


def test_a_state_without_masters_starts_them_from_the_parameters():
    ps = parameters(torch.float32)
    theirs = torch.optim.SGD(ps, lr=0.1, momentum=0.9)
    give_gradients(ps, 0)
    theirs.step()
    qs = [nn.Parameter(p.detach().bfloat16()) for p in ps]
    optimizer = MasterWeights(torch.optim.SGD(qs, lr=0.1, momentum=0.9))
    optimizer.load_state_dict(theirs.state_dict())
    for i, q in enumerate(qs):
        state = optimizer.state_dict()["state"][i]
        assert torch.equal(state["master"], q.float())
        assert torch.equal(state["momentum_buffer"], theirs.state[ps[i]]["momentum_buffer"])


@pytest.mark.parametrize("config", [FullConfig(fp32_masters=True), PartialConfig(num_top_layers=1, fp32_masters=True)])
def test_a_bfloat16_model_follows_its_float32_run(config):
    def run(config, dtype):
        model = peft_ops.adapt(llama().to(torch.bfloat16).to(dtype), config)
        optimizer = peft_ops.optimizer_for(model, torch.optim.SGD, lr=2e-4)
        assert isinstance(optimizer, MasterWeights) is config.fp32_masters
        start = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        for _ in range(10):
            model(tokens(), labels=tokens()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        trained = [p for p in model.parameters() if p.requires_grad]
        masters = [state["master"] for _, state in sorted(optimizer.state_dict()["state"].items()) if "master" in state]
        moved = [(p.detach() - q).float().flatten() for p, q in zip(masters or trained, start, strict=True)]
        return torch.cat(moved), sum((p != q).sum().item() for p, q in zip(trained, start, strict=True))

    plain = type(config)(**{"num_top_layers": 1} if isinstance(config, PartialConfig) else {})
    exact, _ = run(plain, torch.float32)
    followed, changed = run(config, torch.bfloat16)
    stalled, changed_without = run(plain, torch.bfloat16)
    assert (followed - exact).norm() < 0.1 * exact.norm()
    assert (stalled - exact).norm() > 0.5 * exact.norm()
    assert changed_without < 0.8 * changed


def test_other_methods_have_plain_optimizers():
    model = peft_ops.adapt(llama().bfloat16(), LoRAConfig(r=2))
    optimizer = peft_ops.optimizer_for(model, torch.optim.AdamW, lr=0.1)
    assert type(optimizer) is torch.optim.AdamW
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    with pytest.raises(ValueError, match=r"model \(LlamaForCausalLM\) is not adapted"):
        peft_ops.optimizer_for(llama(), torch.optim.AdamW)
