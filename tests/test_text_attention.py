"""Where no GPU is at hand: torch's GPU attention kernels are called by their schema (under fake tensors), and with what
they want (stand-ins compute the same and check it)."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from numerics import assert_as_accurate
from peft_ops.ops import _text_attention, prefix_attention
from peft_ops.ops._arguments import mask_seed
from peft_ops.reference.dropout import dropout_keep

GIVEN = ("query", "key", "value", "prefix_key", "prefix_value")


def problem(dtype, B=2, H=4, heads=2, T=13, S=13, D=16, Dv=16, n=5, device="cpu"):
    shapes = (B, H, T, D), (B, heads, S, D), (B, heads, S, Dv), (heads, n, D), (heads, n, Dv)
    return [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]


def text_keep(q, k, p):
    """The mask of a stand-in's own dropout."""
    generator = torch.Generator().manual_seed(5)
    return torch.rand(*q.shape[:3], k.shape[2], generator=generator, dtype=torch.float64) >= p


def weights(q, k, scale, bias, is_causal):
    """Scores in float64, every head of query with keys of its own."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    s = q.double() @ k.double().mT * scale + (0 if bias is None else bias.double())
    T, S = s.shape[-2:]
    return s.masked_fill(torch.ones(T, S, dtype=torch.bool).triu(1), -math.inf) if is_causal else s


def check_layout(*tensors):
    for t in tensors:
        whole = 16 // t.element_size()
        assert t.stride(-1) == 1
        assert all(s % whole == 0 for s in (*t.stride()[:-1], t.storage_offset()))


def forward(q, k, v, bias, p, is_causal, scale):
    check_layout(q, k, v)
    s = weights(q, k, scale, bias, is_causal)
    kept = s.softmax(-1) * text_keep(q, k, p) / (1 - p)
    out = kept @ v.double().repeat_interleave(q.shape[1] // v.shape[1], 1)
    return out.to(q.dtype), s.logsumexp(-1).float()


def backward(dout, q, k, v, bias, out, lse, p, is_causal, scale):
    check_layout(dout, q, k, v)
    groups = q.shape[1] // k.shape[1]
    w = (weights(q, k, scale, bias, is_causal) - lse.double().unsqueeze(-1)).exp()
    keep = text_keep(q, k, p) / (1 - p)
    d = dout.double()
    dw = keep * (d @ v.double().repeat_interleave(groups, 1).mT)
    ds = w * (dw - (d * out.double()).sum(-1, keepdim=True)) * scale
    dq, dk, dv = ds @ k.double().repeat_interleave(groups, 1), ds.mT @ q.double(), (w * keep).mT @ d
    dk, dv = (t.unflatten(1, (k.shape[1], groups)).sum(2) for t in (dk, dv))
    return tuple(t.to(q.dtype) for t in (dq, dk, dv))


class StandIns:
    """What torch's kernels refuse is asserted; padding and states are theirs."""

    @staticmethod
    def _scaled_dot_product_flash_attention(q, k, v, p, is_causal, return_debug_mask, *, scale):
        assert q.dtype in (torch.float16, torch.bfloat16)
        assert not is_causal or q.shape[2] == k.shape[2]
        out, lse = forward(q, k, v, None, p, is_causal, scale)
        return out, lse, None, None, q.shape[2], k.shape[2], torch.tensor(1), torch.tensor(2), torch.empty(0)

    @staticmethod
    def _scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, p, is_causal, seed, offset, *, scale
    ):
        assert (cum_q, cum_k, max_q, max_k, int(seed), int(offset)) == (None, None, q.shape[2], k.shape[2], 1, 2)
        return backward(dout, q, k, v, None, out, lse, p, is_causal, scale)

    @staticmethod
    def check_bias(bias, q, k):
        assert k.shape[1] == q.shape[1]
        if bias is not None:
            assert bias.dtype == q.dtype
            assert bias.shape == (*q.shape[:3], k.shape[2])
            assert bias.isfinite().all()
            assert bias.stride(-1) == 1
            assert all(s % 16 == 0 for s in bias.stride()[:-1])

    @staticmethod
    def _scaled_dot_product_efficient_attention(q, k, v, bias, compute_log_sumexp, p, is_causal, *, scale):
        StandIns.check_bias(bias, q, k)
        assert compute_log_sumexp
        out, lse = forward(q, k, v, bias, p, is_causal, scale)
        padded = torch.full((*lse.shape[:2], -(-lse.shape[2] // 32) * 32), math.inf)
        padded[..., : lse.shape[2]] = lse
        return out, padded, torch.tensor(1), torch.tensor(2)

    @staticmethod
    def _scaled_dot_product_efficient_attention_backward(
        dout, q, k, v, bias, out, lse, seed, offset, p, needed, is_causal, *, scale
    ):
        StandIns.check_bias(bias, q, k)
        T = q.shape[2]
        assert lse.shape[2] == -(-T // 32) * 32
        assert (lse[..., T:] == math.inf).all()
        assert (int(seed), int(offset), needed) == (1, 2, [True, True, True, False])
        return *backward(dout, q, k, v, bias, out, lse[..., :T], p, is_causal, scale), None


def joined(q, k, v, pk, pv, scale, mask, is_causal, p, seed):
    """softmax over [prefix; text], with the masks of the stand-in's dropout and of ours."""
    (B, H, T, _), n = q.shape, pk.shape[1]
    s = weights(q, k, scale, None, is_causal)
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf)
    pk, pv = (t.double().repeat_interleave(H // k.shape[1], 0) for t in (pk, pv))
    w = torch.cat((q.double() @ pk.mT * scale, s), -1).softmax(-1)
    keep = [text_keep(q, k, p)]
    if p:
        keep.insert(0, dropout_keep((B * H * T, n), p, seed).view(B, H, T, n))
        w = w * torch.cat(keep, -1) / (1 - p)
    return (w[..., :n] @ pv + w[..., n:] @ v.double().repeat_interleave(H // v.shape[1], 1)).to(q.dtype)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("kernel", "dtype", "masked", "is_causal", "sizes"),
    [
        ("flash", torch.bfloat16, False, True, {}),
        ("flash", torch.bfloat16, False, False, {"S": 29}),
        ("efficient", torch.float32, False, True, {"S": 29}),
        ("efficient", torch.float32, True, False, {"S": 29}),
        ("efficient", torch.bfloat16, True, False, {"S": 16}),
        ("efficient", torch.float32, True, False, {"S": 7, "Dv": 24}),
    ],
)
def test_kernels_of_a_gpu(monkeypatch, kernel, dtype, masked, is_causal, sizes, p):
    """Merged with the text's own dropout; rows that see no text; padding of the log-sum-exp kept; GQA both ways."""
    monkeypatch.setattr(_text_attention, "_aten", StandIns)
    monkeypatch.setattr(_text_attention, "kernel_for", lambda *_: kernel)
    leaves = problem(dtype, **sizes)
    mask = torch.rand(2, 1, 13, leaves[1].shape[2]) < 0.6 if masked else None
    if masked:
        mask[:, :, 3] = False
    dout = torch.randn(2, 4, 13, leaves[2].shape[3]).to(dtype)
    torch.manual_seed(3)
    y = prefix_attention(*leaves, mask=mask, is_causal=is_causal, dropout_p=p)
    torch.manual_seed(3)
    seed = mask_seed(None, y.device)
    ours = y, *torch.autograd.grad(y, leaves, dout)

    def formula(leaves, dout):
        y = joined(*leaves, 0.25, mask, is_causal, p, seed)
        return y, *torch.autograd.grad(y, leaves, dout.to(y.dtype))

    plain, exact = formula(leaves, dout), formula([t.detach().double().requires_grad_() for t in leaves], dout.double())
    for name, value, same, truth in zip(("y", *GIVEN), ours, plain, exact, strict=True):
        assert_as_accurate(name, value, same, truth, times=2.0 if name == "y" else 3.0)


@pytest.mark.unpoisoned
@pytest.mark.parametrize(
    ("dtype", "mask", "is_causal", "S", "Dv", "p", "expected"),
    [
        (torch.bfloat16, None, True, 13, 16, 0.1, "flash"), (torch.float16, None, False, 29, 16, 0.0, "flash"),
        (torch.bfloat16, None, True, 29, 16, 0.1, "efficient"), (torch.float16, (29,), False, 29, 16, 0.0, "efficient"),
        (torch.float32, (2, 1, 13, 29), False, 29, 24, 0.1, "efficient"), (torch.half, None, False, 0, 16, 0.1, "none"),
        (torch.float64, None, False, 29, 16, 0.0, None), (torch.bfloat16, None, False, 29, 12, 0.0, None),
        (torch.float32, None, False, 29, 16, 1.0, None),
    ],
)  # fmt: skip
def test_schema_of_the_kernels_of_a_gpu(monkeypatch, dtype, mask, is_causal, S, Dv, p, expected):
    """The choice for a Hopper GPU, and a call of the real operators: fake tensors check arguments and shapes."""
    monkeypatch.setattr(_text_attention, "_capability", lambda t: 9)
    with FakeTensorMode():
        q, k, v, _, _ = (t.detach() for t in problem(dtype, S=S, Dv=Dv, device="cuda"))
        mask = None if mask is None else torch.ones(mask, dtype=torch.bool, device="cuda")
        kernel = _text_attention.kernel_for(q, k, v, mask, is_causal, p)
        assert kernel == expected
        if kernel is None:
            return
        out, lse, state = _text_attention.attention(kernel, q, k, v, mask, is_causal, 0.25, p)
        assert out.shape == (2, 4, 13, Dv)
        assert lse.shape[:2] == (2, 4)
        assert lse.shape[2] >= 13
        grads = _text_attention.attention_gradients(
            kernel, torch.empty_like(out), q, k, v, mask, out, lse, state, is_causal, 0.25, p
        )
        assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]
