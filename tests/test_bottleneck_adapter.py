"""ops.bottleneck_adapter against its formula in float64: on the reference, the kernels in the interpreter, a GPU."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from numerics import assert_as_accurate
from peft_ops.ops import bottleneck_adapter
from peft_ops.reference import activations

PARAMETERS = ("down_weight", "down_bias", "up_weight", "up_bias")
NAMES = ("x", *PARAMETERS, "residual")
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
ROOT = math.sqrt(2 / math.pi)
ACTIVATIONS = {
    "linear": lambda z: z,
    "relu": lambda z: z.clamp(min=0),
    "leakyrelu": lambda z: torch.where(z > 0, z, 0.01 * z),
    "gelu": lambda z: z * 0.5 * torch.erfc(-z / math.sqrt(2)),
    "gelu_new": lambda z: 0.5 * z * (1 + torch.tanh(ROOT * (z + 0.044715 * z**3))),
    "silu": lambda z: z * torch.sigmoid(z),
    "swish": lambda z: z * torch.sigmoid(z),
    "tanh": torch.tanh,
}


def problem(
    M=17, K=72, m=5, N=None, dtype=torch.float32, adapter=None, device="cpu", bias=True, residual="x", scale=1.0
):
    """{name: leaf} with a branch as large as its residual, which is x itself, a tensor of its own or None."""
    adapter, N = adapter or dtype, N or K
    make = lambda dtype, *shape, scale=1.0: (torch.randn(*shape) * scale).to(device, dtype).requires_grad_()
    leaves = {
        "x": make(dtype, M, K, scale=scale),
        "down_weight": make(adapter, m, K, scale=K**-0.5),
        "down_bias": make(adapter, m, scale=0.5) if bias else None,
        "up_weight": make(adapter, N, m, scale=m**-0.5),
        "up_bias": make(adapter, N, scale=0.5) if bias else None,
    }
    return leaves | {"residual": {"x": leaves["x"], "other": make(dtype, M, N), None: None}[residual]}


def formula(x, down_weight, down_bias, up_weight, up_bias, activation, scaling, residual):
    """In the dtype of the parameters, which is at least that of x; rounded to x's at the end."""
    wide = down_weight.dtype
    z = x.to(wide) @ down_weight.t() + (0 if down_bias is None else down_bias)
    branch = ACTIVATIONS[activation](z) @ up_weight.t() + (0 if up_bias is None else up_bias)
    return ((0 if residual is None else residual.to(wide)) + scaling * branch).to(x.dtype)


def arguments(leaves, activation="gelu", scaling=0.75):
    return (*(leaves[name] for name in NAMES[:-1]), activation, scaling, leaves["residual"])


def gradients(function, leaves, activation, scaling, direction):
    """{name: tensor}: y and the gradient of <y, direction> for every leaf that requires one."""
    y = function(*arguments(leaves, activation, scaling))
    wanted = {n: t for n, t in leaves.items() if t is not None and t.requires_grad}
    if leaves["residual"] is leaves["x"]:
        wanted.pop("residual", None)
    grads = torch.autograd.grad(y, list(wanted.values()), direction.to(y.dtype), allow_unused=True)
    return {"y": y, **{f"d{name}": g for name, g in zip(wanted, grads, strict=True)}}


def upcast(leaves):
    double = {n: None if t is None else t.detach().double().requires_grad_(t.requires_grad) for n, t in leaves.items()}
    return double | ({"residual": double["x"]} if leaves["residual"] is leaves["x"] else {})


def assert_accurate(leaves, activation="gelu", scaling=0.75, direction=None):
    x, n = leaves["x"], leaves["up_weight"].shape[0]
    direction = torch.randn(x.shape[0], n, device=x.device) if direction is None else direction
    ours = gradients(bottleneck_adapter, leaves, activation, scaling, direction)
    same_dtype = gradients(formula, leaves, activation, scaling, direction)
    exact = gradients(formula, upcast(leaves), activation, scaling, direction.to(x.dtype).double())
    for name in exact:
        assert_as_accurate(name, ours[name], same_dtype[name], exact[name], times=2.0 if name == "y" else 3.0)
    return ours


