"""ops.attention: torch's scaled_dot_product_attention, by whatever computes it, against float64."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from numerics import assert_as_accurate
from peft_ops.ops import attention

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SIZES = [  # B, H, heads of keys, T, S, D, Dv
    (1, 1, 1, 1, 1, 1, 1),
    (2, 4, 2, 13, 13, 16, 16),
    (2, 3, 1, 67, 35, 5, 5),
    (1, 2, 2, 33, 67, 80, 80),
    (2, 2, 1, 9, 11, 16, 8),
]


def problem(B, H, heads, T, S, D, Dv, dtype=torch.float32):
    shapes = (B, T, H, D), (B, S, heads, D), (B, S, heads, Dv)
    return [torch.randn(shape).to(dtype).transpose(1, 2).requires_grad_() for shape in shapes]


def masks(B, H, T, S):
    """None, and every form of a mask; in some a row sees nothing."""
    seen = torch.rand(B, 1, T, S) < 0.6
    seen[:, :, T // 2] = False
    seen[:, :, 0, 0] = True
    keys = torch.ones(B, 1, 1, S, dtype=torch.bool)
    keys[0, :, :, S // 2 + 1 :] = False
    lowest = torch.zeros(T, S).masked_fill_(~seen[0, 0], torch.finfo(torch.float32).min)
    return {
        "none": None,
        "rows": seen,
        "keys": keys,
        "added": torch.randn(H, T, S),
        "infinite": lowest,
        "one": keys[0, 0],
    }


def exact(query, key, value, scaling, mask, causal):
    """In float64; a row that sees no key is zeros."""
    query, key, value = (t.detach().double().requires_grad_() for t in (query, key, value))
    k, v = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    scores = query @ k.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask.double().masked_fill(mask <= torch.finfo(mask.dtype).min, -math.inf)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    return (query, key, value), (scores.masked_fill(empty, 0.0).softmax(-1) * ~empty) @ v


@pytest.mark.parametrize("which", ["none", "causal", "rows", "keys", "added", "infinite", "one"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
def test_it_and_its_gradients(dtype, sizes, which):
    B, H, _, T, S, _, _ = sizes
    torch.manual_seed(sum(sizes))
    leaves, causal = problem(*sizes, dtype), which == "causal"
    mask = None if causal else masks(B, H, T, S)[which]
    out = attention(*leaves, 0.4, mask, causal)
    wide, truth = exact(*leaves, 0.4, mask, causal)
    additive = mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)
    theirs = [t.detach().requires_grad_() for t in leaves]
    same = scaled_dot_product_attention(*theirs, additive, 0.0, causal, scale=0.4, enable_gqa=True).nan_to_num()
    dout = torch.randn(out.shape).to(dtype)
    assert_as_accurate("out", out, same, truth)
    results = (
        torch.autograd.grad(o, of, d)
        for o, of, d in ((out, leaves, dout), (same, theirs, dout), (truth, wide, dout.double()))
    )
    for name, mine, other, right in zip(("dq", "dk", "dv"), *results, strict=True):
        if right.norm() > 1e-12:
            assert_as_accurate(name, mine, other.nan_to_num(), right, times=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_without_keys_is_zero_and_gives_no_gradient(dtype):
    query, key, value = problem(1, 2, 1, 20, 20, 16, 16, dtype)
    mask = torch.ones(20, 20, dtype=torch.bool)
    mask[7] = False
    out = attention(query, key, value, mask=mask)
    assert not out[:, :, 7].any()
    out[:, :, 7].sum().backward()
    assert not any(t.grad.any() for t in (query, key, value))


def test_nothing_to_attend_to_or_from():
    query, key, value = problem(2, 2, 1, 5, 0, 8, 8)
    out = attention(query, key, value)
    assert out.shape == (2, 2, 5, 8)
    assert not out.any()
    query, key, value = problem(2, 2, 1, 0, 5, 8, 8)
    assert attention(query, key, value).shape == (2, 2, 0, 8)


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(causal):
    leaves = problem(1, 4, 2, 3, 5, 2, 2, torch.float64)
    assert torch.autograd.gradcheck(lambda *t: attention(*t, is_causal=causal), leaves)


def test_what_it_keeps():
    """Its inputs, out and a number for each row: no weights and no mask of its own."""
    leaves, kept = problem(2, 4, 2, 64, 64, 16, 16), {}
    mask = torch.ones(2, 1, 64, 64, dtype=torch.bool).tril()

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = attention(*leaves, mask=mask)
    given = {t.untyped_storage().data_ptr() for t in (*leaves, mask, out)}
    assert sum(size for place, size in kept.items() if place not in given) == 2 * 4 * 64 * 4


def test_autocast():
    leaves = problem(1, 2, 2, 9, 9, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(*leaves)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert leaves[2].grad.dtype == torch.float32


def test_where_something_traces_it_is_torchs():
    leaves = [t.detach() for t in problem(2, 4, 2, 20, 20, 8, 8)]
    expected = attention(*leaves, is_causal=True)
    torch.compiler.reset()
    compiled = torch.compile(lambda *t: attention(*t, is_causal=True), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*leaves), expected)
    mapped = torch.vmap(lambda *t: attention(*(u[None] for u in t), is_causal=True)[0])(*leaves)
    torch.testing.assert_close(mapped, expected)
    exported = torch.export.export(Attends(), tuple(leaves)).module()
    torch.testing.assert_close(exported(*leaves), expected)
    with FakeTensorMode() as mode:
        assert attention(*map(mode.from_tensor, leaves)).shape == expected.shape


class Attends(torch.nn.Module):
    def forward(self, query, key, value):
        return attention(query, key, value, is_causal=True)


BAD = {
    "key must be": lambda q, k, v: attention(q, k[:, :, :, :4], v),
    "divisor": lambda q, k, v: attention(q, k[:, :1].expand(-1, 3, -1, -1), v),
    "value must be": lambda q, k, v: attention(q, k, v[:, :, :3]),
    "combined": lambda q, k, v: attention(q, k, v, mask=torch.ones(9, 9, dtype=torch.bool), is_causal=True),
    "broadcastable": lambda q, k, v: attention(q, k, v, mask=torch.ones(9, 8, dtype=torch.bool)),
    "does not give": lambda q, k, v: attention(q, k, v, mask=torch.zeros(9, 9, requires_grad=True)),
    "on meta": lambda q, k, v: attention(q, k.to("meta"), v),
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit(message):
    with pytest.raises(ValueError, match=message):
        BAD[message](*problem(1, 4, 2, 9, 9, 8, 8))


def test_what_has_another_dtype():
    query, key, value = problem(1, 2, 2, 9, 9, 8, 8)
    with pytest.raises(TypeError, match="key must have the dtype of query"):
        attention(query, key.double(), value)
    with pytest.raises(TypeError, match="floating-point tensor"):
        attention(query.long(), key, value)
    with pytest.raises(TypeError, match="bool or floating-point"):
        attention(query, key, value, mask=torch.ones(9, 9, dtype=torch.int64))
