"""ops.lora_projections against its formula in float64: on the reference, the kernels in the interpreter, a GPU."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from numerics import assert_as_accurate
from peft_ops import nf4
from peft_ops._backend import implementation
from peft_ops.ops import Projection, lora_linear, lora_projections
from peft_ops.reference import formulas

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SEEDS = [7, 8, 9]
K, WIDTHS = 72, (37, 20, 20)


def projection(N, R=3, p=0.0, dtype=torch.float32, adapter=None, base="dense", device="cpu", bias=True, K=K):
    """Its low-rank term is as large as its base term; R None: without an adapter."""
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
    return x, [projection(N, R, p, dtype, device=device, **options) for N, R, p in zip(WIDTHS, ranks, ps, strict=True)]


def trained(x, projections):
    """{name: tensor} of all that requires a gradient."""
    leaves = {"x": x, **{f"{i}.{n}": t for i, q in enumerate(projections) for n, t in q._asdict().items()}}
    return {n: t for n, t in leaves.items() if isinstance(t, torch.Tensor) and t.requires_grad}


def results(function, x, projections, directions, **options):
    """{name: tensor}: every y and the gradients of Σ <y, direction>."""
    ys = function(x, projections, **options)
    leaves = trained(x, projections)
    loss = sum((y * d.to(y.dtype)).sum() for y, d in zip(ys, directions, strict=True))
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {**{f"y{i}": y for i, y in enumerate(ys)}, **dict(zip(leaves, grads, strict=True))}


def formula(x, projections):
    return formulas.lora_projections(x, projections, [torch.tensor(s, device=x.device) for s in SEEDS])


def upcast(t):
    return t.detach().double().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t


def assert_accurate(x, projections, directions=None):
    directions = directions or [torch.randn(x.shape[0], q.weight.shape[0], device=x.device) for q in projections]
    ours = results(lora_projections, x, projections, directions, seeds=SEEDS)
    same = results(formula, x, projections, directions)
    rounded = [d.to(x.dtype).double() for d in directions]
    exact = results(formula, upcast(x), [Projection(*map(upcast, q)) for q in projections], rounded)
    for name in exact:
        times = 2.0 if name.startswith("y") else 3.0
        if exact[name].norm() > 0:
            assert_as_accurate(name, ours[name], same[name], exact[name], times)
        else:
            assert ours[name].norm() == 0, name
    return ours


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", FLOATS)
def test_forward_and_gradients(dtype, p, base, device):
    assert_accurate(*problem(ps=(p,) * 3, dtype=dtype, base=base, device=device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_float32_adapters_on_a_16_bit_base(dtype, p, device):
    """Case 24."""
    ours = assert_accurate(*problem(M=70, ps=(p,) * 3, dtype=dtype, adapter=torch.float32, device=device))
    assert ours["0.lora_a"].dtype == ours["2.lora_b"].dtype == torch.float32


@pytest.mark.parametrize(
    ("ranks", "ps"),
    [
        ((1, 4, 20), (0.0, 0.0, 0.0)),
        ((1, 4, 20), (0.3, 0.3, 0.3)),
        ((4, 2, 4), (0.3, 0.3, 0.3)),
        ((4, 4, 4), (0.3, 0.1, 0.0)),
        ((4, 4, 4), (0.3, 1.0, 0.3)),
        ((4, None, 4), (0.3, 0.0, 0.3)),
        ((None, None, 40), (0.0, 0.0, 0.3)),
        ((None, None, None), (0.0, 0.0, 0.0)),
    ],
)
def test_unlike_projections(ranks, ps, device):
    """Other ranks, other p, no adapter: what cannot share a product has one of its own."""
    assert_accurate(*problem(ranks=ranks, ps=ps, device=device))


def test_dense_and_4_bit_weights_together(device):
    x, projections = problem(ps=(0.3,) * 3, device=device)
    assert_accurate(x, [projections[0], projection(20, p=0.3, base="nf4", device=device), projections[2]])


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_more_blocks_than_one(p, device):
    """Several blocks of M and of the rank in every group, split reductions."""
    assert_accurate(*problem(M=200, ranks=(40, 40, 40), ps=(p,) * 3, device=device))


def test_it_computes_what_lora_linear_does(device):
    """To the bit where products are the same, with the masks of separate calls in the same state of the generator."""
    x, projections = problem(ps=(0.3,) * 3, device="cpu")
    torch.manual_seed(3)
    ys = lora_projections(x, projections)
    torch.manual_seed(3)
    for y, q in zip(ys, projections, strict=True):
        torch.testing.assert_close(y, lora_linear(x, *q))


def test_each_projection_has_its_own_mask(device):
    """Of equal projections the results differ with dropout, and are those of their seeds."""
    x, (q, *_) = problem(ps=(0.3,) * 3, device=device)
    first, second = lora_projections(x, [q, q], seeds=torch.tensor([3, 4], device=device))
    assert not torch.equal(first, second)
    again = lora_projections(x, [q, q], seeds=[4, 3])
    assert torch.equal(first, again[1])
    assert torch.equal(second, again[0])


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("R", [3, 40])
def test_groups_of_columns_have_masks_of_their_own(R, p, device):
    """The primitives with seeds [G]: a group's part is that of a call with its seed."""
    x, a, ds, y = (torch.randn(*shape, device=device) for shape in ((70, 72), (3 * R, 72), (70, 3 * R), (70, 72)))
    seeds = torch.tensor([5, 6, 2**40], device=device)
    s = implementation("down_project", x).down_project(x, a, p, seeds)
    da = implementation("down_project", x).down_project_da(ds, x, p, seeds)
    dx = implementation("low_rank", x).low_rank_update_(y.clone(), ds, a.t(), 0.5, p, seeds)
    expected = y.clone()
    for i, seed in enumerate(seeds):
        own = slice(i * R, (i + 1) * R)
        one = implementation("down_project", x).down_project(x, a[own], p, seed)
        torch.testing.assert_close(s[:, own], one, rtol=1e-4, atol=1e-4)
        one = implementation("down_project", x).down_project_da(ds[:, own].contiguous(), x, p, seed)
        torch.testing.assert_close(da[own], one, rtol=1e-4, atol=1e-4)
        implementation("low_rank", x).low_rank_update_(expected, ds[:, own].contiguous(), a[own].t(), 0.5, p, seed)
    torch.testing.assert_close(dx, expected, rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="3 seeds need a multiple of 3 rows"):
        implementation("down_project", x).down_project(x, a[:4], 0.3, seeds)


