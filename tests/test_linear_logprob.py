"""ops.linear_logprob and linear_cross_entropy against softmax written out in float64: reference, interpreter, GPU."""

import os

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from numerics import assert_as_accurate
from peft_ops import nf4
from peft_ops.ops import linear_cross_entropy, linear_logprob
from peft_ops.reference import dropout

NAMES = ("hidden", "weight", "bias", "lora_a", "lora_b")
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
HEADS = {"frozen": (), "trained": ("weight", "bias"), "LoRA": ("lora_a", "lora_b"), "all": NAMES[1:]}
CAPPED = dict(logit_scale=0.7, softcap=3.0, temperature=0.6)


def problem(M=19, K=72, V=133, R=3, dtype=torch.float32, adapter=None, base="dense", device="cpu", head="frozen"):
    """({name: leaf or None}, targets) of a head with logits of a few units; every fourth target is ignored."""
    adapter, trained = adapter or dtype, HEADS[head]
    make = lambda *shape, scale=1.0: torch.randn(*shape) * scale
    weight = make(V, K, scale=2 * K**-0.5).to(dtype)
    lora = head in ("LoRA", "all")
    leaves = {
        "hidden": make(M, K).to(device, dtype),
        "weight": nf4.quantize(weight, 32).to(device) if base == "nf4" else weight.to(device),
        "bias": make(V).to(device, dtype) if head != "LoRA" else None,
        "lora_a": make(R, K, scale=K**-0.5).to(device, adapter) if lora else None,
        "lora_b": make(V, R, scale=2 * R**-0.5).to(device, adapter) if lora else None,
    }
    for name in ("hidden", *trained):
        if isinstance(leaves[name], torch.Tensor):
            leaves[name].requires_grad_()
    targets = torch.randint(V, (M,))
    targets[::4] = -100
    return leaves, targets.to(device)


def formula(hidden, weight, bias, targets, a=None, b=None, scaling=1.0, p=0.0, seed=0, *, logit_scale=1.0, softcap=None,
            temperature=1.0, ignore_index=-100):  # fmt: skip
    """(logp, entropy): logits in the dtype of hidden, everything after them in float32 or wider, as a trainer would."""
    dense = weight if isinstance(weight, torch.Tensor) else nf4.dequantize(weight, hidden.dtype)
    z = hidden @ dense.to(hidden.dtype).t()
    if bias is not None:
        z = z + bias
    if a is not None:
        wide = torch.promote_types(hidden.dtype, a.dtype)
        z = z + scaling * dropout.dropout(hidden.to(wide), p, torch.tensor(seed, device=hidden.device)) @ a.t() @ b.t()
    z = z.to(torch.promote_types(z.dtype, torch.float32)) * logit_scale
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    logs = torch.log_softmax(z, -1)
    counted = targets != ignore_index
    logp = logs.gather(-1, targets.where(counted, 0)[..., None])[..., 0]
    return logp.where(counted, 0), -(logs.exp() * logs).sum(-1).where(counted, 0)


def call(function, leaves, targets, scaling=0.75, p=0.0, seed=7, **logits):
    first, rest = ("hidden", "weight", "bias"), ("lora_a", "lora_b")
    extra = {"entropy": True} if function is linear_logprob else {}
    return function(
        *(leaves[n] for n in first), targets, *(leaves[n] for n in rest), scaling, p, seed, **logits, **extra
    )[:2]


def gradients(function, leaves, targets, directions, **arguments):
    """{name: tensor}: logp, entropy and the gradients of their products with two directions (None: not in the loss)."""
    out = call(function, leaves, targets, **arguments)
    wanted = {n: t for n, t in leaves.items() if isinstance(t, torch.Tensor) and t.requires_grad}
    used = [(o, d.to(o.dtype)) for o, d in zip(out, directions, strict=True) if d is not None]
    grads = torch.autograd.grad([o for o, _ in used], list(wanted.values()), [d for _, d in used])
    return {"logp": out[0], "entropy": out[1], **{f"d{n}": g for n, g in zip(wanted, grads, strict=True)}}


