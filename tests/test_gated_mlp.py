"""ops.gated_mlp and its primitives against float64: on the reference, on the kernels in the interpreter, on a GPU."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from numerics import assert_as_accurate
from peft_ops import nf4
from peft_ops._backend import implementation
from peft_ops.ops import Projection, gated_mlp, lora_linear
from peft_ops.reference import formulas
from peft_ops.reference.activations import ACTIVATIONS, activate

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SEEDS = [7, 8, 9]
K, WIDTH, N = 64, 96, 40  # of x, of the middle, of y
NAMES = ("gate", "up", "down")


def projection(N, K, R=3, p=0.0, dtype=torch.float32, adapter=None, base="dense", device="cpu", bias=True):
    """R None: without an adapter."""
    make = lambda *shape, scale=1.0: torch.randn(*shape) * scale
    weight = make(N, K, scale=K**-0.5).to(dtype)
    weight = nf4.quantize(weight).to(device) if base == "nf4" else weight.to(device)
    leaf = lambda t, dtype: t.to(device, dtype).requires_grad_()
    a, b = (None, None) if R is None else (make(R, K, scale=K**-0.5), make(N, R, scale=R**-0.5))
    adapter = adapter or dtype
    return Projection(
        weight, leaf(make(N), dtype) if bias else None, None if a is None else leaf(a, adapter),
        None if b is None else leaf(b, adapter), 0.75, p,
    )  # fmt: skip


def problem(M=17, ranks=(3, 3, 3), ps=(0.0, 0.0, 0.0), dtype=torch.float32, device="cpu", **options):
    x = torch.randn(M, K).to(device, dtype).requires_grad_()
    sizes = ((WIDTH, K), (WIDTH, K), (N, WIDTH))
    return x, [
        projection(*size, R, p, dtype, device=device, **options) for size, R, p in zip(sizes, ranks, ps, strict=True)
    ]


def trained(x, projections):
    """{name: tensor} of all that requires a gradient."""
    every = zip(NAMES, projections, strict=True)
    leaves = {"x": x, **{f"{name}.{n}": t for name, q in every for n, t in q._asdict().items()}}
    return {n: t for n, t in leaves.items() if isinstance(t, torch.Tensor) and t.requires_grad}


def results(function, x, projections, direction):
    y, leaves = function(x, *projections), trained(x, projections)
    grads = torch.autograd.grad(y, list(leaves.values()), direction.to(y.dtype))
    return {"y": y, **dict(zip(leaves, grads, strict=True))}


def formula(activation):
    return lambda x, *projections: formulas.gated_mlp(
        x, *projections, activation, [torch.tensor(s, device=x.device) for s in SEEDS]
    )


def upcast(t):
    return t.detach().double().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t


def assert_accurate(x, projections, activation="silu", direction=None):
    direction = torch.randn(x.shape[0], N, device=x.device) if direction is None else direction
    ours = results(lambda x, *q: gated_mlp(x, *q, activation, SEEDS), x, projections, direction)
    same = results(formula(activation), x, projections, direction)
    wide = upcast(x), [Projection(*map(upcast, q)) for q in projections]
    exact = results(formula(activation), *wide, direction.to(x.dtype).double())
    for name in exact:
        assert_as_accurate(name, ours[name], same[name], exact[name], 2.0 if name == "y" else 3.0)
    return ours


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_and_its_gradients(activation, dtype, device):
    """The primitives: one rounding, so as near as the dtype allows."""
    g, u, dh = (torch.randn(70, 131, device=device).mul(2).to(dtype) for _ in range(3))
    before = g.clone(), u.clone()
    wide = [t.double().requires_grad_() for t in (g, u)]
    exact = activate(wide[0], activation) * wide[1]
    of_g, of_u = torch.autograd.grad(exact, wide, dh.double())
    impl = implementation("gated", g)
    outcomes = {"h": impl.gated(g, u, activation)}
    outcomes |= dict(zip(("h again", "dg", "du"), impl.gated_gradients(dh, g, u, activation), strict=True))
    for name, truth in {"h": exact, "h again": exact, "dg": of_g, "du": of_u}.items():
        assert_as_accurate(name, outcomes[name], truth.to(dtype), truth)
    assert torch.equal(g, before[0])
    assert torch.equal(u, before[1])


def test_gated_takes_any_strides_and_keeps_infinities_and_nan(device):
    g, u, dh = (torch.randn(131, 70, device=device).t() for _ in range(3))
    g[3, 4], g[5, 6], u[7, 8] = torch.nan, 200.0, torch.inf
    impl, act = implementation("gated", g), torch.nn.functional.silu
    torch.testing.assert_close(impl.gated(g, u, "silu"), act(g) * u, equal_nan=True)
    h, _, du = impl.gated_gradients(dh.clone(), g, u, "silu")
    torch.testing.assert_close(h, act(g) * u, equal_nan=True)
    torch.testing.assert_close(du, dh * act(g), equal_nan=True)
    assert h.isnan().sum() == 1


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", FLOATS)
def test_forward_and_gradients(dtype, p, base, device):
    assert_accurate(*problem(ps=(p,) * 3, dtype=dtype, base=base, device=device))


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "tanh"])
def test_activations(activation, device):
    assert_accurate(*problem(device=device), activation)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_adapters_on_a_16_bit_base(dtype, device):
    """Case 24."""
    ours = assert_accurate(*problem(M=70, ps=(0.3,) * 3, dtype=dtype, adapter=torch.float32, device=device))
    assert ours["gate.lora_a"].dtype == ours["down.lora_b"].dtype == torch.float32


@pytest.mark.parametrize(
    ("ranks", "ps"),
    [
        ((2, 5, 3), (0.3, 0.3, 0.3)),
        ((4, 4, 4), (0.3, 0.0, 0.0)),
        ((4, 4, 4), (0.0, 0.0, 0.3)),
        ((None, 4, None), (0.0, 0.3, 0.0)),
        ((4, None, 4), (0.3, 0.0, 0.3)),
        ((None, None, None), (0.0, 0.0, 0.0)),
    ],
)
def test_unlike_projections(ranks, ps, device):
    assert_accurate(*problem(ranks=ranks, ps=ps, device=device))


def test_more_blocks_than_one(device):
    assert_accurate(*problem(M=200, ranks=(40, 40, 40), ps=(0.1,) * 3, device=device))


@pytest.mark.parametrize("shape", [(K,), (5, K), (2, 3, 5, K)])
def test_leading_dimensions(shape, device):
    _, projections = problem(device=device)
    x = torch.randn(shape, device=device)
    flat = formula("silu")(x.reshape(-1, K), *projections)
    y = gated_mlp(x, *projections)
    assert y.shape == (*shape[:-1], N)
    torch.testing.assert_close(y.reshape(-1, N), flat)


@pytest.mark.parametrize("how", ["sum", "sliced", "transposed"])
def test_strided_output_gradients(how, device):
    direction = {
        "sum": torch.ones((), device=device).expand(17, N),
        "sliced": torch.randn(17, 2 * N, device=device)[:, ::2],
        "transposed": torch.randn(N, 17, device=device).t(),
    }[how]
    assert_accurate(*problem(ps=(0.3,) * 3, device=device), direction=direction)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_no_rows(base, device):
    _, projections = problem(ps=(0.1,) * 3, base=base, device=device)
    x = torch.randn(2, 0, K, device=device, requires_grad=True)
    y = gated_mlp(x, *projections)
    y.sum().backward()
    assert y.shape == (2, 0, N)
    assert all(t.grad.norm() == 0 for t in trained(x, projections).values())


WANTED = ["x", "gate.lora_a", "up.lora_b", "down.lora_a", "down.lora_b", "down.bias", "up.bias", "gate.weight",
          "down.weight", "x down.lora_b", "gate.lora_b down.lora_a", "all"]  # fmt: skip


@pytest.mark.parametrize("wanted", WANTED)
def test_only_what_is_trained_gets_a_gradient(wanted, device):
    """Case 16, trained dense weights among them."""
    x, projections = problem(ps=(0.3,) * 3, device=device)
    every = {"x": x, **{f"{m}.{n}": t for m, q in zip(NAMES, projections, strict=True) for n, t in q._asdict().items()}}
    every = {n: t for n, t in every.items() if isinstance(t, torch.Tensor)}
    names = set(every) if wanted == "all" else set(wanted.split())
    for name, t in every.items():
        t.requires_grad_(name in names)
    assert_accurate(x, projections)
    gated_mlp(x, *projections, seeds=SEEDS).square().sum().backward()
    assert {n for n, t in every.items() if t.grad is not None} == names


@pytest.mark.parametrize(("base", "p"), [("dense", 0.0), ("dense", 0.3), ("nf4", 0.3)])
def test_saves_x_s_g_and_u_alone(base, p, device):
    """Case 17."""
    x, projections = problem(M=64, ps=(p,) * 3, base=base, device=device)
    parameters = {t.data_ptr() for q in projections for t in q if isinstance(t, torch.Tensor)}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        gated_mlp(x, *projections)
    beyond = [t for t in saved if t.data_ptr() not in parameters | {x.data_ptr()}]
    assert sum(t.nbytes for t in beyond) == 4 * 64 * (2 * WIDTH + 9) + (24 if p else 0)


def test_saves_less_where_less_is_trained(device):
    """With down's lora_b alone nothing of the middle is kept."""
    x, projections = problem(M=64, device=device)
    for t in trained(x, projections).values():
        t.requires_grad_(t is projections[2].lora_b)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        gated_mlp(x, *projections)
    assert x.data_ptr() not in {t.data_ptr() for t in saved}
    assert not any(t.shape == (64, WIDTH) for t in saved)