def test_dx_is_rounded_less_often_than_by_autograd(device):
    """In 16 bits: the buffer's error against that of separate layers, whose rounded dx autograd adds."""
    x, projections = problem(M=64, dtype=torch.bfloat16, device=device)
    directions = [torch.randn(64, N, device=device) for N in WIDTHS]
    together = results(lora_projections, x, projections, directions)["x"]
    apart = results(lambda x, qs: [lora_linear(x, *q) for q in qs], x, projections, directions)["x"]
    rounded = [d.bfloat16().double() for d in directions]
    exact = results(formula, upcast(x), [Projection(*map(upcast, q)) for q in projections], rounded)["x"]
    assert (together.double() - exact).norm() <= 1.05 * (apart.double() - exact).norm()


@pytest.mark.parametrize("shape", [(K,), (5, K), (2, 5, K), (2, 3, 5, K)])
def test_leading_dimensions(shape, device):
    _, projections = problem(device=device)
    x = torch.randn(shape, device=device)
    for y, flat in zip(lora_projections(x, projections), formula(x.reshape(-1, K), projections), strict=True):
        assert y.shape == (*shape[:-1], flat.shape[1])
        torch.testing.assert_close(y.reshape(flat.shape), flat)


def test_strided_x_and_output_gradients(device):
    x, projections = problem(ps=(0.3,) * 3, device=device)
    x = torch.randn(K, 17, device=device).t().requires_grad_()
    directions = [
        torch.ones((), device=device).expand(17, 37),
        torch.randn(17, 40, device=device)[:, ::2],
        torch.randn(20, 17, device=device).t(),
    ]
    assert_accurate(x, projections, directions)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_no_rows(base, device):
    _, projections = problem(ps=(0.1,) * 3, base=base, device=device)
    x = torch.randn(2, 0, K, device=device, requires_grad=True)
    ys = lora_projections(x, projections)
    sum(y.sum() for y in ys).backward()
    assert [y.shape for y in ys] == [(2, 0, N) for N in WIDTHS]
    assert all(t.grad.norm() == 0 for t in trained(x, projections).values())
    assert lora_projections(x, []) == ()


