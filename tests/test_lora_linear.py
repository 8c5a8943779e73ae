"""ops.lora_linear against its formula in float64: on the reference, on the kernels in the interpreter, on a GPU."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from numerics import assert_as_accurate
from peft_ops import nf4
from peft_ops.nf4 import NF4Weight
from peft_ops.ops import lora_linear
from peft_ops.reference import dropout, formulas

NAMES = ("x", "weight", "bias", "lora_a", "lora_b")
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def problem(M=17, K=72, N=37, R=3, dtype=torch.float32, adapter=None, base="dense", device="cpu", bias=True):
    """{name: leaf} of a layer whose low-rank term is as large as its base term."""
    adapter = adapter or dtype
    make = lambda *shape, scale=1.0: torch.randn(*shape) * scale
    weight = make(N, K, scale=K**-0.5)
    weight = nf4.quantize(weight.to(dtype)).to(device) if base == "nf4" else weight.to(device, dtype)
    leaves = {
        "x": make(M, K).to(device, dtype).requires_grad_(),
        "weight": weight,
        "bias": make(N).to(device, dtype).requires_grad_() if bias else None,
        "lora_a": make(R, K, scale=K**-0.5).to(device, adapter).requires_grad_(),
        "lora_b": make(N, R, scale=R**-0.5).to(device, adapter).requires_grad_(),
    }
    return leaves


def gradients(function, leaves, p, seed, direction, scaling=0.75):
    """{name: tensor}: y and the gradient of <y, direction> for every leaf that requires one."""
    y = function(*(leaves[name] for name in NAMES), scaling, p, seed)
    wanted = {n: t for n, t in leaves.items() if isinstance(t, torch.Tensor) and t.requires_grad}
    grads = torch.autograd.grad(y, list(wanted.values()), direction.to(y.dtype))
    return {"y": y, **{f"d{name}": g for name, g in zip(wanted, grads, strict=True)}}


def formula(x, weight, bias, a, b, scaling, p, seed):
    return formulas.lora_linear(x, weight, bias, a, b, scaling, p, torch.tensor(seed, device=x.device))


def upcast(leaves):
    double = lambda t: t.detach().double().requires_grad_(t.requires_grad)
    return {n: double(t) if isinstance(t, torch.Tensor) else t for n, t in leaves.items()}


def assert_accurate(leaves, p=0.0, seed=7, direction=None):
    n = leaves["weight"].shape[0]
    direction = torch.randn(leaves["x"].shape[0], n, device=leaves["x"].device) if direction is None else direction
    ours = gradients(lora_linear, leaves, p, seed, direction)
    same_dtype = gradients(formula, leaves, p, seed, direction)
    exact = gradients(formula, upcast(leaves), p, seed, direction.to(leaves["x"].dtype).double())
    for name in exact:
        if exact[name].norm() == 0:
            assert p == 1.0, name
            assert ours[name].norm() == 0, name
        else:
            assert_as_accurate(name, ours[name], same_dtype[name], exact[name], times=2.0 if name == "y" else 3.0)
    return ours


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", FLOATS)
def test_forward_and_gradients(dtype, p, base, device):
    assert_accurate(problem(dtype=dtype, base=base, device=device), p)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_float32_adapters_on_a_16_bit_base(dtype, base, device):
    """Case 24: their gradients are float32 and as exact as if x and dy had been widened, which they are not."""
    leaves = problem(M=70, K=128, dtype=dtype, adapter=torch.float32, base=base, device=device)
    ours = assert_accurate(leaves, 0.3)
    assert ours["dlora_a"].dtype == ours["dlora_b"].dtype == torch.float32
    assert ours["y"].dtype == ours["dx"].dtype == dtype


@pytest.mark.parametrize(("M", "K", "N"), [(1, 8, 1), (1, 131, 37), (67, 13, 130), (5, 200, 3)])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_tails_and_prime_sizes(M, K, N, base, device):
    assert_accurate(problem(M, K, N, base=base, device=device), 0.1)


@pytest.mark.parametrize("rank", [1, 3, 4, 8, 64, 256])
def test_every_rank(rank, device):
    assert_accurate(problem(M=9, K=40, N=24, R=rank, device=device), 0.1)


def test_more_blocks_than_one(device):
    """Several blocks of M, N and K in every kernel, and split reductions."""
    assert_accurate(problem(M=200, K=600, N=300, R=5, device=device), 0.1)


@pytest.mark.parametrize("shape", [(72,), (5, 72), (2, 5, 72), (2, 3, 5, 72)])
def test_leading_dimensions(shape, device):
    leaves = problem(device=device)
    x = torch.randn(shape, device=device)
    y = lora_linear(x, *(leaves[n] for n in NAMES[1:]), 0.75)
    flat = formula(x.reshape(-1, 72), *(leaves[n] for n in NAMES[1:]), 0.75, 0.0, 0)
    assert y.shape == (*shape[:-1], 37)
    torch.testing.assert_close(y.reshape(-1, 37), flat)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset"])
def test_strided_inputs(layout, device):
    """Cases 3 and 9: x as a transposed view, as every second column, as a slice that starts at an odd address."""
    leaves = problem(device=device)
    wide = torch.randn(18, 145, device=device)
    x = {"transposed": torch.randn(72, 17, device=device).t(), "sliced": wide[:17, :144:2], "offset": wide[1:, 1:73]}
    leaves["x"] = x[layout].detach().requires_grad_()
    assert_accurate(leaves, 0.3)


def test_a_transposed_weight_is_used_as_it_lies(device):
    """GPT-2's Conv1D keeps its weight as [in_features, out_features]."""
    leaves = problem(device=device)
    leaves["weight"] = torch.randn(72, 37, device=device).t()
    assert_accurate(leaves)


