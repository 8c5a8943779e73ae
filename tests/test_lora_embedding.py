"""ops.lora_embedding against its formula in float64: on the reference, on the kernels in the interpreter, on a GPU."""

import pytest
import torch
from torch import nn

from numerics import assert_as_accurate
from peft_ops.ops import lora_embedding

V, D, R = 50, 37, 3
NAMES = ("weight", "lora_a", "lora_b")
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def problem(dtype=torch.float32, adapter=None, device="cpu", v=V, d=D, r=R):
    adapter = adapter or dtype
    return {
        "weight": torch.randn(v, d).to(device, dtype).requires_grad_(),
        "lora_a": torch.randn(r, v).to(device, adapter).requires_grad_(),
        "lora_b": (torch.randn(d, r) * r**-0.5).to(device, adapter).requires_grad_(),
    }


def indices(*shape, device="cpu", v=V):
    """Some rows often, some never."""
    return torch.randint(0, v, shape, device=device) // 2 * 2


def formula(x, weight, a, b, scaling, padding_idx=None, by_freq=False, scale=1.0):
    """With a one-hot matrix; gradients of the padding row are cut, others divided by how often a row occurs."""
    hot = nn.functional.one_hot(x.long().reshape(-1), weight.shape[0]).to(weight.device)
    wide = torch.promote_types(torch.promote_types(weight.dtype, a.dtype), torch.float32)
    share = torch.ones(weight.shape[0], dtype=wide, device=weight.device)
    if by_freq:
        share = 1 / hot.sum(0).clamp(min=1).to(wide)
    if padding_idx is not None:
        share[padding_idx] = 0
    rows = lambda table: (
        hot.to(wide) @ (table.to(wide) * share[:, None] + table.detach().to(wide) * (1 - share)[:, None])
    )
    y = scale * (rows(weight).to(weight.dtype).to(wide) + scaling * rows(a.T) @ b.to(wide).T)
    return y.to(weight.dtype).view(*x.shape, -1)


def gradients(function, x, leaves, direction, **options):
    y = function(x, *(leaves[name] for name in NAMES), 0.75, **options)
    wanted = {n: t for n, t in leaves.items() if t.requires_grad}
    grads = torch.autograd.grad(y, list(wanted.values()), direction.to(y.dtype))
    return {"y": y, **{f"d{name}": g for name, g in zip(wanted, grads, strict=True)}}


def assert_accurate(x, leaves, direction=None, padding_idx=None, by_freq=False, scale=None):
    direction = torch.randn(*x.shape, leaves["weight"].shape[1], device=x.device) if direction is None else direction
    ours = gradients(
        lora_embedding, x, leaves, direction,
        padding_idx=padding_idx, scale_grad_by_freq=by_freq, embed_scale=scale,
    )  # fmt: skip
    options = {"padding_idx": padding_idx, "by_freq": by_freq, "scale": 1.0 if scale is None else scale}
    same = gradients(formula, x, leaves, direction, **options)
    upcast = {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in leaves.items()}
    exact = gradients(formula, x, upcast, direction.to(leaves["weight"].dtype).double(), **options)
    for name in exact:
        assert_as_accurate(name, ours[name], same[name], exact[name], times=2.0 if name == "y" else 3.0)
    return ours


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [None, 6.0, torch.tensor(5.5)])
def test_forward_and_gradients(dtype, scale, device):
    scale = scale.to(device, dtype) if isinstance(scale, torch.Tensor) else scale
    assert_accurate(indices(2, 9, device=device), problem(dtype, device=device), scale=scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_adapters_on_a_16_bit_base(dtype, device):
    ours = assert_accurate(indices(70, device=device), problem(dtype, torch.float32, device))
    assert ours["dlora_a"].dtype == ours["dlora_b"].dtype == torch.float32
    assert ours["y"].dtype == dtype


@pytest.mark.parametrize("by_freq", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 0, 4])
def test_padding_and_frequency(by_freq, padding_idx, device):
    x = torch.cat([indices(40, device=device), torch.tensor([0, 4, 4], device=device)])
    ours = assert_accurate(x, problem(device=device), padding_idx=padding_idx, by_freq=by_freq)
    for row in (0, 4):
        assert bool(ours["dlora_a"][:, row].any()) == bool(ours["dweight"][row].any()) == (row != padding_idx)