@pytest.mark.parametrize("wanted", ["x", "0.weight", "1.bias", "1.lora_a", "2.lora_b", "x 0.lora_a 2.lora_a", "all"])
def test_only_what_is_trained_gets_a_gradient(wanted, device):
    """Case 16, a trained dense weight among them."""
    x, projections = problem(ps=(0.3,) * 3, device=device)
    every = {"x": x, **{f"{i}.{n}": t for i, q in enumerate(projections) for n, t in q._asdict().items()}}
    every = {n: t for n, t in every.items() if isinstance(t, torch.Tensor)}
    names = set(every) if wanted == "all" else set(wanted.split())
    for name, t in every.items():
        t.requires_grad_(name in names)
    assert_accurate(x, projections)
    sum(y.square().sum() for y in lora_projections(x, projections, SEEDS)).backward()
    assert {n for n, t in every.items() if t.grad is not None} == names


def test_a_projection_that_nothing_came_from(device):
    """Its gradients are None or zero, the others' what they are without it."""
    x, projections = problem(ps=(0.3,) * 3, device=device)
    lora_projections(x, projections, SEEDS)[1].square().sum().backward()
    dx = x.grad.clone()
    assert projections[0].lora_a.grad is None
    x.grad = None
    y = lora_projections(x, [projections[1]], SEEDS[1:2])[0]
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, dx)


@pytest.mark.parametrize(("base", "p"), [("dense", 0.0), ("dense", 0.3), ("nf4", 0.3)])
def test_saves_x_and_one_s(base, p, device):
    """Case 17."""
    x, projections = problem(M=64, ps=(p,) * 3, base=base, device=device)
    parameters = {t.data_ptr() for q in projections for t in q if isinstance(t, torch.Tensor)}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        lora_projections(x, projections)
    beyond = [t for t in saved if t.data_ptr() not in parameters | {x.data_ptr()}]
    assert sum(t.nbytes for t in beyond) == 64 * 9 * 4 + (24 if p else 0)


def test_retain_graph_twice_is_identical_and_inputs_stay(device):
    """Cases 15, 18 and 19."""
    x, projections = problem(M=200, ps=(0.3,) * 3, device=device)
    leaves = trained(x, projections)
    before = {n: t.detach().clone() for n, t in leaves.items()}
    directions = [torch.randn(200, N, device=device) for N in WIDTHS]
    kept = [d.clone() for d in directions]
    ys = lora_projections(x, projections, SEEDS)
    runs = [torch.autograd.grad(ys, list(leaves.values()), directions, retain_graph=True) for _ in range(2)]
    assert all(torch.equal(g, h) and g.norm() > 0 for g, h in zip(*runs, strict=True))
    assert all(torch.equal(before[n], t) for n, t in leaves.items())
    assert all(map(torch.equal, kept, directions))