def upcast(leaves):
    double = lambda t: t.detach().double().requires_grad_(t.requires_grad)
    return {n: double(t) if isinstance(t, torch.Tensor) else t for n, t in leaves.items()}


def assert_accurate(problem, directions=None, **arguments):
    leaves, targets = problem
    directions = directions or (torch.randn(targets.shape, device=targets.device), None)
    ours = gradients(linear_logprob, leaves, targets, directions, **arguments)
    same_dtype = gradients(formula, leaves, targets, directions, **arguments)
    exact = gradients(formula, upcast(leaves), targets, directions, **arguments)
    for name in exact:
        assert_as_accurate(name, ours[name], same_dtype[name], exact[name], times=3.0 if name[0] == "d" else 2.0)
    return ours


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_logprobs_and_gradients(dtype, base, head, device):
    ours = assert_accurate(problem(dtype=dtype, base=base, head=head, device=device))
    assert ours["logp"].dtype == ours["entropy"].dtype == torch.float32
    assert ours["dhidden"].dtype == dtype


@pytest.mark.parametrize("logits", [CAPPED, dict(softcap=30.0), dict(temperature=0.5), dict(logit_scale=0.125)])
@pytest.mark.parametrize("head", ["frozen", "all"])
def test_what_follows_the_product(logits, head, device):
    """The softcap is bent where it counts: logits of a few units under a cap of 3."""
    assert_accurate(problem(head=head, device=device), **logits)
    assert_accurate(problem(head=head, device=device, dtype=torch.float16), **logits)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("both", [False, True])
def test_gradients_of_the_entropy(head, both, device):
    directions = torch.randn(19, device=device) if both else None, torch.randn(19, device=device)
    assert_accurate(problem(head=head, device=device), directions)
    assert_accurate(problem(head=head, device=device), directions, **CAPPED)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_float32_adapters_on_a_16_bit_head(dtype, base, device):
    """Case 24."""
    ours = assert_accurate(problem(dtype=dtype, adapter=torch.float32, base=base, head="LoRA", device=device), p=0.3)
    assert ours["dlora_a"].dtype == ours["dlora_b"].dtype == torch.float32


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout_is_that_of_the_seed(p, device):
    leaves, targets = problem(head="LoRA", device=device)
    if p < 1:
        assert_accurate((leaves, targets), p=p)
    else:
        base = {**leaves, "lora_a": None, "lora_b": None}
        torch.testing.assert_close(call(linear_logprob, leaves, targets, p=p), call(linear_logprob, base, targets))


@pytest.mark.parametrize(("M", "K", "V"), [(1, 8, 2), (2, 131, 37), (67, 13, 131), (131, 5, 307), (3, 200, 257)])
@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("head", ["frozen", "all"])
def test_tails_and_prime_sizes(M, K, V, base, head, device):
    """Cases 5 and 6: vocabularies that no block divides, NF4 blocks across rows."""
    leaves, targets = problem(M, K, V, base=base, head=head, device=device)
    assert_accurate((leaves, targets.where(targets >= 0, V - 1)))


def test_slabs_of_a_4_bit_head_differ_in_width(monkeypatch, device):
    """The last slab is narrower, so that more rows fit a tile: more logits than there were in the first."""
    monkeypatch.setattr("peft_ops.reference.linear_logprob._TILE", 7000)
    monkeypatch.setattr("peft_ops.reference.linear_logprob._COLUMNS", 1)
    monkeypatch.setattr("peft_ops.reference.nf4_linear._SLAB", 96 * 72)
    assert_accurate(problem(M=200, V=96 + 50, base="nf4", device=device))


@pytest.mark.parametrize("rank", [1, 4, 8, 64])
def test_every_rank(rank, device):
    assert_accurate(problem(K=40, V=70, R=rank, head="LoRA", device=device))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_confident_logits(dtype, head, device):
    """Case 14: logits of hundreds, for the target and against it. Beside the cancellation plain torch has no better."""
    leaves, targets = problem(head=head, dtype=dtype, device=device)
    targets = targets.clamp(min=0)
    with torch.no_grad():
        dense = leaves["weight"].float()
        leaves["hidden"].copy_(40 * dense[targets])
        leaves["hidden"][::3] *= -1
    assert_accurate((leaves, targets))


