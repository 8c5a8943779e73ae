"""ops.dora_linear and dora_norm against their formulas in float64: on the reference, in the interpreter, on a GPU."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from numerics import assert_as_accurate
from peft_ops import nf4
from peft_ops.ops import dora_linear, dora_norm, lora_linear
from peft_ops.reference import dropout

NAMES = ("x", "weight", "bias", "lora_a", "lora_b", "magnitude")
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def problem(M=17, K=72, N=37, R=3, dtype=torch.float32, adapter=None, base="dense", device="cpu", bias=True):
    """{name: leaf} of a layer whose low-rank term is as large as its base term, and whose scales are far from 1."""
    adapter = adapter or dtype
    make = lambda *shape, scale=1.0: torch.randn(*shape) * scale
    weight = make(N, K, scale=K**-0.5)
    weight = nf4.quantize(weight.to(dtype), 32).to(device) if base == "nf4" else weight.to(device, dtype)
    return {
        "x": make(M, K).to(device, dtype).requires_grad_(),
        "weight": weight,
        "bias": make(N).to(device, dtype).requires_grad_() if bias else None,
        "lora_a": make(R, K, scale=K**-0.5).to(device, adapter).requires_grad_(),
        "lora_b": make(N, R, scale=R**-0.5).to(device, adapter).requires_grad_(),
        "magnitude": (0.5 + 2 * torch.rand(N)).to(device, adapter).requires_grad_(),
    }


def formula(x, weight, bias, a, b, magnitude, scaling, p, seed):
    """Equations 5 and 11 of the paper in plain operations; the weight in the dtype of x, norm and adapter wider."""
    seed = torch.tensor(seed, device=x.device)
    wide = torch.promote_types(a.dtype, torch.float32)
    dense = weight if isinstance(weight, torch.Tensor) else nf4.dequantize(weight, wide)
    adapted = dense.to(wide) + scaling * b.to(wide) @ a.to(wide)
    g = magnitude.to(wide) / adapted.detach().square().sum(1).sqrt()
    low_rank = dropout.dropout(x.to(torch.promote_types(x.dtype, a.dtype)), p, seed) @ a.T @ b.T
    y = g * ((x @ dense.to(x.dtype).T).to(wide) + scaling * low_rank)
    return (y if bias is None else y + bias).to(x.dtype)


def gradients(function, leaves, p, seed, direction, scaling=0.75):
    """{name: tensor}: y and the gradient of <y, direction> for every leaf that requires one."""
    y = function(*(leaves[name] for name in NAMES), scaling, p, seed)
    wanted = {n: t for n, t in leaves.items() if isinstance(t, torch.Tensor) and t.requires_grad}
    grads = torch.autograd.grad(y, list(wanted.values()), direction.to(y.dtype))
    return {"y": y, **{f"d{name}": g for name, g in zip(wanted, grads, strict=True)}}


def upcast(leaves):
    double = lambda t: t.detach().double().requires_grad_(t.requires_grad)
    return {n: double(t) if isinstance(t, torch.Tensor) else t for n, t in leaves.items()}


def assert_accurate(leaves, p=0.0, seed=7, direction=None):
    n = leaves["weight"].shape[0]
    direction = torch.randn(leaves["x"].shape[0], n, device=leaves["x"].device) if direction is None else direction
    ours = gradients(dora_linear, leaves, p, seed, direction)
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
    """Case 24: gradients of the adapter and the magnitude are float32, and as exact as if x had been widened."""
    leaves = problem(M=70, K=128, dtype=dtype, adapter=torch.float32, base=base, device=device)
    ours = assert_accurate(leaves, 0.3)
    assert {ours[f"d{n}"].dtype for n in ("lora_a", "lora_b", "magnitude")} == {torch.float32}
    assert ours["y"].dtype == ours["dx"].dtype == dtype


@pytest.mark.parametrize(("M", "K", "N"), [(1, 8, 1), (1, 131, 37), (67, 13, 130), (5, 200, 3)])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_tails_and_prime_sizes(M, K, N, base, device):
    """Cases 5 and 6: sizes that no block divides, NF4 blocks across rows."""
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
    y = dora_linear(x, *(leaves[n] for n in NAMES[1:]), 0.75)
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


def test_strided_parameters(device):
    """A transposed weight (GPT-2's Conv1D), transposed adapters, every second magnitude."""
    leaves = problem(device=device)
    leaves["weight"] = torch.randn(72, 37, device=device).t()
    leaves["lora_a"] = torch.randn(72, 3, device=device).t().requires_grad_()
    leaves["lora_b"] = torch.randn(3, 37, device=device).t().requires_grad_()
    leaves["magnitude"] = torch.rand(74, device=device)[::2].requires_grad_()
    leaves["bias"] = torch.randn(74, device=device)[::2].requires_grad_()
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
    y = dora_linear(*(leaves[n] for n in NAMES), 0.75, 0.1)
    y.sum().backward()
    assert y.shape == (*shape[:-1], 37)
    for name in ("bias", "lora_a", "lora_b", "magnitude"):
        assert leaves[name].grad.abs().max() == 0, name


@pytest.mark.parametrize("trainable", [(n,) for n in NAMES] + [("lora_a", "lora_b"), ("x", "magnitude"), NAMES])
def test_only_what_is_trained_gets_a_gradient(trainable, device):
    """Case 16: every mask gives None where frozen and the same values elsewhere."""
    leaves = {n: t.detach() for n, t in problem(device=device).items()}
    for name in trainable:
        leaves[name].requires_grad_()
    assert_accurate(leaves, 0.3)
    dora_linear(*(leaves[n] for n in NAMES), 0.75, 0.3, 7).square().sum().backward()
    assert {n for n in NAMES if leaves[n].grad is not None} == set(trainable)


@pytest.mark.parametrize(("base", "p"), [("dense", 0.0), ("dense", 0.3), ("nf4", 0.3)])
@pytest.mark.parametrize("frozen_magnitude", [False, True])
def test_saves_x_s_and_one_output(base, p, frozen_magnitude, device):
    """Case 17: beyond x and references to parameters S [M, r], g, seed and, for the magnitude, u [M, N] and norm."""
    leaves = problem(M=64, K=128, N=96, R=4, base=base, dtype=torch.float16, device=device)
    leaves["magnitude"].requires_grad_(not frozen_magnitude)
    parameters = {t.data_ptr() for t in leaves.values() if isinstance(t, torch.Tensor)}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = dora_linear(*(leaves[n] for n in NAMES), 0.75, p)
    beyond = [t for t in saved if t.data_ptr() not in parameters]
    least = 64 * 4 * 4 + 96 * 4 + (8 if p else 0)
    assert sum(t.nbytes for t in beyond) == least + (0 if frozen_magnitude else 64 * 96 * 2 + 96 * 4)
    assert y.data_ptr() not in {t.data_ptr() for t in saved}  # so y may be changed in place


def test_frozen_adapter_does_not_keep_x(device):
    leaves = problem(device=device)
    frozen = [t if n in ("x", "weight") or t is None else t.detach() for n, t in leaves.items()]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        dora_linear(*frozen, 0.75)
    assert leaves["x"].data_ptr() not in {t.data_ptr() for t in saved}
    assert sum(t.nbytes for t in saved if t.data_ptr() not in {f.data_ptr() for f in frozen}) == 37 * 4


def test_inputs_and_gradient_stay_as_they_are(device):
    """Case 18."""
    leaves = problem(device=device)
    direction = torch.randn(17, 37, device=device)
    before = {n: t.detach().clone() for n, t in leaves.items()}, direction.clone()
    gradients(dora_linear, leaves, 0.3, 7, direction)
    assert all(torch.equal(before[0][n], leaves[n]) for n in NAMES)
    assert torch.equal(before[1], direction)


def test_retain_graph_twice_is_identical_and_runs_are_deterministic(device):
    """Cases 15 and 19."""
    leaves = problem(M=200, device=device)
    inputs = [leaves[n] for n in ("x", "lora_a", "lora_b", "magnitude")]
    direction = torch.randn(200, 37, device=device)
    runs = []
    for _ in range(2):
        y = dora_linear(*(leaves[n] for n in NAMES), 0.75, 0.3, 7)
        runs += [torch.autograd.grad(y, inputs, direction, retain_graph=True) for _ in range(2)]
    assert all(g.abs().max() > 0 for g in runs[0])
    assert all(torch.equal(g, h) for run in runs[1:] for g, h in zip(runs[0], run, strict=True))


def test_double_backward_raises(device):
    leaves = problem(device=device)
    y = dora_linear(*(leaves[n] for n in NAMES), 0.75)
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
        y = wrap(lambda x, rest=leaves: dora_linear(x, *(rest[n] for n in NAMES[1:]), 0.75, 0.4), leaves["x"])
        y.square().sum().backward()
        results.append([y, *(leaves[n].grad for n in ("x", "lora_a", "lora_b", "magnitude"))])
    assert all(torch.equal(g, h) and g.abs().max() > 0 for g, h in zip(*results, strict=True))


def test_seed_decides_the_mask(device):
    leaves = problem(device=device)
    run = lambda seed: dora_linear(*(leaves[n] for n in NAMES), 0.75, 0.3, seed)
    assert torch.equal(run(3), run(3))
    assert torch.equal(run(3), run(torch.tensor(3, device=device)))
    assert not torch.equal(run(3), run(4))
    torch.manual_seed(1)
    drawn = run(None), run(None)
    torch.manual_seed(1)
    assert torch.equal(drawn[0], run(None))
    assert not torch.equal(*drawn)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_autocast(weight_dtype, device):
    """Case 23."""
    leaves = problem(device=device)
    leaves["weight"] = leaves["weight"].to(weight_dtype)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = dora_linear(*(leaves[n] for n in NAMES), 0.75)
        y.float().square().sum().backward()
    exact = formula(*(upcast(leaves)[n] for n in NAMES), 0.75, 0.0, 0)
    assert y.dtype == torch.bfloat16
    assert (y.double() - exact).norm() < 1e-2 * exact.norm()
    assert all(leaves[n].grad.dtype == torch.float32 for n in ("x", "lora_a", "lora_b", "magnitude", "bias"))


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_silent_adapter_equals_the_base_exactly(dtype, base, device):
    """Case 25: B = 0 or scaling = 0, and the magnitude that it starts with."""
    leaves = problem(dtype=dtype, base=base, device=device, bias=False)
    x, weight, _, a, b, _ = (leaves[n] for n in NAMES)
    plain = lora_linear(x, weight, None, a, torch.zeros_like(b), 0.75)
    for silent, scaling in ((torch.zeros_like(b), 0.75), (b, 0.0)):
        magnitude = dora_norm(weight, a, silent, scaling)
        assert torch.equal(dora_linear(x, weight, None, a, silent, magnitude, scaling), plain)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_at_the_first_magnitude_it_is_lora(base, device):
    """With magnitude = norm the scale is 1, whatever the adapter."""
    leaves = problem(base=base, device=device)
    x, weight, bias, a, b, _ = (leaves[n] for n in NAMES)
    y = dora_linear(x, weight, bias, a, b, dora_norm(weight, a, b, 0.75), 0.75)
    torch.testing.assert_close(y, lora_linear(x, weight, bias, a, b, 0.75))


def test_inference_saves_nothing(device):
    leaves = problem(device=device)
    saved = []
    with (
        torch.inference_mode(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t),
    ):
        y = dora_linear(*(leaves[n] for n in NAMES), 0.75, 0.1)
    assert y.is_inference()
    assert not saved


def test_a_nan_stays_in_its_row(device):
    """Case 11: in y and dx."""
    leaves = problem(device=device)
    with torch.no_grad():
        leaves["x"][5, 3] = float("nan")
    out = gradients(dora_linear, leaves, 0.0, 7, torch.randn(17, 37, device=device))
    assert out["y"][5].isnan().all()
    assert out["y"][torch.arange(17, device=device) != 5].isfinite().all()
    assert out["dx"].isfinite().all()


def test_a_nan_in_the_weight_stays_in_its_output(device):
    leaves = problem(device=device)
    with torch.no_grad():
        leaves["weight"][4, 3] = float("nan")
    y = dora_linear(*(leaves[n] for n in NAMES), 0.75)
    assert y[:, 4].isnan().all()
    assert y[:, torch.arange(37, device=device) != 4].isfinite().all()


def test_float16_overflow_gives_the_references_infinities(device):
    """Case 12."""
    leaves = problem(dtype=torch.float16, device=device)
    with torch.no_grad():
        leaves["x"][2] *= 1e4
        leaves["weight"].mul_(100)
    args = [leaves[n] for n in NAMES]
    ours, reference = dora_linear(*args, 1.0), formula(*args, 1.0, 0.0, 0)
    assert reference[2].isinf().any()
    assert torch.equal(ours[2].isfinite(), reference[2].isfinite())
    assert ours[torch.arange(17, device=device) != 2].isfinite().all()


def test_a_row_of_zeros_gives_no_nan(device):
    """Its direction is not defined: 0 / 0 in the formula. Here it starts as 1 · 0, and B can leave it."""
    leaves = problem(device=device)
    with torch.no_grad():
        leaves["weight"][4] = 0
        leaves["lora_b"][4] = 0
        leaves["magnitude"].copy_(dora_norm(*(leaves[n] for n in ("weight", "lora_a", "lora_b")), 0.75))
    out = gradients(dora_linear, leaves, 0.0, 7, torch.randn(17, 37, device=device))
    assert torch.equal(out["y"][:, 4], leaves["bias"][4].expand(17))
    assert all(t.isfinite().all() for t in out.values())
    assert out["dlora_b"][4].abs().max() > 0


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("base", ["dense", "nf4", "nf4 nested"])
@pytest.mark.parametrize(("N", "K", "R"), [(1, 1, 1), (37, 131, 3), (70, 256, 40), (300, 640, 5), (5, 4096, 4)])
def test_norm(N, K, R, base, dtype, device):
    w = (torch.randn(N, K) * K**-0.5).to(dtype)
    weight = nf4.quantize(w, 64, "nested" in base).to(device) if "nf4" in base else w.to(device)
    a, b = torch.randn(R, K, device=device) * K**-0.5, torch.randn(N, R, device=device) * R**-0.5
    plain = nf4.dequantize(weight, torch.float32) if "nf4" in base else weight.float()
    same_dtype, exact = (torch.linalg.norm(w + 0.5 * b @ a, dim=1) for w, b, a in ((plain, b, a), (
        plain.double(), b.double(), a.double())))  # fmt: skip
    norm = dora_norm(weight, a, b, 0.5)
    assert norm.dtype == torch.float32
    assert_as_accurate("norm", norm, same_dtype, exact)


def test_norm_where_the_adapter_cancels_the_weight(device):
    """Case 14: what is left is a thousandth of what was there; expanding the square would lose all but one digit."""
    a, b = torch.randn(4, 200, device=device), torch.randn(50, 4, device=device)
    w = -b @ a + 1e-3 * torch.randn(50, 200, device=device)
    exact = torch.linalg.norm(w.double() + b.double() @ a.double(), dim=1)
    assert exact.max() < 3e-3 * w.norm(dim=1).max()
    assert_as_accurate("norm", dora_norm(w, a, b, 1.0), torch.linalg.norm(w + b @ a, dim=1), exact)


def test_norm_has_no_gradient_and_takes_parts(device):
    leaves = problem(device=device)
    weight, a, b = (leaves[n] for n in ("weight", "lora_a", "lora_b"))
    norm = dora_norm(weight, a, b, 0.5)
    assert not norm.requires_grad
    torch.testing.assert_close(dora_norm(weight[3:20], a, b[3:20], 0.5), norm[3:20])
    halves = [dora_norm(weight[:, i::2], a[:, i::2], b, 0.5) for i in (0, 1)]
    torch.testing.assert_close(torch.hypot(*halves), norm)
    assert dora_norm(weight.double(), a.double(), b.double(), 0.5).dtype == torch.float64


@pytest.mark.parametrize("bias", [False, True])
def test_equals_peft(bias):
    """PEFT's layer on the same numbers, without dropout: output and every gradient."""
    peft = pytest.importorskip("peft")
    linear = torch.nn.Linear(72, 37, bias=bias).requires_grad_(False)
    model = peft.get_peft_model(
        torch.nn.Sequential(linear),
        peft.LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules=["0"], init_lora_weights=False),
    )
    layer = model.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    magnitude = layer.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(dora_norm(linear.weight, a, b, 2.0), magnitude.detach())
    with torch.no_grad():
        magnitude.mul_(0.5 + torch.rand(37))
    x, dy = torch.randn(2, 5, 72, requires_grad=True), torch.randn(2, 5, 37)
    theirs, ours = layer(x), dora_linear(x, linear.weight, linear.bias, a, b, magnitude, 2.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    inputs = (x, a, b, magnitude)
    for mine, other in zip(*(torch.autograd.grad(y, inputs, dy) for y in (ours, theirs)), strict=True):
        assert other.norm() > 0
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_dropout_keeps_the_expectation_and_spares_the_base(device):
    """Over seeds the mean is the output without dropout; a row whose adapter is silent never changes."""
    leaves = {n: None if t is None else t.detach() for n, t in problem(M=4, device=device).items()}
    leaves["lora_b"][7] = 0
    run = lambda p, seed: dora_linear(*(leaves[n] for n in NAMES), 1.0, p, seed)
    clean, runs = run(0.0, 0), torch.stack([run(0.5, seed) for seed in range(60)])
    assert (runs.mean(0) - clean).norm() < 0.25 * (runs[0] - clean).norm()
    torch.testing.assert_close(runs[:, :, 7], clean[:, 7].expand(60, -1))


def test_gradcheck():
    """Of all but the adapter, in which the norm is a constant to autograd and not to the differences."""
    leaves = upcast(problem(M=3, K=16, N=5, R=2))
    x, weight, bias, a, b, magnitude = (leaves[n] for n in NAMES)
    assert torch.autograd.gradcheck(
        lambda x, bias, magnitude: dora_linear(x, weight, bias, a, b, magnitude, 0.75, 0.3, 7), (x, bias, magnitude)
    )


def test_vmap_and_functional_gradients():
    """Case 31: inside functorch transforms the plain formula runs."""
    leaves = {n: t.detach() for n, t in problem(M=6, K=16, N=5).items()}
    args = [leaves[n] for n in NAMES[1:]]
    batched = torch.vmap(lambda x: dora_linear(x, *args, 0.75))(leaves["x"].view(2, 3, 16))
    torch.testing.assert_close(batched.view(6, 5), dora_linear(leaves["x"], *args, 0.75))
    loss = lambda a: dora_linear(leaves["x"], args[0], args[1], a, *args[3:], 0.75).square().sum()
    a = args[2].clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(args[2]), torch.autograd.grad(loss(a), a)[0])