@pytest.mark.parametrize("residual", ["x", "other", None])
@pytest.mark.parametrize("dtype", FLOATS)
def test_forward_and_gradients(dtype, residual, device):
    assert_accurate(problem(dtype=dtype, residual=residual, device=device))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_every_activation(activation, scale, device):
    """Near zero, where Houlsby's adapters start, around one, and where activations saturate."""
    leaves = problem(M=40, m=20, scale=scale, bias=scale == 1.0, device=device)
    assert_accurate({**leaves, "residual": None}, activation)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_parameters_on_a_16_bit_x(dtype, device):
    """Case 24: their gradients are float32 and as exact as if x and dy had been widened, which they are not."""
    ours = assert_accurate(problem(M=70, K=128, m=20, dtype=dtype, adapter=torch.float32, device=device))
    assert all(ours[f"d{name}"].dtype == torch.float32 for name in PARAMETERS)
    assert ours["y"].dtype == ours["dx"].dtype == dtype


@pytest.mark.parametrize(("M", "K", "m", "N"), [(1, 8, 1, 1), (1, 131, 3, 37), (67, 13, 2, 130), (5, 200, 7, 3)])
def test_tails_and_prime_sizes(M, K, m, N, device):
    assert_accurate(problem(M, K, m, N, residual="other", device=device))


@pytest.mark.parametrize("m", [1, 3, 8, 48, 64, 256])
def test_every_width(m, device):
    assert_accurate(problem(M=9, K=40, m=m, device=device))


def test_more_blocks_than_one(device):
    """Several blocks of M, N, K and m in every kernel, and split reductions."""
    assert_accurate(problem(M=300, K=280, m=40, device=device), "relu")
    assert_accurate(problem(M=130, K=70, m=5, N=300, residual="other", device=device), "relu")


@pytest.mark.parametrize("missing", ["down_bias", "up_bias"])
def test_one_bias_alone(missing, device):
    assert_accurate(problem(device=device) | {missing: None})


@pytest.mark.parametrize("shape", [(72,), (5, 72), (2, 5, 72), (2, 3, 5, 72)])
@pytest.mark.parametrize("residual", ["x", "other"])
def test_leading_dimensions(shape, residual, device):
    leaves = problem(device=device)
    x = torch.randn(shape, device=device)
    leaves |= {"x": x, "residual": x if residual == "x" else torch.randn(shape, device=device)}
    flat = leaves | {name: leaves[name].reshape(-1, 72) for name in ("x", "residual")}
    y = bottleneck_adapter(*arguments(leaves))
    assert y.shape == shape
    torch.testing.assert_close(y.reshape(-1, 72), formula(*arguments(flat)))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset"])
@pytest.mark.parametrize("name", ["x", "residual", "both"])
def test_strided_inputs(layout, name, device):
    """Cases 3 and 9: a transposed view, every second column, a slice that starts at an odd address."""
    leaves = problem(device=device, residual="other")
    wide = torch.randn(18, 145, device=device)
    view = {"transposed": torch.randn(72, 17, device=device).t(), "sliced": wide[:17, :144:2], "offset": wide[1:, 1:73]}
    strided = view[layout].detach().requires_grad_()
    assert_accurate(leaves | dict.fromkeys(("x", "residual") if name == "both" else (name,), strided))


def test_strided_parameters(device):
    """Transposed weights, and biases that are every second element."""
    leaves = problem(device=device)
    for name, t in list(leaves.items())[1:5]:
        store = torch.empty(*t.shape[::-1], 2, device=device)
        leaves[name] = store[..., 0].t().copy_(t.detach()) if t.dim() == 2 else store[:, 0].copy_(t.detach())
        leaves[name] = leaves[name].detach().requires_grad_()
        assert not leaves[name].is_contiguous()
    assert_accurate(leaves)