@pytest.mark.parametrize(("v", "d", "r"), [(1, 1, 1), (300, 131, 64), (13, 600, 256)])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3, 5)])
def test_shapes_and_ranks(v, d, r, shape, device):
    assert_accurate(indices(*shape, device=device, v=v), problem(device=device, v=v, d=d, r=r))


def test_int32_and_strided_inputs(device):
    leaves = problem(device=device)
    leaves["weight"] = torch.randn(D, V, device=device).t().requires_grad_()
    leaves["lora_a"] = torch.randn(V, R, device=device).t().requires_grad_()
    x = indices(6, 8, device=device).int().t()[:, ::2]
    assert_accurate(x, leaves, direction=torch.randn(D, 3, 8, device=device).permute(2, 1, 0))
    assert_accurate(x, leaves, direction=torch.ones((), device=device).expand(8, 3, D))


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_rows(shape, device):
    leaves = problem(device=device)
    y = lora_embedding(indices(*shape, device=device), *leaves.values(), 0.75)
    y.sum().backward()
    assert y.shape == (*shape, D)
    assert all(t.grad.abs().max() == 0 for t in leaves.values())


@pytest.mark.parametrize("trainable", [*((n,) for n in NAMES), ("lora_a", "lora_b")])
def test_only_what_is_trained_gets_a_gradient(trainable, device):
    leaves = {n: t.detach().requires_grad_(n in trainable) for n, t in problem(device=device).items()}
    assert_accurate(indices(30, device=device), leaves)


def test_saves_parameters_and_indices_alone(device):
    """Case 17: no [M, d] tensor and no rows of A."""
    leaves, x, saved = problem(device=device), indices(30, device=device), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        lora_embedding(x, *leaves.values(), 0.75)
    assert {t.data_ptr() for t in saved} <= {t.data_ptr() for t in (x, *leaves.values())}


def test_inputs_stay_and_runs_are_equal(device):
    leaves, x, direction = problem(device=device), indices(30, device=device), torch.randn(30, D, device=device)
    before = {n: t.detach().clone() for n, t in leaves.items()}
    runs = [gradients(lora_embedding, x, leaves, direction) for _ in range(2)]
    assert all(torch.equal(runs[0][n], runs[1][n]) for n in runs[0])
    assert all(torch.equal(before[n], leaves[n]) for n in NAMES)


def test_a_silent_adapter_equals_the_base_exactly(device):
    for dtype in FLOATS:
        leaves, x = problem(dtype, device=device), indices(30, device=device)
        weight, a, b = leaves.values()
        for silent in (lora_embedding(x, weight, a * 0, b, 1.0), lora_embedding(x, weight, a, b, 0.0)):
            assert torch.equal(silent, nn.functional.embedding(x, weight))


def test_double_backward_raises_and_vmap_takes_the_formula():
    leaves, x = problem(), indices(6)
    y = lora_embedding(x, *leaves.values(), 0.75)
    (da,) = torch.autograd.grad(y.square().sum(), leaves["lora_a"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        da.sum().backward()
    batched = torch.vmap(lambda x: lora_embedding(x, *leaves.values(), 0.75))(x.view(2, 3))
    torch.testing.assert_close(batched.view(6, D), y)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(3)}, TypeError, "x must be an int64 or int32 tensor, got torch.float32"),
        ({"x": [1]}, TypeError, "x must be an int64 or int32 tensor, got list"),
        ({"weight": torch.ones(V, D).int()}, TypeError, r"weight must be a floating-point tensor \[V, d\], got"),
        ({"weight": torch.ones(V)}, TypeError, r"weight must be a floating-point tensor \[V, d\], got"),
        ({"lora_a": torch.ones(R, V + 1)}, ValueError, r"lora_a must be \[r, 50\] with r >= 1 .* got \(3, 51\)"),
        ({"lora_b": torch.ones(D, R + 1)}, ValueError, r"lora_b must be \(37, 3\) .* got \(37, 4\)"),
        ({"lora_a": torch.ones(R, V).int()}, TypeError, "lora_a must be a floating-point tensor"),
        ({"lora_b": torch.ones(D, R, device="meta")}, ValueError, "lora_b is on meta, x on cpu"),
        ({"x": torch.tensor([V])}, IndexError, "index out of range"),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        lora_embedding(**{"x": indices(3), **problem(), "scaling": 1.0, **change})