class TestBadInput:
    def call(self, p=0.0, **replaced):
        leaves = {**problem(), **replaced}
        return dora_linear(*(leaves[n] for n in NAMES), 1.0, p)

    @pytest.mark.parametrize(
        ("replaced", "error", "message"),
        [
            ({"x": [1.0]}, TypeError, "x must be a floating-point tensor, got list"),
            ({"x": torch.ones(2, 71)}, ValueError, r"x must be \[..., 72\] to fit weight \(37, 72\), got \(2, 71\)"),
            ({"weight": "w"}, TypeError, "weight must be a tensor or an NF4Weight, got str"),
            ({"bias": torch.ones(36)}, ValueError, r"bias must be \[37\] to fit weight \(37, 72\), got \(36,\)"),
            ({"lora_a": torch.ones(0, 72)}, ValueError, r"lora_a must be \[r, 72\] with r >= 1 .* got \(0, 72\)"),
            ({"lora_b": torch.ones(37, 4)}, ValueError, r"lora_b must be \(37, 3\) .* got \(37, 4\)"),
            ({"magnitude": torch.ones(36)}, ValueError, r"magnitude must be \[37\] to fit weight, got \(36,\)"),
            ({"magnitude": torch.ones(37, 1)}, ValueError, r"magnitude must be \[37\] to fit weight, got \(37, 1\)"),
            ({"magnitude": torch.ones(37).int()}, TypeError, "magnitude must be a floating-point tensor, got torch.i"),
            ({"magnitude": None}, TypeError, "magnitude must be a floating-point tensor, got NoneType"),
            ({"magnitude": torch.ones(37, device="meta")}, ValueError, "magnitude is on meta, x on cpu"),
        ],
    )
    def test_is_named(self, replaced, error, message):
        with pytest.raises(error, match=message):
            self.call(**replaced)

    @pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
    def test_dropout_outside_its_range(self, p):
        with pytest.raises(ValueError, match=r"dropout_p must be in \[0, 1\], got"):
            self.call(p=p)

    def test_of_the_norm(self):
        w, a, b = torch.ones(4, 8), torch.ones(2, 8), torch.ones(4, 2)
        with pytest.raises(ValueError, match=r"lora_b must be \(4, 2\) .* got \(3, 2\)"):
            dora_norm(w, a, b[:3], 1.0)
        with pytest.raises(ValueError, match="weight is on meta, lora_a on cpu"):
            dora_norm(w.to("meta"), a, b, 1.0)
        with pytest.raises(TypeError, match="weight must be a tensor or an NF4Weight, got list"):
            dora_norm([1.0], a, b, 1.0)