@pytest.mark.parametrize("how", ["sum", "sliced", "transposed"])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_strided_output_gradients(how, base, device):
    """Cases 1 and 2: stride-0 gradients of .sum(), sliced and transposed gradients."""
    direction = {
        "sum": torch.ones((), device=device).expand(17, 37),
        "sliced": torch.randn(17, 74, device=device)[:, ::2],
        "transposed": torch.randn(37, 17, device=device).t(),
    }[how]
    assert_accurate(problem(device=device, base=base), 0.3, direction=direction)


@pytest.mark.parametrize("shape", [(0, 72), (2, 0, 72)])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_no_rows(shape, base, device):
    leaves = problem(device=device, base=base)
    leaves["x"] = torch.randn(shape, device=device, requires_grad=True)
    y = lora_linear(*(leaves[n] for n in NAMES), 0.75, 0.1)
    y.sum().backward()
    assert y.shape == (*shape[:-1], 37)
    for name in ("bias", "lora_a", "lora_b"):
        assert leaves[name].grad.abs().max() == 0, name


@pytest.mark.parametrize("trainable", [(n,) for n in NAMES] + [("lora_a", "lora_b"), ("x", "bias"), NAMES])
def test_only_what_is_trained_gets_a_gradient(trainable, device):
    """Case 16: every mask gives None where frozen and the same values elsewhere."""
    leaves = {n: t.detach() for n, t in problem(device=device).items()}
    for name in trainable:
        leaves[name].requires_grad_()
    assert_accurate(leaves, 0.3)
    lora_linear(*(leaves[n] for n in NAMES), 0.75, 0.3, 7).square().sum().backward()
    assert {n for n in NAMES if leaves[n].grad is not None} == set(trainable)


@pytest.mark.parametrize(("base", "p"), [("dense", 0.0), ("dense", 0.3), ("nf4", 0.3)])
def test_saves_x_and_s_alone(base, p, device):
    """Case 17: beyond x and references to parameters only S [M, r] and the seed are kept."""
    leaves = problem(M=64, K=128, N=96, R=4, base=base, device=device)
    parameters = {t.data_ptr() for t in leaves.values() if isinstance(t, torch.Tensor)}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        lora_linear(*(leaves[n] for n in NAMES), 0.75, p)
    beyond = [t for t in saved if t.data_ptr() not in parameters]
    assert sum(t.nbytes for t in beyond) == 64 * 4 * 4 + (8 if p else 0)
    assert leaves["x"].data_ptr() in {t.data_ptr() for t in saved}