@pytest.mark.parametrize("how", ["sum", "sliced", "transposed"])
@pytest.mark.parametrize("residual", ["x", "other"])
def test_strided_output_gradients(how, residual, device):
    """Cases 1 and 2: stride-0 gradients of .sum(), sliced and transposed gradients."""
    direction = {
        "sum": torch.ones((), device=device).expand(17, 72),
        "sliced": torch.randn(17, 144, device=device)[:, ::2],
        "transposed": torch.randn(72, 17, device=device).t(),
    }[how]
    assert_accurate(problem(device=device, residual=residual), direction=direction)


@pytest.mark.parametrize("shape", [(0, 72), (2, 0, 72)])
@pytest.mark.parametrize("residual", ["x", None])
def test_no_rows(shape, residual, device):
    leaves = problem(device=device)
    x = torch.randn(shape, device=device, requires_grad=True)
    leaves |= {"x": x, "residual": x if residual == "x" else None}
    y = bottleneck_adapter(*arguments(leaves))
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert all(leaves[name].grad.abs().max() == 0 for name in PARAMETERS)


MASKS = [(n,) for n in NAMES] + [("x", "up_bias"), ("down_bias", "up_weight"), PARAMETERS, NAMES]


@pytest.mark.parametrize("trainable", MASKS)
@pytest.mark.parametrize("residual", ["x", "other"])
def test_only_what_is_trained_gets_a_gradient(trainable, residual, device):
    """Case 16: every mask gives None where frozen and the same values elsewhere."""
    leaves = {n: t.detach() for n, t in problem(device=device, residual="other").items()}
    if residual == "x":
        leaves["residual"] = leaves["x"]
    for name in trainable:
        leaves[name].requires_grad_()
    assert_accurate(leaves)
    bottleneck_adapter(*arguments(leaves)).square().sum().backward()
    wanted = {id(leaves[name]) for name in trainable}
    assert all((t.grad is not None) == (id(t) in wanted) for t in leaves.values())


def kept(call):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        call()
    return saved


@pytest.mark.parametrize("residual", ["x", "other", None])
def test_saves_x_and_the_bottleneck_alone(residual, device):
    """Case 17: beyond x and references to parameters only [M, m] in float32 is kept, for 16 bits too."""
    leaves = problem(M=64, K=128, m=4, dtype=torch.bfloat16, residual=residual, device=device)
    parameters = {leaves[n].data_ptr() for n in NAMES[:-1]}
    saved = kept(lambda: bottleneck_adapter(*arguments(leaves)))
    assert [t.nbytes for t in saved if t.data_ptr() not in parameters] == [64 * 4 * 4]
    assert sum(t.data_ptr() == leaves["x"].data_ptr() for t in saved) == 1


def test_keeps_what_its_gradients_need(device):
    """A frozen W_down keeps no x, a frozen adapter on a frozen x no bottleneck."""
    leaves = {n: t.detach() for n, t in problem(M=64, device=device, residual="other").items()}
    leaves["up_weight"].requires_grad_()
    assert leaves["x"].data_ptr() not in {t.data_ptr() for t in kept(lambda: bottleneck_adapter(*arguments(leaves)))}
    leaves["up_weight"].requires_grad_(False)
    leaves["residual"].requires_grad_()
    parameters = {leaves[n].data_ptr() for n in PARAMETERS}
    saved = kept(lambda: bottleneck_adapter(*arguments(leaves)))
    assert {t.data_ptr() for t in saved} <= parameters


