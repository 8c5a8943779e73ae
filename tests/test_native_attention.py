"""Native attention and its gradients: as accurate as torch's own, on every instruction set of the machine."""

import math

import pytest
import torch

from numerics import assert_as_accurate
from peft_ops.reference import attention as reference
from peft_ops.reference import prefix_attention as reference_prefix

try:
    from peft_ops.kernels.cpu import attention as native
    from peft_ops.kernels.cpu import prefix_attention as native_prefix
except ImportError:
    native = None

pytestmark = pytest.mark.skipif(native is None, reason="the native library is not built")
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [  # B, H, heads of keys, T, S, D
    (1, 1, 1, 1, 1, 1),
    (2, 4, 2, 13, 13, 16),
    (1, 3, 1, 67, 67, 33),
    (2, 2, 2, 33, 150, 32),
    (1, 2, 1, 150, 35, 80),
    (1, 8, 4, 5, 300, 7),
]


def problem(B, H, heads, T, S, D, dtype):
    """As a layer's projections leave them: heads side by side in memory."""
    return [torch.randn(B, n, h, D, dtype=dtype).transpose(1, 2) for n, h in ((T, H), (S, heads), (S, heads), (T, H))]


def exact(dout, query, key, value, bias, causal, scaling, more=None):
    """(out, lse, gradients) in float64; `more` is added to the log-sum-exp: keys that are not here."""
    leaves = q, k, v = [t.double().requires_grad_() for t in (query, key, value)]
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * scaling
    if bias is not None:
        scores = scores + bias.double()
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    if more is not None:
        lse = torch.logaddexp(lse, lse.detach() + more)
    out = (scores - lse).exp() @ v
    return out, lse.squeeze(-1), torch.autograd.grad(out, leaves, dout.double())