def test_frozen_adapter_does_not_keep_x(device):
    leaves = problem(device=device)
    frozen = [t if n in ("x", "weight") or t is None else t.detach() for n, t in leaves.items()]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        lora_linear(*frozen, 0.75)
    assert leaves["x"].data_ptr() not in {t.data_ptr() for t in saved}


def test_inputs_and_gradient_stay_as_they_are(device):
    """Case 18."""
    leaves = problem(device=device)
    direction = torch.randn(17, 37, device=device)
    before = {n: t.detach().clone() for n, t in leaves.items()}, direction.clone()
    gradients(lora_linear, leaves, 0.3, 7, direction)
    assert all(torch.equal(before[0][n], leaves[n]) for n in NAMES)
    assert torch.equal(before[1], direction)


def test_retain_graph_twice_is_identical_and_runs_are_deterministic(device):
    """Cases 15 and 19."""
    leaves = problem(M=200, device=device)
    inputs = [leaves[n] for n in ("x", "lora_a", "lora_b")]
    direction = torch.randn(200, 37, device=device)
    runs = []
    for _ in range(2):
        y = lora_linear(*(leaves[n] for n in NAMES), 0.75, 0.3, 7)
        runs += [torch.autograd.grad(y, inputs, direction, retain_graph=True) for _ in range(2)]
    assert all(g.abs().max() > 0 for g in runs[0])
    assert all(torch.equal(g, h) for run in runs[1:] for g, h in zip(runs[0], run, strict=True))


def test_double_backward_raises(device):
    leaves = problem(device=device)
    y = lora_linear(*(leaves[n] for n in NAMES), 0.75)
    (dx,) = torch.autograd.grad(y.square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_replays_the_mask(reentrant, device):
    """Case 21: the seed comes from torch's generator, which both modes restore."""
    results = []
    for wrap in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=reentrant)):
        torch.manual_seed(3)
        leaves = problem(device=device)
        y = wrap(lambda x, rest=leaves: lora_linear(x, *(rest[n] for n in NAMES[1:]), 0.75, 0.4), leaves["x"])
        y.square().sum().backward()
        results.append([y, *(leaves[n].grad for n in ("x", "lora_a", "lora_b"))])
    assert all(torch.equal(g, h) and g.abs().max() > 0 for g, h in zip(*results, strict=True))


def test_seed_decides_the_mask(device):
    leaves = problem(device=device)
    run = lambda seed: lora_linear(*(leaves[n] for n in NAMES), 0.75, 0.3, seed)
    assert torch.equal(run(3), run(3))
    assert torch.equal(run(3), run(torch.tensor(3, device=device)))
    assert not torch.equal(run(3), run(4))
    torch.manual_seed(1)
    drawn = run(None), run(None)
    torch.manual_seed(1)
    assert torch.equal(drawn[0], run(None))
    assert not torch.equal(*drawn)


def test_dropout_keeps_the_expectation(device):
    """Averaged over seeds the low-rank term is the one without dropout."""
    leaves = {n: None if t is None else t.detach() for n, t in problem(M=4, bias=False, device=device).items()}
    run = lambda p, seed: lora_linear(*(leaves[n] for n in NAMES), 1.0, p, seed)
    mean = torch.stack([run(0.5, seed) for seed in range(60)]).mean(0)
    clean = formula(*(leaves[n] for n in NAMES), 1.0, 0.0, 0)
    assert (mean - clean).norm() < 0.35 * (clean - leaves["x"] @ leaves["weight"].t()).norm()


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_autocast(weight_dtype, device):
    """Case 23: x is cast as by nn.Linear; gradients keep their parameter's dtype."""
    leaves = problem(device=device)
    leaves["weight"] = leaves["weight"].to(weight_dtype)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = lora_linear(*(leaves[n] for n in NAMES), 0.75)
        y.float().square().sum().backward()
    exact = formula(*(upcast(leaves)[n] for n in NAMES), 0.75, 0.0, 0)
    assert y.dtype == torch.bfloat16
    assert (y.double() - exact).norm() < 1e-2 * exact.norm()
    assert all(leaves[n].grad.dtype == torch.float32 for n in ("x", "lora_a", "lora_b", "bias"))


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_silent_adapter_equals_the_base_exactly(dtype, base, device):
    """Case 25: B = 0, or scaling = 0."""
    leaves = problem(dtype=dtype, base=base, device=device)
    x, weight, bias, a, b = (leaves[n] for n in NAMES)
    if base == "nf4":
        from peft_ops.ops import nf4_linear

        plain = nf4_linear(x, weight, bias)
    else:
        plain = torch.nn.functional.linear(x, weight, bias)
    assert torch.equal(lora_linear(x, weight, bias, a, torch.zeros_like(b), 0.75), plain)
    assert torch.equal(lora_linear(x, weight, bias, a, b, 0.0), plain)