def test_retain_graph_twice_is_identical_and_inputs_stay(device):
    """Cases 15, 18 and 19: the backward writes over nothing that it will need again."""
    x, projections = problem(M=200, ps=(0.3,) * 3, device=device)
    leaves, direction = trained(x, projections), torch.randn(200, N, device=device)
    before, kept = {n: t.detach().clone() for n, t in leaves.items()}, direction.clone()
    y = gated_mlp(x, *projections, seeds=SEEDS)
    runs = [torch.autograd.grad(y, list(leaves.values()), direction, retain_graph=True) for _ in range(2)]
    assert all(torch.equal(g, h) and g.norm() > 0 for g, h in zip(*runs, strict=True))
    assert all(torch.equal(before[n], t) for n, t in leaves.items())
    assert torch.equal(direction, kept)


def test_double_backward_raises(device):
    x, projections = problem(device=device)
    (dx,) = torch.autograd.grad(gated_mlp(x, *projections).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_replays_the_masks(reentrant, device):
    """Case 21."""
    outcomes = []
    for wrap in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=reentrant)):
        torch.manual_seed(3)
        x, projections = problem(ps=(0.4,) * 3, device=device)
        y = wrap(lambda x, rest=projections: gated_mlp(x, *rest), x)
        y.square().sum().backward()
        outcomes.append([y, *(t.grad for t in trained(x, projections).values())])
    assert all(torch.equal(g, h) and g.norm() > 0 for g, h in zip(*outcomes, strict=True))