@pytest.mark.parametrize("kind", ["plain", "causal", "bias", "shared bias"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
def test_attention_and_its_gradients(isa, dtype, sizes, kind):
    B, H, _, T, S, D = sizes
    query, key, value, dout = problem(*sizes, dtype)
    scaling, causal = D**-0.5, kind == "causal"
    bias = torch.randn(B, H, T, S) if kind == "bias" else torch.randn(B, 1, 1, S) if kind == "shared bias" else None
    if bias is not None and S > 1:
        bias[..., S // 2 :] = -1e30
    terms = query, key, value, bias, causal, scaling
    ours, theirs = native.attention(*terms), reference.attention(*terms)
    out, lse, gradients = exact(dout, *terms)
    assert_as_accurate("out", ours[0], theirs[0], out)
    assert_as_accurate("lse", ours[1], theirs[1], lse)
    merged = query, key, value, bias, *ours, causal, scaling
    pairs = zip(
        native.attention_gradients(dout, *merged), reference.attention_gradients(dout, *merged), gradients, strict=True
    )
    for name, (mine, other, truth) in zip(("dq", "dk", "dv"), pairs, strict=True):
        if truth.norm() > 1e-12:  # one key: its weight is 1, whatever its score
            assert_as_accurate(name, mine, other, truth, times=3)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_of_keys_beside_others(isa, dtype):
    """out and the log-sum-exp may be over more keys than these: weights sum to less than one."""
    query, key, value, dout = problem(2, 4, 2, 40, 40, 32, dtype)
    scaling, more = 32**-0.5, math.log(3.0)
    out, lse, gradients = exact(dout, query, key, value, None, True, scaling, more)
    terms = dout, query, key, value, None, out.detach().to(dtype), lse.detach().float(), True, scaling
    each = zip(native.attention_gradients(*terms), reference.attention_gradients(*terms), gradients, strict=True)
    for name, (mine, other, truth) in zip(("dq", "dk", "dv"), each, strict=True):
        assert_as_accurate(name, mine, other, truth, times=3)


def test_a_row_with_an_infinite_log_sum_exp_has_no_weight(isa):
    query, key, value, dout = problem(1, 2, 2, 9, 9, 16, torch.bfloat16)
    out, lse = native.attention(query, key, value, None, False, 0.25)
    lse[:, :, 4] = math.inf
    dq, dk, _ = native.attention_gradients(dout, query, key, value, None, out, lse, False, 0.25)
    assert not dq[:, :, 4].any()
    rest = [t[:, :, torch.arange(9) != 4] for t in (dout, query, out, lse)]
    _, expected, _ = native.attention_gradients(rest[0], rest[1], key, value, None, *rest[2:], False, 0.25)
    torch.testing.assert_close(dk, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", FLOATS)
def test_strides_are_any(isa, dtype):
    """Rows that are no neighbours in memory, keys that heads share, layouts that gradients keep."""
    query = torch.randn(2, 4, 32, 20, dtype=dtype).transpose(2, 3)
    key = torch.randn(2, 1, 20, 32, dtype=dtype).expand(2, 4, 20, 32)
    value = torch.randn(2, 20, 4, 40, dtype=dtype)[..., 3:35].transpose(1, 2)
    dout = torch.randn(2, 4, 20, 32, dtype=dtype)
    plain = [t.contiguous() for t in (query, key, value)]
    ours, expected = (native.attention(*t, None, True, 0.2) for t in ((query, key, value), plain))
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1], expected[1])
    both = (native.attention_gradients(dout, *t, None, *ours, True, 0.2) for t in ((query, key, value), plain))
    for mine, other in zip(*both, strict=True):
        assert torch.equal(mine, other)


def test_the_number_of_threads_changes_nothing(isa):
    query, key, value, dout = problem(3, 4, 2, 70, 70, 32, torch.bfloat16)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out, lse = native.attention(query, key, value, None, True, 0.2)
            of_all = native.attention_gradients(dout, query, key, value, None, out, lse, True, 0.2)
            results.append((out, lse, *of_all))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_where_it_is(isa, value):
    query, key, values, _ = problem(1, 2, 2, 40, 40, 16, torch.float32)
    query[0, 1, 7, 3], values[0, 0, 20, 5] = value, value
    ours, _ = native.attention(query, key, values, None, True, 0.25)
    assert not ours[0, 0, 20:, 5].isfinite().any()
    assert ours[0, 0, :, torch.arange(16) != 5].isfinite().all()
    assert not ours[0, 1, 7].isfinite().any()
    assert ours[0, 1, torch.arange(40) != 7].isfinite().all()


@pytest.mark.parametrize(("p", "prefix_p"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.2), (1.0, 1.0)])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1, 1, 1, 1), (3, 4, 2, 13, 5, 16, 16), (2, 6, 3, 35, 140, 20, 33)], ids=str
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_prefixes_are_merged_as_by_the_reference(isa, dtype, sizes, p, prefix_p):
    B, H, heads, T, n, D, Dv = sizes
    query, dout = (torch.randn(B, T, H, d, dtype=dtype).transpose(1, 2) for d in (D, Dv))
    key, value, bias = torch.randn(heads, n, D), torch.randn(heads, n, Dv), torch.randn(H, 1, n).expand(H, T, n)
    text, lse, dq = torch.randn(B, H, T, Dv).to(dtype), torch.randn(B, H, 2 * T)[..., ::2], torch.randn(B, H, T, D)
    lse[0, 0, 0] = -math.inf  # no text
    text[0, 0, 0] = 0
    drops = p, torch.tensor(5) if p else None, prefix_p, torch.tensor(6) if prefix_p else None
    of_dtype = {}
    for name, module, wide in (
        ("ours", native_prefix, lambda t: t),
        ("reference", reference_prefix, lambda t: t),
        ("exact", reference_prefix, torch.Tensor.double),
    ):
        q, k, v, b, d = map(wide, (query, key, value, bias, dout))
        scores = q, k, v, b, 0.3, *drops
        out, new = module.prefix_merge_(wide(text.clone()), wide(lse.clone()), *scores)
        merged = (out, new) if not of_dtype else of_dtype["ours"][:2]  # the gradients' input is one
        gradients = module.prefix_gradients(
            d, *map(wide, merged), q, k, v, b, wide(dq.to(dtype)), True, 0.3, *drops
        )  # fmt: skip
        of_dtype[name] = (out, new, *gradients)
    for name, ours, same, exact_one in zip(("out", "lse", "dq", "dk", "dv"), *of_dtype.values(), strict=True):
        if exact_one.norm() > 1e-12:
            assert_as_accurate(name, ours, same, exact_one, times=3)
        else:
            assert not ours.any()


def test_a_prefix_takes_no_gradient_that_is_not_asked_for(isa):
    query, _, _, dout = problem(2, 2, 2, 9, 9, 16, torch.float32)
    key, value, lse = torch.randn(2, 3, 16), torch.randn(2, 3, 16), torch.zeros(2, 2, 9)
    terms = dout, torch.randn(2, 2, 9, 16), lse, query, key, value, None
    assert native_prefix.prefix_gradients(*terms, None, False, 0.25, 0.0, None, 0.0, None) == (None, None, None)
    dq = torch.zeros(2, 2, 16, 9).mT  # rows that are no neighbours
    version = dq._version
    native_prefix.prefix_gradients(*terms, dq, True, 0.25, 0.0, None, 0.0, None)
    expected, _, _ = reference_prefix.prefix_gradients(
        *terms, torch.zeros(2, 2, 9, 16), True, 0.25, 0.0, None, 0.0, None
    )
    torch.testing.assert_close(dq, expected)
    assert dq._version > version