def test_inference_saves_nothing(device):
    leaves = problem(device=device)
    saved = []
    with (
        torch.inference_mode(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t),
    ):
        y = lora_linear(*(leaves[n] for n in NAMES), 0.75, 0.1)
    assert y.is_inference()
    assert not saved


def test_a_nan_stays_in_its_row(device):
    """Case 11: in y, ds and dx; an infinite column that dropout drops does no harm."""
    leaves = problem(device=device)
    with torch.no_grad():
        leaves["x"][5, 3] = float("nan")
    out = gradients(lora_linear, leaves, 0.0, 7, torch.randn(17, 37, device=device))
    assert out["y"][5].isnan().all()
    assert out["y"][torch.arange(17, device=device) != 5].isfinite().all()
    assert out["dx"].isfinite().all()


def test_float16_overflow_gives_the_references_infinities(device):
    """Case 12."""
    leaves = problem(dtype=torch.float16, device=device)
    with torch.no_grad():
        leaves["x"][2] *= 1e4
        leaves["weight"].mul_(100)
    args = [leaves[n] for n in NAMES]
    ours, reference = lora_linear(*args, 1.0), formula(*args, 1.0, 0.0, 0)
    assert reference[2].isinf().any()
    assert torch.equal(ours[2].isinf(), reference[2].isinf())
    assert ours[torch.arange(17, device=device) != 2].isfinite().all()


def test_cancelling_and_lopsided_data(device):
    """Case 14: rows that cancel to nearly nothing, one outlier column."""
    leaves = problem(M=12, device=device)
    with torch.no_grad():
        leaves["x"][:, 1::2] = -leaves["x"][:, ::2]
        leaves["weight"][:, 1::2] = leaves["weight"][:, ::2] * (1 + 1e-3)
        leaves["x"][:, 7] *= 1e3
    assert_accurate(leaves)


def test_gradcheck():
    leaves = upcast(problem(M=3, K=16, N=5, R=2))
    arguments = tuple(leaves[n].requires_grad_() for n in NAMES)
    assert torch.autograd.gradcheck(lambda *t: lora_linear(*t, 0.75, 0.3, 7), arguments)


def test_vmap_and_functional_gradients():
    """Case 31: inside functorch transforms the plain formula runs."""
    leaves = {n: t.detach() for n, t in problem(M=6, K=16, N=5).items()}
    args = [leaves[n] for n in NAMES[1:]]
    batched = torch.vmap(lambda x: lora_linear(x, *args, 0.75))(leaves["x"].view(2, 3, 16))
    torch.testing.assert_close(batched.view(6, 5), lora_linear(leaves["x"], *args, 0.75))
    loss = lambda a: lora_linear(leaves["x"], args[0], args[1], a, args[3], 0.75).square().sum()
    a = args[2].clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(args[2]), torch.autograd.grad(loss(a), a)[0])


def test_deepcopied_and_moved_nf4_weights_serve_alike():
    leaves = problem(base="nf4")
    other = copy.deepcopy(leaves["weight"])
    args = [leaves[n] for n in ("bias", "lora_a", "lora_b")]
    assert torch.equal(
        lora_linear(leaves["x"], other, *args, 1.0), lora_linear(leaves["x"], leaves["weight"], *args, 1.0)
    )