def test_it_draws_the_masks_of_separate_layers():
    """gate, up, down in the order in which a block calls them."""
    x, projections = problem(ps=(0.3,) * 3)
    torch.manual_seed(3)
    y = gated_mlp(x, *projections)
    torch.manual_seed(3)
    g, u = (lora_linear(x, *q) for q in projections[:2])
    torch.testing.assert_close(y, lora_linear(torch.nn.functional.silu(g) * u, *projections[2]))


def test_autocast(device):
    """Case 23."""
    x, projections = problem(device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = gated_mlp(x, *projections)
        y.float().square().sum().backward()
    exact = formula("silu")(x, *projections)
    assert y.dtype == torch.bfloat16
    assert (y.float() - exact).norm() < 2e-2 * exact.norm()
    assert all(t.grad.dtype == torch.float32 for t in trained(x, projections).values())


def test_inference_saves_nothing(device):
    x, projections = problem(ps=(0.1,) * 3, device=device)
    saved = []
    with (
        torch.inference_mode(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t),
    ):
        y = gated_mlp(x, *projections)
    assert y.is_inference()
    assert not saved


def test_gradcheck():
    x, projections = problem(M=3, ps=(0.3,) * 3, dtype=torch.float64)
    leaves = trained(x, projections)

    def call(*tensors):
        given = dict(zip(leaves, tensors, strict=True))
        names = ("bias", "lora_a", "lora_b")
        replaced = [
            q._replace(**{n: given[f"{m}.{n}"] for n in names}) for m, q in zip(NAMES, projections, strict=True)
        ]
        return gated_mlp(given["x"], *replaced, "gelu_new", SEEDS)

    assert torch.autograd.gradcheck(
        call, tuple(leaves.values()), fast_mode=True
    )  # a random projection of each Jacobian


def test_vmap_and_functional_gradients():
    """Case 31."""
    x, projections = problem(M=6)
    x, plain = (
        x.detach(),
        [Projection(*(t.detach() if isinstance(t, torch.Tensor) else t for t in q)) for q in projections],
    )
    batched = torch.vmap(lambda x: gated_mlp(x, *plain))(x.view(2, 3, K))
    torch.testing.assert_close(batched.view(6, N), gated_mlp(x, *plain), rtol=1e-4, atol=1e-4)
    loss = lambda x: gated_mlp(x, *plain).square().sum()
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(x), torch.autograd.grad(loss(leaf), leaf)[0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("index", "change", "error", "message"),
    [
        (0, dict(lora_a=torch.ones(3, 71)), ValueError, r"gate: lora_a must be \[r, 64\]"),
        (1, dict(weight=torch.ones(95, 64), bias=None, lora_a=None, lora_b=None), ValueError, "up.weight must be"),
        (2, dict(weight=torch.ones(40, 95)), ValueError, r"down: x must be \[..., 95\] to fit weight"),
        (2, dict(weight=torch.ones(40, 96).half()), TypeError, "down: x must have the dtype of weight"),
    ],
)  # fmt: skip
def test_bad_input_is_named(index, change, error, message):
    x, projections = problem()
    projections[index] = projections[index]._replace(**change)
    with pytest.raises(error, match=message):
        gated_mlp(x, *projections)


def test_an_unknown_activation_is_named():
    x, projections = problem()
    with pytest.raises(ValueError, match="activation must be one of .* got 'mish'"):
        gated_mlp(x, *projections, "mish")
