"""ops.attention: torch's scaled_dot_product_attention, its rows without keys, and where each path is taken."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from numerics import assert_as_accurate
from peft_ops import ops
from peft_ops.ops.attention import _Attention

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def problem(dtype, device="cpu", B=2, H=4, heads=2, T=13, S=13, D=16, Dv=None):
    """Leaves [B, H, T, D], [B, Hkv, S, D], [B, Hkv, S, Dv] as layers make them: heads lie beside each other."""
    sizes = ((T, H, D), (S, heads, D), (S, heads, Dv or D))
    made = (torch.randn(B, rows, h, d, device=device).to(dtype) for rows, h, d in sizes)
    return [t.transpose(1, 2).requires_grad_() for t in made]


def formula(query, key, value, scaling, mask, is_causal):
    """Scores side by side; a row without keys gives zeros."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    scores = query @ key.mT * scaling
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, -math.inf)
    scores = scores if mask is None else scores + mask.to(query.dtype)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    return (scores.masked_fill(empty, 0.0).softmax(-1) @ value).masked_fill(empty, 0.0)


def with_gradients(call, leaves, dout):
    out = call(*leaves)
    return {"out": out, **dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, dout), strict=True))}


def check(leaves, mask=None, is_causal=False, scaling=0.3):
    dout = torch.randn(*leaves[0].shape[:3], leaves[2].shape[3], device=leaves[0].device).to(leaves[0].dtype)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    ours = with_gradients(lambda *t: ops.attention(*t, scaling, mask, is_causal), leaves, dout)
    plain = with_gradients(lambda *t: formula(*t, scaling, mask, is_causal), leaves, dout)
    exact = with_gradients(lambda *t: formula(*t, scaling, mask, is_causal), wide, dout.double())
    for name, truth in exact.items():
        assert_as_accurate(name, ours[name], plain[name], truth, times=2.0 if name == "out" else 3.0)
    return ours


@pytest.fixture
def taken(monkeypatch):
    """How often the op's own Function ran."""
    calls, apply = [], _Attention.apply
    monkeypatch.setattr(_Attention, "apply", lambda *args: (calls.append(1), apply(*args))[1])
    return calls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("H", "heads"), [(4, 4), (4, 2), (6, 1)])