def test_a_certain_token_costs_nothing(device):
    """Far below the rounding of its logit: log-prob, entropy and gradients are as small as they are."""
    hidden = torch.full((1, 8), 100.0, device=device, requires_grad=True)
    weight = torch.zeros(3, 8, device=device)
    weight[1] = 1.0  # logits 0, 800, 0
    weight.requires_grad_()
    out = linear_logprob(hidden, weight, None, torch.tensor([1], device=device), entropy=True)
    grads = torch.autograd.grad(out.logp.sum() + out.entropy.sum(), (hidden, weight))
    assert out.logp.item() == out.entropy.item() == 0.0
    assert all(g.abs().max() == 0 for g in grads)


@pytest.mark.parametrize("shape", [(), (5,), (2, 5), (2, 3, 5)])
def test_leading_dimensions(shape, device):
    leaves, _ = problem(device=device)
    hidden, targets = torch.randn(*shape, 72, device=device), torch.randint(133, shape, device=device)
    out = linear_logprob(
        hidden, leaves["weight"], leaves["bias"], targets, entropy=True, reference_hidden=hidden.flip(-1)
    )
    flat = linear_logprob(
        hidden.reshape(-1, 72), leaves["weight"], leaves["bias"], targets.reshape(-1), entropy=True,
        reference_hidden=hidden.reshape(-1, 72).flip(-1),
    )  # fmt: skip
    for value, expected in zip(out, flat, strict=True):
        assert value.shape == shape
        assert torch.equal(value.reshape(-1), expected)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset"])
def test_strided_inputs(layout, device):
    """Cases 3 and 9."""
    leaves, targets = problem(head="all", device=device)
    wide = torch.randn(20, 145, device=device)
    hidden = {
        "transposed": torch.randn(72, 19, device=device).t(),
        "sliced": wide[:19, :144:2],
        "offset": wide[1:, 1:73],
    }
    leaves["hidden"] = hidden[layout].detach().requires_grad_()
    leaves["weight"] = torch.randn(72, 133, device=device).t().requires_grad_()  # as of a Conv1D
    leaves["lora_a"] = torch.randn(72, 3, device=device).t().requires_grad_()
    leaves["lora_b"] = torch.randn(3, 133, device=device).t().requires_grad_()
    leaves["bias"] = torch.randn(266, device=device)[::2].requires_grad_()
    assert_accurate((leaves, torch.stack((targets, targets), 1)[:, 0]), (torch.randn(38, device=device)[::2], None))


def test_gradients_of_a_sum(device):
    """Case 1: expanded gradients of both outputs."""
    one = torch.ones((), device=device).expand(19)
    assert_accurate(problem(head="all", device=device), (one, one))


@pytest.mark.parametrize("head", HEADS)
def test_no_rows(head, device):
    leaves, _ = problem(head=head, device=device)
    leaves["hidden"] = torch.randn(2, 0, 72, device=device, requires_grad=True)
    logp, entropy = call(linear_logprob, leaves, torch.zeros(2, 0, dtype=torch.int64, device=device))
    (logp.sum() + entropy.sum()).backward()
    assert logp.shape == entropy.shape == (2, 0)
    assert all(leaves[n].grad.abs().max() == 0 for n in HEADS[head])


@pytest.mark.parametrize("head", HEADS)
def test_all_ignored_is_zero_with_zero_gradients(head, device):
    leaves, targets = problem(head=head, device=device)
    logp, entropy = call(linear_logprob, leaves, torch.full_like(targets, -100))
    (logp.sum() + entropy.sum()).backward()
    assert logp.abs().max() == entropy.abs().max() == 0
    assert all(leaves[n].grad.abs().max() == 0 for n in ("hidden", *HEADS[head]))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("entropy", [False, True])