def test_double_backward_raises(device):
    x, projections = problem(device=device)
    loss = sum(y.square().sum() for y in lora_projections(x, projections))
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_replays_the_masks(reentrant, device):
    """Case 21."""
    outcomes = []
    for wrap in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=reentrant)):
        torch.manual_seed(3)
        x, projections = problem(ps=(0.4,) * 3, device=device)
        ys = wrap(lambda x, rest=projections: lora_projections(x, rest), x)
        sum(y.square().sum() for y in ys).backward()
        outcomes.append([*ys, *(t.grad for t in trained(x, projections).values())])
    assert all(torch.equal(g, h) and g.norm() > 0 for g, h in zip(*outcomes, strict=True))


def test_autocast(device):
    """Case 23."""
    x, projections = problem(device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ys = lora_projections(x, projections)
        sum(y.float().square().sum() for y in ys).backward()
    for y, exact in zip(ys, formula(x, projections), strict=True):
        assert y.dtype == torch.bfloat16
        assert (y.float() - exact).norm() < 1e-2 * exact.norm()
    assert all(t.grad.dtype == torch.float32 for t in trained(x, projections).values())


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_silent_adapters_equal_the_base_exactly(base, device):
    """Case 25."""
    x, projections = problem(base=base, device=device)
    silent = [q._replace(lora_b=torch.zeros_like(q.lora_b)) for q in projections]
    plain = [q._replace(lora_a=None, lora_b=None) for q in projections]
    assert all(map(torch.equal, lora_projections(x, silent), lora_projections(x, plain)))


def test_inference_saves_nothing(device):
    x, projections = problem(ps=(0.1,) * 3, device=device)
    saved = []
    with (
        torch.inference_mode(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t),
    ):
        ys = lora_projections(x, projections)
    assert all(y.is_inference() for y in ys)
    assert not saved


def test_gradcheck():
    x, projections = problem(M=3, ps=(0.3,) * 3, dtype=torch.float64)
    leaves = trained(x, projections)

    def call(*tensors):
        given = dict(zip(leaves, tensors, strict=True))
        replaced = [
            q._replace(**{n: given[f"{i}.{n}"] for n in ("bias", "lora_a", "lora_b")})
            for i, q in enumerate(projections)
        ]
        return lora_projections(given["x"], replaced, SEEDS)

    assert torch.autograd.gradcheck(
        call, tuple(leaves.values()), fast_mode=True
    )  # a random projection of each Jacobian


def test_vmap_and_functional_gradients():
    """Case 31."""
    x, projections = problem(M=6)
    plain = [Projection(*(t.detach() if isinstance(t, torch.Tensor) else t for t in q)) for q in projections]
    batched = torch.vmap(lambda x: lora_projections(x, plain))(x.detach().view(2, 3, K))
    for y, flat in zip(batched, lora_projections(x.detach(), plain), strict=True):
        torch.testing.assert_close(y.reshape(flat.shape), flat)
    loss = lambda x: sum(y.square().sum() for y in lora_projections(x, plain))
    torch.testing.assert_close(
        torch.func.grad(loss)(x.detach()), torch.autograd.grad(loss(x), x)[0], rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(lora_a=torch.ones(3, 71)), ValueError, r"projections\[1\]: lora_a must be \[r, 72\]"),
        (dict(bias=torch.ones(36)), ValueError, r"projections\[1\]: bias must be \[20\]"),
        (dict(lora_b=None), ValueError, r"projections\[1\]: lora_a and lora_b must both be given"),
        (dict(weight="w"), TypeError, r"projections\[1\]: weight must be a tensor or an NF4Weight, got str"),
        (dict(dropout_p=1.5), ValueError, r"projections\[1\]: dropout_p must be in \[0, 1\], got 1.5"),
    ],
)
def test_bad_input_is_named(change, error, message):
    x, projections = problem()
    projections[1] = projections[1]._replace(**change)
    with pytest.raises(error, match=message):
        lora_projections(x, projections)


def test_seeds_are_one_for_each():
    x, projections = problem(ps=(0.3,) * 3)
    with pytest.raises(ValueError, match="seeds must be one for each of 3 projections, got 2"):
        lora_projections(x, projections, seeds=[1, 2])