@pytest.mark.parametrize("residual", ["x", "other", None])
def test_inputs_and_gradient_stay_as_they_are(residual, device):
    """Case 18: the result lies in memory of its own."""
    leaves = problem(device=device, residual=residual)
    direction = torch.randn(17, 72, device=device)
    before = {n: None if t is None else t.detach().clone() for n, t in leaves.items()}, direction.clone()
    out = gradients(bottleneck_adapter, leaves, "gelu", 0.75, direction)
    assert all(t is None or torch.equal(before[0][n], t) for n, t in leaves.items())
    assert torch.equal(before[1], direction)
    assert out["y"].data_ptr() not in {t.data_ptr() for t in leaves.values() if t is not None}
    assert out["dx"].data_ptr() != direction.data_ptr()


def test_retain_graph_twice_is_identical_and_runs_are_deterministic(device):
    """Cases 15 and 19."""
    leaves = problem(M=300, device=device)
    inputs, direction = [leaves[n] for n in NAMES[:-1]], torch.randn(300, 72, device=device)
    runs = []
    for _ in range(2):
        y = bottleneck_adapter(*arguments(leaves, "silu"))
        runs += [torch.autograd.grad(y, inputs, direction, retain_graph=True) for _ in range(2)]
    assert all(g.abs().max() > 0 for g in runs[0])
    assert all(torch.equal(g, h) for run in runs[1:] for g, h in zip(runs[0], run, strict=True))


def test_x_as_its_own_residual_is_one_input(device):
    """Autograd has nothing left to add up: both gradients of x come as one."""
    leaves = problem(device=device)
    node = bottleneck_adapter(*arguments(leaves)).grad_fn.next_functions[0][0]
    assert "BottleneckAdapter" in node.name()
    assert sum(function is not None for function, _ in node.next_functions) == 5  # x and four parameters


def test_double_backward_raises(device):
    leaves = problem(device=device)
    (dx,) = torch.autograd.grad(bottleneck_adapter(*arguments(leaves)).square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, device):
    """Case 21. Inside a checkpoint x is another object, and still its own residual."""
    results = []
    for wrap in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=reentrant)):
        torch.manual_seed(3)
        leaves = problem(device=device)
        call = lambda x, leaves=leaves: bottleneck_adapter(*arguments(leaves | {"x": x, "residual": x}))
        y = wrap(call, leaves["x"])
        y.square().sum().backward()
        results.append([y, *(leaves[n].grad for n in NAMES[:-1])])
    assert all(torch.equal(g, h) and g.abs().max() > 0 for g, h in zip(*results, strict=True))