def test_what_ignored_tokens_hold_reaches_nothing(head, entropy, device):
    """NaN and infinities in padding: neither a result nor a gradient, to the bit."""
    (leaves, targets), results = problem(head=head, device=device), []
    direction = torch.randn(19, device=device)
    for value in (0.0, float("nan"), float("inf")):
        with torch.no_grad():
            leaves["hidden"][::4] = value
        results.append(gradients(linear_logprob, leaves, targets, (direction, direction if entropy else None)))
    for name, clean in results[0].items():
        assert clean.isfinite().all(), name
        assert clean.norm() > 0, name
        assert torch.equal(results[1][name], clean), name
        assert torch.equal(results[2][name], clean), name


def test_another_ignore_index(device):
    leaves, targets = problem(device=device)
    moved = targets.where(targets >= 0, 7)
    out = linear_logprob(leaves["hidden"], leaves["weight"], leaves["bias"], moved, ignore_index=7).logp
    assert torch.equal(out == 0, moved == 7)


@pytest.mark.parametrize("head", ["frozen", "all"])
def test_a_nan_stays_in_its_token(head, device):
    """Case 11: of the results and of dhidden; a trained head's gradient is a sum over tokens."""
    leaves, targets = problem(head=head, device=device)
    with torch.no_grad():
        leaves["hidden"][5, 3] = float("nan")
    out = gradients(linear_logprob, leaves, targets, (torch.randn(19, device=device), None))
    others = torch.arange(19, device=device) != 5
    for name in ("logp", "entropy", "dhidden"):
        assert out[name][5].isnan().all(), name
        assert out[name][others].isfinite().all(), name