class TestBadInput:
    def call(self, p=0.0, **replaced):
        leaves = {**problem(), **replaced}
        return lora_linear(*(leaves[n] for n in NAMES), 1.0, p)

    @pytest.mark.parametrize(
        ("replaced", "error", "message"),
        [
            (
                {"x": torch.ones(2, 72, dtype=torch.int64)},
                TypeError,
                "x must be a floating-point tensor, got torch.int64",
            ),
            (
                {"x": torch.ones(2, 72, dtype=torch.complex64)},
                TypeError,
                "x must be a floating-point .* got torch.complex",
            ),
            ({"x": [1.0]}, TypeError, "x must be a floating-point tensor, got list"),
            ({"x": torch.ones(2, 71)}, ValueError, r"x must be \[..., 72\] to fit weight \(37, 72\), got \(2, 71\)"),
            ({"x": torch.ones(())}, ValueError, r"x must be \[..., 72\]"),
            (
                {"x": torch.ones(2, 72).half()},
                TypeError,
                "x must have the dtype of weight, torch.float32, got torch.float16",
            ),
            ({"weight": "w"}, TypeError, "weight must be a tensor or an NF4Weight, got str"),
            ({"weight": torch.ones(72)}, ValueError, r"weight must be \[out_features, in_features\], got \(72,\)"),
            ({"bias": torch.ones(36)}, ValueError, r"bias must be \[37\] to fit weight \(37, 72\), got \(36,\)"),
            ({"lora_a": torch.ones(3, 71)}, ValueError, r"lora_a must be \[r, 72\] with r >= 1 .* got \(3, 71\)"),
            ({"lora_a": torch.ones(0, 72)}, ValueError, r"lora_a must be \[r, 72\] with r >= 1 .* got \(0, 72\)"),
            ({"lora_b": torch.ones(37, 4)}, ValueError, r"lora_b must be \(37, 3\) .* got \(37, 4\)"),
            ({"lora_b": torch.ones(37, 3, device="meta")}, ValueError, "lora_b is on meta, x on cpu"),
            ({"lora_a": torch.ones(3, 72).int()}, TypeError, "lora_a must be a floating-point tensor, got torch.int32"),
        ],
    )
    def test_is_named(self, replaced, error, message):
        with pytest.raises(error, match=message):
            self.call(**replaced)

    @pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
    def test_dropout_outside_its_range(self, p):
        with pytest.raises(ValueError, match=r"dropout_p must be in \[0, 1\], got"):
            self.call(p=p)

    def test_nf4_weight_with_too_few_bytes(self):
        whole = nf4.quantize(torch.randn(37, 72))
        with pytest.raises(ValueError, match=r"needs 1332 packed bytes and 42 scales, got packed \(1331,\)"):
            self.call(weight=replace(whole, packed=whole.packed.flatten()[:-1]))
        with pytest.raises(ValueError, match=r"needs 1332 packed bytes and 42 scales, .* absmax \(41,\)"):
            self.call(weight=replace(whole, absmax=whole.absmax[:-1]))

    def test_nf4_weight_of_one_dimension(self):
        flat = nf4.quantize(torch.randn(72))
        assert isinstance(flat, NF4Weight)
        with pytest.raises(ValueError, match=r"weight must be \[out_features, in_features\], got \(72,\)"):
            self.call(weight=flat)


def test_the_mask_is_fair_and_philox():
    """The mean of the mask, independence of seeds, rows numbered from a start, and Philox's own test vector."""
    keep = dropout.dropout_keep((512, 1003), 0.1, torch.tensor(3))
    assert abs(keep.double().mean() - 0.9) < 4 * (0.09 / keep.numel()) ** 0.5
    other = dropout.dropout_keep((512, 1003), 0.1, torch.tensor(4))
    assert abs((keep != other).double().mean() - 0.18) < 4 * (0.1476 / keep.numel()) ** 0.5
    assert torch.equal(keep[100:], dropout.dropout_keep((412, 1003), 0.1, torch.tensor(3), first_row=100))
    words = dropout._philox_4x32(torch.zeros(1, dtype=torch.int64), torch.tensor(0), rounds=10)
    assert [int(w) for w in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # Random123, kat_vectors
    assert dropout.dropout_keep((64, 4096), 0.999999, torch.tensor(0)).double().mean() < 1e-3