@pytest.mark.parametrize("residual", ["x", "other", None])
def test_autocast(residual, device):
    """Case 23: a 16-bit branch like nn.Linear's, on a residual that keeps its precision; gradients in their dtypes."""
    leaves = problem(residual=residual, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = bottleneck_adapter(*arguments(leaves))
        y.float().square().sum().backward()
    exact = formula(*arguments(upcast(leaves)))
    assert y.dtype == (torch.bfloat16 if residual is None else torch.float32)
    assert (y.double() - exact).norm() < 1e-2 * exact.norm()
    assert all(t.grad.dtype == torch.float32 for t in leaves.values() if t is not None)


def test_autocast_leaves_a_residual_stream_as_it_is(device):
    """x, as its own residual, is neither rounded to 16 bits nor copied."""
    leaves = problem(device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = bottleneck_adapter(*arguments(leaves, scaling=0.0))
    assert torch.equal(y, leaves["x"])


@pytest.mark.parametrize(
    ("x", "residual"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.float32, torch.float64)]
)
def test_a_residual_of_another_dtype(x, residual, device):
    """The result has what both promote to; each gradient its own tensor's dtype."""
    leaves = problem(dtype=x, adapter=torch.float32, residual="other", device=device)
    leaves["residual"] = leaves["residual"].detach().to(residual).requires_grad_()
    direction = torch.randn(17, 72, device=device)
    ours = gradients(bottleneck_adapter, leaves, "gelu", 0.75, direction)
    exact = gradients(formula, upcast(leaves), "gelu", 0.75, direction.double())
    assert ours["y"].dtype == torch.promote_types(x, residual)
    assert ours["dx"].dtype == x
    assert ours["dresidual"].dtype == residual
    assert torch.equal(ours["dresidual"], direction.to(ours["y"].dtype).to(residual))
    for name in exact:
        bound = 1e-6 if ours[name].dtype in (torch.float32, torch.float64) else 4e-3
        assert (ours[name].double() - exact[name]).norm() < bound * exact[name].norm(), name


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("residual", ["x", "other"])
def test_a_silent_adapter_equals_the_residual_exactly(dtype, residual, device):
    """Case 25: W_up and its bias zero, or scaling 0."""
    leaves = problem(dtype=dtype, residual=residual, device=device)
    assert torch.equal(bottleneck_adapter(*arguments(leaves, scaling=0.0)), leaves["residual"])
    silent = leaves | {name: torch.zeros_like(leaves[name]) for name in ("up_weight", "up_bias")}
    assert torch.equal(bottleneck_adapter(*arguments(silent)), leaves["residual"])


def test_inference_saves_nothing(device):
    leaves = problem(device=device)
    with torch.inference_mode():
        out = []
        saved = kept(lambda: out.append(bottleneck_adapter(*arguments(leaves))))
    assert out[0].is_inference()
    assert not saved


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_nan_stays_in_its_row(activation, device):
    """Case 11: and reaches all of that row, through every activation."""
    leaves = problem(device=device)
    with torch.no_grad():
        leaves["x"][5, 3] = float("nan")
    out = gradients(bottleneck_adapter, leaves, activation, 0.75, torch.randn(17, 72, device=device))
    others = torch.arange(17, device=device) != 5
    assert out["y"][5].isnan().all()
    assert out["y"][others].isfinite().all()
    assert out["dx"][others].isfinite().all()


def test_a_nan_gradient_stays_in_its_row(device):
    leaves = problem(device=device)
    direction = torch.randn(17, 72, device=device)
    direction[4, 70] = float("nan")
    out = gradients(bottleneck_adapter, leaves, "gelu", 0.75, direction)
    assert out["dx"][4].isnan().all()
    assert out["dx"][torch.arange(17, device=device) != 4].isfinite().all()


def test_float16_overflow_gives_the_references_infinities(device):
    """Case 12: the bottleneck is float32 and does not overflow; the result does, where it is too large."""
    leaves = problem(dtype=torch.float16, adapter=torch.float32, device=device)
    with torch.no_grad():
        leaves["x"][2] *= 1e4
        leaves["up_weight"].mul_(100)
    ours, reference = bottleneck_adapter(*arguments(leaves)), formula(*arguments(leaves))
    assert reference[2].isinf().any()
    assert torch.equal(ours.isinf(), reference.isinf())
    assert ours[torch.arange(17, device=device) != 2].isfinite().all()


def test_cancelling_and_lopsided_data(device):
    """Case 14: rows that cancel to nearly nothing, one outlier column."""
    leaves = problem(M=12, device=device)
    with torch.no_grad():
        leaves["x"][:, 1::2] = -leaves["x"][:, ::2]
        leaves["down_weight"][:, 1::2] = leaves["down_weight"][:, ::2] * (1 + 1e-3)
        leaves["x"][:, 7] *= 1e3
    assert_accurate(leaves)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "silu", "tanh"])
@pytest.mark.parametrize("residual", ["x", "other"])
def test_gradcheck(activation, residual):
    leaves = upcast(problem(M=3, K=8, m=2, residual=residual))
    inputs = [leaves[n] for n in (NAMES if residual == "other" else NAMES[:-1])]
    call = lambda *t: bottleneck_adapter(*t[:5], activation, 0.75, t[5] if residual == "other" else t[0])
    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("name", activations.ACTIVATIONS)
def test_the_references_derivatives_are_those_of_autograd(name):
    z = torch.linspace(-6, 6, 101, dtype=torch.float64).requires_grad_()
    (truth,) = torch.autograd.grad(activations.activate(z, name).sum(), z)
    torch.testing.assert_close(activations.derivative(z.detach(), name), truth)