def test_tokens_masked_out_by_the_bias(device):
    """-inf in the bias, a whole tile of it too: probability 0, no NaN."""
    leaves, targets = problem(V=1500, device=device)
    bias = torch.zeros(1500, device=device)
    bias[100:1300] = -float("inf")
    leaves["bias"], targets = bias, targets % 100
    ours = gradients(linear_logprob, leaves, targets, (torch.randn(19, device=device),) * 2)
    kept = torch.cat((torch.arange(100), torch.arange(1300, 1500))).to(device)
    leaves |= {"weight": leaves["weight"][kept], "bias": None}
    expected = gradients(formula, upcast(leaves), targets, (torch.randn(19, device=device),) * 2)
    torch.testing.assert_close(ours["logp"].double(), expected["logp"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours["entropy"].double(), expected["entropy"], rtol=1e-5, atol=1e-5)
    assert ours["dhidden"].isfinite().all()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_the_reference_of_the_same_pass(head, base, device):
    """Its log-probs are those of the head without its adapter, to the bit those of a call of its own."""
    leaves, targets = problem(head=head, base=base, device=device)
    other = torch.randn(19, 72, device=device)
    arguments = [leaves[n] for n in ("hidden", "weight", "bias")], [leaves[n] for n in ("lora_a", "lora_b")]
    out = linear_logprob(*arguments[0], targets, *arguments[1], 0.75, reference_hidden=other)
    alone = linear_logprob(other, *arguments[0][1:], targets).logp
    assert not out.reference.requires_grad
    torch.testing.assert_close(out.reference, alone.detach(), rtol=1e-6, atol=1e-6)
    direction = torch.randn(19, device=device)
    inputs = [t for t in leaves.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    without = linear_logprob(*arguments[0], targets, *arguments[1], 0.75).logp
    for mine, expected in zip(
        *(torch.autograd.grad(t, inputs, direction) for t in (out.logp, without)), strict=True
    ):  # fmt: skip
        assert expected.norm() > 0
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trained", [(n,) for n in NAMES] + [("lora_a", "lora_b"), ("hidden", "weight"), NAMES])
def test_only_what_is_trained_gets_a_gradient(trained, device):
    """Case 16."""
    leaves, targets = problem(head="all", device=device)
    leaves = {n: t.detach().requires_grad_(n in trained) for n, t in leaves.items()}
    assert_accurate((leaves, targets))
    call(linear_logprob, leaves, targets)[0].square().sum().backward()
    assert {n for n in NAMES if leaves[n].grad is not None} == set(trained)


def saved_bytes(leaves, targets, **arguments):
    own = {t.data_ptr() for t in (*leaves.values(), targets) if isinstance(t, torch.Tensor)}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        linear_logprob(*(leaves[n] for n in NAMES[:3]), targets, *(leaves[n] for n in NAMES[3:]), **arguments)
    return sum(t.nbytes for t in saved if t.data_ptr() not in own)


@pytest.mark.parametrize(("head", "least"), [("frozen", 0), ("trained", 8), ("LoRA", 8 + 3 * 4)])
def test_saves_nothing_as_wide_as_the_vocabulary(head, least, device):
    """Case 17: with a frozen head at most the slope, as large as hidden; else norm [2, M] and S [M, r]."""
    leaves, targets = problem(M=32, V=500, head=head, dtype=torch.float16, adapter=torch.float32, device=device)
    assert saved_bytes(leaves, targets) <= 32 * max(least, 72 * 2)
    if head != "frozen":
        assert saved_bytes(leaves, targets) == 32 * least
    with torch.no_grad():
        assert saved_bytes(leaves, targets) == 0


def test_inputs_stay_as_they_are(device):
    """Case 18."""
    leaves, targets = problem(head="all", device=device)
    before = {n: t.detach().clone() for n, t in leaves.items()}, targets.clone()
    gradients(linear_logprob, leaves, targets, (torch.randn(19, device=device),) * 2, p=0.3)
    assert all(torch.equal(before[0][n], leaves[n]) for n in NAMES)
    assert torch.equal(before[1], targets)


@pytest.mark.parametrize("head", HEADS)
def test_retain_graph_twice_is_identical_and_runs_are_deterministic(head, device):
    """Cases 15 and 19."""
    leaves, targets = problem(M=150, V=300, head=head, device=device)
    inputs = [t for t in leaves.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    direction, runs = torch.randn(150, device=device), []
    for _ in range(2):
        logp, _ = call(linear_logprob, leaves, targets, p=0.3)
        runs += [torch.autograd.grad(logp, inputs, direction, retain_graph=True) for _ in range(2)]
    assert all(g.abs().max() > 0 for g in runs[0])
    assert all(torch.equal(g, h) for run in runs[1:] for g, h in zip(runs[0], run, strict=True))


def test_double_backward_raises(device):
    leaves, targets = problem(device=device)
    logp, _ = call(linear_logprob, leaves, targets)
    (dx,) = torch.autograd.grad(logp.square().sum(), leaves["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("head", ["frozen", "LoRA"])
def test_gradient_checkpointing(reentrant, head, device):
    """Case 21, with dropout."""
    results = []
    for wrap in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=reentrant)):
        torch.manual_seed(3)
        leaves, targets = problem(head=head, device=device)
        f = lambda x, rest=leaves, y=targets: call(linear_logprob, {**rest, "hidden": x}, y, p=0.4, seed=None)[0]
        wrap(f, leaves["hidden"]).square().sum().backward()
        results.append([leaves[n].grad for n in ("hidden", *HEADS[head])])
    assert all(torch.equal(g, h) and g.abs().max() > 0 for g, h in zip(*results, strict=True))


@pytest.mark.parametrize("head", ["frozen", "all"])
def test_autocast(head, device):
    """Case 23: hidden in bfloat16 as nn.Linear would have it; gradients keep the parameters' dtype."""
    leaves, targets = problem(head=head, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        logp, _ = call(linear_logprob, leaves, targets)
        logp.square().sum().backward()
    exact, _ = call(formula, upcast(leaves), targets)
    assert logp.dtype == torch.float32
    assert (logp.double() - exact).norm() < 1e-2 * exact.norm()
    assert all(leaves[n].grad.dtype == torch.float32 for n in ("hidden", *HEADS[head]))


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_silent_adapter_equals_the_base_exactly(dtype, device):
    """Case 25."""
    leaves, targets = problem(dtype=dtype, head="LoRA", device=device)
    plain = linear_logprob(*(leaves[n] for n in NAMES[:3]), targets).logp
    a, b = leaves["lora_a"], leaves["lora_b"]
    for silent, scaling in ((torch.zeros_like(b), 0.75), (b, 0.0)):
        out = linear_logprob(*(leaves[n] for n in NAMES[:3]), targets, a, silent, scaling).logp
        torch.testing.assert_close(out, plain, rtol=0, atol=1e-6)


def test_gradcheck():
    leaves, targets = problem(M=4, K=5, V=7, R=2, head="all")
    leaves = upcast(leaves)

    def f(hidden, weight, bias, a, b):
        out = linear_logprob(hidden, weight, bias, targets, a, b, 0.75, 0.3, 7, **CAPPED, entropy=True)
        return out.logp, out.entropy

    assert torch.autograd.gradcheck(f, tuple(leaves[n] for n in NAMES))
    frozen = [t.detach() for t in leaves.values()]
    assert torch.autograd.gradcheck(
        lambda h: linear_logprob(h, *frozen[1:3], targets, **CAPPED).logp, (leaves["hidden"],)
    )


def test_vmap_and_functional_gradients():
    """Case 31."""
    leaves, targets = problem(M=6, head="LoRA")
    leaves, targets = {n: None if t is None else t.detach() for n, t in leaves.items()}, targets.clamp(min=0)
    f = lambda h, y: linear_logprob(h, leaves["weight"], None, y, leaves["lora_a"], leaves["lora_b"]).logp
    whole = f(leaves["hidden"], targets)
    split = torch.vmap(f)(leaves["hidden"].view(2, 3, 72), targets.view(2, 3))
    torch.testing.assert_close(split.view(6), whole, rtol=1e-4, atol=1e-4)
    hidden = leaves["hidden"].clone().requires_grad_()
    functional = torch.func.grad(lambda h: f(h, targets).square().sum())(leaves["hidden"])
    torch.testing.assert_close(
        functional, torch.autograd.grad(f(hidden, targets).square().sum(), hidden)[0], rtol=1e-4, atol=1e-4
    )


@pytest.mark.unpoisoned
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are captured in tests/aot")
@pytest.mark.parametrize("head", ["frozen", "LoRA"])
def test_compiled_it_is_captured_whole(head):
    """Case 28, on the reference."""
    leaves, targets = problem(head=head)
    expected = gradients(linear_logprob, leaves, targets, (torch.ones(19), torch.ones(19)), **CAPPED)
    compiled = torch.compile(linear_logprob, backend="aot_eager", fullgraph=True)
    out = compiled(
        *(leaves[n] for n in NAMES[:3]), targets, *(leaves[n] for n in NAMES[3:]), 0.75, **CAPPED, entropy=True
    )
    torch.testing.assert_close(out.logp, expected["logp"])
    inputs = [t for t in leaves.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    names = [name for name in expected if name.startswith("d")]
    for name, g in zip(names, torch.autograd.grad(out.logp.sum() + out.entropy.sum(), inputs), strict=True):
        assert g.norm() > 0, name
        torch.testing.assert_close(g, expected[name], rtol=1e-4, atol=1e-5, msg=name)


class TestCrossEntropy:
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_is_torchs(self, reduction, device):
        leaves, targets = problem(head="all", device=device)
        ours = linear_cross_entropy(
            *(leaves[n] for n in NAMES[:3]), targets, *(leaves[n] for n in NAMES[3:]), 0.75, reduction=reduction
        )
        z = leaves["hidden"] @ leaves["weight"].t() + leaves["bias"]
        z = z + 0.75 * leaves["hidden"] @ leaves["lora_a"].t() @ leaves["lora_b"].t()
        theirs = torch.nn.functional.cross_entropy(z, targets, reduction=reduction)
        torch.testing.assert_close(ours, theirs)
        for name in NAMES:
            g, h = (torch.autograd.grad(t.square().sum(), leaves[name], retain_graph=True)[0] for t in (ours, theirs))
            assert h.norm() > 0
            torch.testing.assert_close(g, h, rtol=1e-4, atol=1e-4)

    def test_over_several_batches(self, device):
        leaves, targets = problem(device=device)
        base = [leaves[n] for n in NAMES[:3]]
        items = (targets != -100).sum()
        parts = sum(
            linear_cross_entropy(base[0][rows], *base[1:], targets[rows], num_items=items)
            for rows in (slice(0, 7), slice(7, 19))
        )
        torch.testing.assert_close(parts, linear_cross_entropy(*base, targets))

    def test_the_mean_over_nothing_is_zero(self, device):
        leaves, targets = problem(device=device)
        loss = linear_cross_entropy(*(leaves[n] for n in NAMES[:3]), torch.full_like(targets, -100))
        loss.backward()
        assert loss == 0
        assert leaves["hidden"].grad.abs().max() == 0

    def test_bad_input(self):
        leaves, targets = problem()
        base = [leaves[n] for n in NAMES[:3]]
        with pytest.raises(ValueError, match="reduction must be mean, sum or none, got 'avg'"):
            linear_cross_entropy(*base, targets, reduction="avg")
        with pytest.raises(ValueError, match="num_items divides a mean, got reduction='sum'"):
            linear_cross_entropy(*base, targets, reduction="sum", num_items=3)


class TestBadInput:
    def call(self, head="all", p=0.0, targets=None, logits=None, **replaced):
        leaves, y = problem(head=head)
        leaves |= replaced
        y = y if targets is None else targets
        first, rest = [leaves[n] for n in NAMES[:3]], [leaves[n] for n in NAMES[3:]]
        return linear_logprob(*first, y, *rest, 1.0, p, **(logits or {}))

    @pytest.mark.parametrize(
        ("replaced", "error", "message"),
        [
            ({"hidden": [1.0]}, TypeError, "hidden must be a floating-point tensor, got list"),
            ({"hidden": torch.ones(2, 71)}, ValueError, r"hidden must be \[..., 72\] to fit weight \(133, 72\), got"),
            ({"hidden": torch.ones(2, 72).half()}, TypeError, "hidden must have the dtype of weight, torch.float32"),
            ({"weight": "w"}, TypeError, "weight must be a tensor or an NF4Weight, got str"),
            ({"bias": torch.ones(36)}, ValueError, r"bias must be \[133\] to fit weight \(133, 72\), got \(36,\)"),
            ({"lora_a": None}, ValueError, "lora_a and lora_b go together"),
            ({"lora_b": torch.ones(133, 4)}, ValueError, r"lora_b must be \(133, 3\) .* got \(133, 4\)"),
            ({"targets": torch.ones(18).long()}, ValueError, r"targets must be \(19,\) to fit hidden, got \(18,\)"),
            ({"targets": torch.ones(19)}, TypeError, "targets must be an int64 tensor, got torch.float32"),
            ({"targets": None, "p": 1.5}, ValueError, r"dropout_p must be in \[0, 1\], got 1.5"),
            ({"targets": torch.ones(19, device="meta").long()}, ValueError, "targets is on meta, hidden on cpu"),
            ({"logits": {"temperature": 0.0}}, ValueError, "temperature must be positive and finite, got 0.0"),
            ({"logits": {"softcap": -1.0}}, ValueError, "softcap must be positive and finite, got -1.0"),
            ({"logits": {"logit_scale": float("nan")}}, ValueError, "logit_scale must be positive and finite, got nan"),
            ({"logits": {"reference_hidden": torch.ones(2, 72)}}, ValueError, r"reference_hidden must be \(19, 72\)"),
            ({"logits": {"reference_hidden": 1}}, TypeError, "reference_hidden must be a floating-point tensor, got i"),
        ],
    )  # fmt: skip
    def test_is_named(self, replaced, error, message):
        with pytest.raises(error, match=message):
            self.call(**replaced)

    @pytest.mark.parametrize("target", [133, -1, -101, 2**40])
    def test_targets_out_of_range(self, target):
        targets = torch.zeros(19, dtype=torch.int64)
        targets[4] = target
        with pytest.raises(ValueError, match=rf"targets must be in \[0, 133\) or ignore_index -100, got {target}"):
            self.call(targets=targets)

    @pytest.mark.gpu
    def test_targets_out_of_range_on_a_gpu_are_nan(self):
        leaves, targets = problem(device="cuda")
        targets[4] = 133
        logp, _ = call(linear_logprob, leaves, targets)
        assert torch.equal(logp.isnan(), torch.arange(19, device="cuda") == 4)