def test_output_and_gradients(dtype, is_causal, H, heads, device, taken):
    check(problem(dtype, device, H=H, heads=heads), is_causal=is_causal)
    assert len(taken) == (device.type == "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 67), (13, 67), (67, 13), (67, 67)])
@pytest.mark.parametrize("D", [1, 5, 32, 80])
@pytest.mark.parametrize("is_causal", [False, True])
def test_odd_shapes(dtype, T, S, D, is_causal, taken):
    """Causal from the top left, whatever T and S."""
    if S == 1 and dtype != torch.float32:
        pytest.skip("softmax of one key has a gradient of rounding alone")
    leaves = problem(dtype, T=T, S=S, D=D)
    if S == 1 or (T == 1 and is_causal):  # one key: weights are one, and dq and dk zero
        out = ops.attention(*leaves, is_causal=is_causal)
        torch.testing.assert_close(out, leaves[2][:, :, :1].repeat_interleave(2, 1).expand_as(out))
        return
    check(leaves, is_causal=is_causal)
    assert taken


MASKS = {
    "bool": lambda B, H, T, S: torch.rand(B, H, T, S) > 0.4,
    "padding": lambda B, H, T, S: (torch.arange(S) < torch.tensor([[S], [S - 4]])).view(B, 1, 1, S),
    "shared": lambda B, H, T, S: torch.rand(T, S) > 0.4,
    "keys": lambda B, H, T, S: torch.arange(S) < S - 2,
    "additive": lambda B, H, T, S: torch.randn(B, 1, T, S),
    "heads": lambda B, H, T, S: torch.randn(1, H, T, S).masked_fill(torch.rand(1, 1, T, S) < 0.3, -math.inf),
    "rows": lambda B, H, T, S: torch.randn(T, 1),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MASKS)
def test_masks(dtype, kind, device, taken):
    leaves = problem(dtype, device, S=17)
    mask = MASKS[kind](2, 4, 13, 17).to(device)
    mask[..., :1] = True if mask.dtype == torch.bool else 0.0
    check(leaves, mask if mask.dtype == torch.bool else mask.to(dtype))
    assert len(taken) == (device.type == "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["bool", "-inf", "lowest"])
def test_a_row_without_keys_gives_zeros(dtype, kind):
    leaves = problem(dtype)
    mask = torch.rand(2, 1, 13, 13) > 0.4
    mask[..., 0] = True
    mask[0, :, 3], mask[1, :, 12] = False, False
    given = mask
    if kind != "bool":
        low = -math.inf if kind == "-inf" else torch.finfo(dtype).min
        given = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, low)
    dout = torch.randn_like(leaves[0])
    ours = with_gradients(lambda *t: ops.attention(*t, 0.3, given), leaves, dout)
    theirs = with_gradients(lambda *t: ops.attention(*t, 0.3, mask), leaves, dout)
    for name, tensor in ours.items():
        assert tensor.isfinite().all()
        torch.testing.assert_close(tensor, theirs[name])
    for name in ("out", "dq"):
        empty = ours[name].abs().amax((1, 3)) == 0
        assert torch.equal(empty, ~mask[:, 0].any(-1)), name
    check(leaves, mask)


def test_a_mask_without_any_key():
    leaves = problem(torch.float32)
    ours = with_gradients(lambda *t: ops.attention(*t, mask=torch.zeros(13, dtype=torch.bool)), leaves, leaves[0])
    assert all(torch.equal(t, torch.zeros_like(t)) for t in ours.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype):
    """Dimensions in another order, steps between elements, dout expanded."""
    base = [torch.randn(2, 16, h, 26).to(dtype).permute(0, 2, 3, 1)[:, :, ::2] for h in (4, 2, 2)]
    check([t.detach().requires_grad_() for t in base], is_causal=True)
    leaves = [t.detach().requires_grad_() for t in base]
    ones = with_gradients(ops.attention, leaves, torch.ones(1, dtype=dtype).expand(leaves[0].shape))
    dense = with_gradients(ops.attention, leaves, torch.ones(leaves[0].shape, dtype=dtype))
    for name, tensor in ones.items():
        torch.testing.assert_close(tensor, dense[name])


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_default_scaling_is_torchs(is_causal):
    query, key, value = problem(torch.float32)
    expected = scaled_dot_product_attention(query, key, value, is_causal=is_causal, enable_gqa=True)
    torch.testing.assert_close(ops.attention(query, key, value, is_causal=is_causal), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(masked):
    leaves = problem(torch.float64, B=1, H=2, heads=1, T=3, S=4, D=3)
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool) if masked else None
    assert torch.autograd.gradcheck(lambda *t: ops.attention(*t, None, mask, not masked), leaves)


def test_only_what_is_needed_gets_a_gradient():
    query, key, value = problem(torch.float32)
    ops.attention(query, key.detach(), value).sum().backward()
    assert query.grad is not None
    assert value.grad.norm() > 0


def test_no_second_derivative():
    leaves = problem(torch.float32)
    (dq,) = torch.autograd.grad(ops.attention(*leaves).square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def test_what_is_kept():
    """References to the inputs, the mask as it was given, out and the log-sum-exp."""
    leaves, mask, kept = problem(torch.bfloat16), torch.rand(2, 1, 13, 13) > 0.2, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = ops.attention(*leaves, mask=mask)
    given = {t.data_ptr() for t in (*leaves, mask, out)}
    new = [t for t in kept if t.data_ptr() not in given]
    assert [tuple(t.shape) for t in new] == [(2, 4, 13)]


@pytest.mark.parametrize("masked", [False, True])
def test_autocast(masked):
    leaves = problem(torch.float32)
    mask = torch.rand(13, 13).fill_diagonal_(1) > 0.4 if masked else None
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.attention(*leaves, mask=mask)
    expected = ops.attention(*(t.bfloat16() for t in leaves), mask=mask)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected)
    grads = torch.autograd.grad(out, leaves, expected.detach())
    assert all(g.dtype == torch.float32 and g.norm() > 0 for g in grads)


@pytest.mark.parametrize(("T", "S"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_attend(T, S):
    leaves = problem(torch.float32, T=T, S=S)
    out = ops.attention(*leaves)
    assert torch.equal(out, torch.zeros(2, 4, T, 16))
    out.sum().backward()
    assert not any(t.grad is not None and t.grad.any() for t in leaves)


def test_values_of_another_width(taken):
    check(problem(torch.float32, Dv=24), is_causal=True)
    assert not taken


def test_functorch_takes_torchs(taken):
    query, key, value = (t.detach() for t in problem(torch.float32))
    mapped = torch.vmap(ops.attention)(*(t.unsqueeze(1) for t in (query, key, value)))
    torch.testing.assert_close(mapped.squeeze(1), ops.attention(query, key, value))
    gradient = torch.func.grad(lambda q: ops.attention(q, key, value).square().sum())(query)
    assert len(taken) == 1
    leaf = query.clone().requires_grad_()
    ops.attention(leaf, key, value).square().sum().backward()
    torch.testing.assert_close(gradient, leaf.grad)


@pytest.mark.unpoisoned
def test_torch_compile_takes_torchs(taken):
    torch._dynamo.reset()
    leaves = problem(torch.float32)
    compiled = torch.compile(ops.attention, backend="eager", fullgraph=True)
    out = compiled(*leaves, is_causal=True)
    assert not taken
    torch.testing.assert_close(out, ops.attention(*leaves, is_causal=True))


@pytest.mark.unpoisoned
def test_export_takes_torchs(taken):
    class Attends(torch.nn.Module):
        def forward(self, *tensors):
            return ops.attention(*tensors, is_causal=True)

    tensors = tuple(t.detach() for t in problem(torch.float32))
    program = torch.export.export(Attends(), tensors, strict=False)
    assert not taken
    assert any("scaled_dot_product_attention" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*tensors), ops.attention(*tensors, is_causal=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_trace_is_torchs(taken):
    first, second = (tuple(t.detach() for t in problem(torch.float32, heads=4)) for _ in range(2))
    traced = torch.jit.trace(lambda q, k, v: ops.attention(q, k, v, is_causal=True), first, check_trace=False)
    assert not taken
    torch.testing.assert_close(traced(*second), ops.attention(*second, is_causal=True))


def test_inference_mode():
    tensors = [t.detach() for t in problem(torch.bfloat16)]
    with torch.inference_mode():
        out = ops.attention(*tensors, is_causal=True)
    torch.testing.assert_close(out.clone(), ops.attention(*tensors, is_causal=True))


@pytest.mark.parametrize("masked", [False, True])
def test_shapes_without_numbers(masked):
    mask = torch.ones(13, 13, dtype=torch.bool, device="meta") if masked else None
    out = ops.attention(*problem(torch.bfloat16, "meta"), mask=mask)
    assert (out.shape, out.dtype) == ((2, 4, 13, 16), torch.bfloat16)
    with FakeTensorMode():
        out = ops.attention(*(t.detach() for t in problem(torch.bfloat16)))
        assert (out.shape, out.dtype) == ((2, 4, 13, 16), torch.bfloat16)


def changed(**changes):
    query, key, value = (t.detach() for t in problem(torch.float32))
    return {"query": query, "key": key, "value": value} | changes


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (changed(query=torch.ones(2, 4, 13, 16, dtype=torch.long)), TypeError, "query must be a floating-point"),
        (changed(value=None), TypeError, "value must be a floating-point"),
        (changed(key=torch.ones(2, 2, 13, 16, dtype=torch.half)), TypeError, "key must have the dtype of query"),
        (changed(query=torch.ones(4, 13, 16)), ValueError, r"query must be \[B, H, T, D\]"),
        (changed(key=torch.ones(2, 3, 13, 16)), ValueError, "Hkv a divisor of 4"),
        (changed(key=torch.ones(2, 2, 13, 8)), ValueError, "key must be"),
        (changed(value=torch.ones(2, 2, 12, 16)), ValueError, "value must be"),
        (changed(value=torch.ones(2, 2, 13, 16, device="meta")), ValueError, "value is on meta, query on cpu"),
        (changed(mask=torch.ones(13, 13), is_causal=True), ValueError, "mask and is_causal"),
        (changed(mask=torch.ones(13, 12)), ValueError, "mask must be broadcastable"),
        (changed(mask=torch.ones(1, 2, 4, 13, 13)), ValueError, "mask must be broadcastable"),
        (changed(mask=torch.ones(13, 13, dtype=torch.int)), TypeError, "mask must be a bool or floating-point"),
        (changed(mask=torch.ones(13, 13, requires_grad=True)), ValueError, "attention does not give"),
        (changed(mask=torch.ones(13, 13, device="meta")), ValueError, "mask is on meta"),
    ],
)
def test_errors(arguments, error, match):
    with pytest.raises(error, match=match):
        ops.attention(**arguments)