@pytest.mark.parametrize("residual", ["x", "other"])
def test_vmap_and_functional_gradients(residual):
    """Case 31: inside functorch transforms the plain formula runs."""
    leaves = {n: t.detach() for n, t in problem(M=6, K=16, residual="other").items()}
    if residual == "x":
        leaves["residual"] = leaves["x"]
    call = lambda x, r: bottleneck_adapter(*arguments(leaves | {"x": x, "residual": x if residual == "x" else r}))
    batched = torch.vmap(call)(leaves["x"].view(2, 3, 16), leaves["residual"].view(2, 3, 16))
    torch.testing.assert_close(batched.view(6, 16), bottleneck_adapter(*arguments(leaves)))
    loss = lambda w: bottleneck_adapter(*arguments(leaves | {"down_weight": w})).square().sum()
    w = leaves["down_weight"].clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(w.detach()), torch.autograd.grad(loss(w), w)[0])


class TestBadInput:
    @pytest.mark.parametrize(
        ("replaced", "error", "message"),
        [
            ({"x": torch.ones(2, 72).long()}, TypeError, "x must be a floating-point tensor, got torch.int64"),
            ({"x": [1.0]}, TypeError, "x must be a floating-point tensor, got list"),
            ({"x": torch.ones(())}, ValueError, r"x must be \[..., 72\] to fit down_weight \(5, 72\), got \(\)"),
            ({"x": torch.ones(17, 71)}, ValueError, r"x must be \[..., 72\] .* got \(17, 71\)"),
            ({"down_weight": None}, TypeError, "down_weight must be a floating-point tensor, got NoneType"),
            ({"down_weight": torch.ones(72)}, ValueError, r"down_weight must be \[m, in_features\] with m >= 1, got"),
            ({"down_weight": torch.ones(0, 72)}, ValueError, r"with m >= 1, got \(0, 72\)"),
            ({"down_weight": torch.ones(5, 72).int()}, TypeError, "down_weight must be a floating-point tensor, got"),
            ({"down_bias": torch.ones(6)}, ValueError, r"down_bias must be \[5\] to fit its weight, got \(6,\)"),
            ({"up_weight": torch.ones(72, 6)}, ValueError, r"up_weight must be \[out_features, 5\] .* got \(72, 6\)"),
            ({"up_bias": torch.ones(71)}, ValueError, r"up_bias must be \[72\] to fit its weight, got \(71,\)"),
            ({"up_bias": "b"}, TypeError, "up_bias must be a floating-point tensor, got str"),
            ({"residual": torch.ones(17, 71)}, ValueError, r"residual must be \(17, 72\) .* got \(17, 71\)"),
            ({"residual": torch.ones(16, 72)}, ValueError, r"residual must be \(17, 72\) .* got \(16, 72\)"),
            ({"residual": torch.ones(17, 72).bool()}, TypeError, "residual must be a floating-point tensor, got"),
            ({"up_weight": torch.ones(72, 5, device="meta")}, ValueError, "up_weight is on meta, x on cpu"),
            ({"residual": torch.ones(17, 72, device="meta")}, ValueError, "residual is on meta, x on cpu"),
        ],
    )
    def test_is_named(self, replaced, error, message):
        with pytest.raises(error, match=message):
            bottleneck_adapter(*arguments(problem(residual=None) | replaced))

    def test_x_as_the_residual_of_another_width(self):
        leaves = problem(N=70, residual="x")
        with pytest.raises(ValueError, match=r"residual must be \(17, 70\) to fit x and up_weight, got \(17, 72\)"):
            bottleneck_adapter(*arguments(leaves))

    @pytest.mark.parametrize("activation", ["elu", "GELU", None])
    def test_an_unknown_activation(self, activation):
        with pytest.raises(ValueError, match=f"activation must be one of linear, relu, .*, swish, got {activation!r}"):
            bottleneck_adapter(*arguments(problem(), activation))
