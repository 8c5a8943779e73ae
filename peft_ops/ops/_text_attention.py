"""Attention over the text alone by the best kernel torch has for the device that gives the log-sum-exp, and its
gradients from any (out, log-sum-exp): merged ones give those of attention over more keys than the text.

Rows with no key to attend to are not special: a mask goes in as numbers no lower than `_floor`, beside which a score
vanishes, so that such a row comes out finite, with a log-sum-exp so low that merging gives it no weight.
"""

import torch

_aten = torch.ops.aten
MAX_HEAD_DIM = 256  # of torch's flash kernels, and of ours, on a GPU


def is_covered(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, is_causal: bool, p: float
) -> bool:
    """Whether there is such a kernel; where not, the plain formula serves."""
    if query.numel() == 0 or value.shape[-1] == 0:
        return False
    if query.device.type == "cpu":
        return query.shape[-1] == value.shape[-1] and p == 0.0
    return _is_flash(query, key, value, mask, is_causal, p) or _is_efficient(query, value, p)


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, is_causal: bool,
    scaling: float, p: float,
) -> tuple[torch.Tensor, torch.Tensor, tuple]:  # fmt: skip
    """(out [B, H, T, Dv], lse [B, H, >= T], the state of dropout); padding behind T in lse is the kernel's own."""
    if key.shape[2] == 0:
        out = query.new_zeros(*query.shape[:3], value.shape[-1])
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        return out, query.new_full(query.shape[:3], -torch.inf, dtype=wide), ()
    if query.device.type == "cpu":
        q, k, v = map(_dense, (query, key, value))
        bias = _additive(mask, query, key, 1)
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, p, is_causal, attn_mask=bias, scale=scaling
        )
        return out, lse, ()
    q, k, v = map(_aligned, (query, key, value))
    if _is_flash(query, key, value, mask, is_causal, p):
        out, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = _aten._scaled_dot_product_flash_attention(
            q, k, v, p, is_causal, False, scale=scaling
        )
        return out, lse, (cum_q, cum_k, max_q, max_k, seed, offset)
    bias = _additive(mask, query, key, 16)
    k, v = (_repeated(t, query) for t in (k, v))
    out, lse, *state = _aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, p, is_causal, scale=scaling)
    return out, lse, tuple(state)


def attention_gradients(
    dout: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    out: torch.Tensor, lse: torch.Tensor, state: tuple, is_causal: bool, scaling: float, p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dq, dk, dv) of the text's keys: weights are exp(score − lse), whatever keys else went into out and lse."""
    if key.shape[2] == 0:
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    if query.device.type == "cpu":
        d, q, k, v = map(_dense, (dout, query, key, value))
        bias = _additive(mask, query, key, 1)
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d, q, k, v, out, lse, p, is_causal, attn_mask=bias, scale=scaling
        )
    d, q, k, v = map(_aligned, (dout, query, key, value))
    if _is_flash(query, key, value, mask, is_causal, p):
        cum_q, cum_k, max_q, max_k, *rng = state
        return _aten._scaled_dot_product_flash_attention_backward(
            d, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, p, is_causal, *rng, scale=scaling
        )
    bias = _additive(mask, query, key, 16)
    k, v = (_repeated(t, query) for t in (k, v))
    dq, dk, dv, _ = _aten._scaled_dot_product_efficient_attention_backward(
        d, q, k, v, bias, out, lse, *state, p, [True, True, True, False], is_causal, scale=scaling
    )
    return dq, *(t.unflatten(1, (key.shape[1], -1)).sum(2) if t.shape[1] != key.shape[1] else t for t in (dk, dv))


def _is_flash(query, key, value, mask, is_causal, p) -> bool:
    """torch's flash attention on a GPU: no mask, causal only where square (it aligns to the bottom right)."""
    D = query.shape[-1]
    return (
        mask is None and query.dtype in (torch.float16, torch.bfloat16) and value.shape[-1] == D
        and D % 8 == 0 and D <= MAX_HEAD_DIM and p < 1.0 and (not is_causal or query.shape[2] == key.shape[2])
        and _capability(query) >= 8
    )  # fmt: skip


def _is_efficient(query, value, p) -> bool:
    """torch's memory-efficient attention: any mask, GQA by repeating keys and values."""
    D, Dv = query.shape[-1], value.shape[-1]
    whole = 4 if query.dtype == torch.float32 else 8
    least = {torch.float32: 5, torch.float16: 5, torch.bfloat16: 8}.get(query.dtype)
    return (
        least is not None and _capability(query) >= least and p < 1.0
        and D % whole == 0 and Dv % whole == 0 and max(D, Dv) <= MAX_HEAD_DIM and (not torch.version.hip or Dv == D)
    )  # fmt: skip


def _capability(t: torch.Tensor) -> int:
    return torch.cuda.get_device_capability(t.device)[0] if t.is_cuda else 0


def _dense(t: torch.Tensor) -> torch.Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _aligned(t: torch.Tensor) -> torch.Tensor:
    """With a dense last dimension, and rows that start at multiples of 16 bytes."""
    starts = (t.storage_offset(), *t.stride()[:-1])
    whole = 16 // t.element_size()
    return (
        t
        if t.stride(-1) == 1 and all(s % whole == 0 for s in starts)
        else t.clone(memory_format=torch.contiguous_format)
    )


def _repeated(t: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    return t.repeat_interleave(query.shape[1] // t.shape[1], 1) if t.shape[1] != query.shape[1] else t


def _additive(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor, align: int) -> torch.Tensor | None:
    """The mask as numbers to add, four-dimensional, rows that start at multiples of `align` elements.

    In the dtype of query; a float32 mask stays one where it can (align 1: the CPU), so that its bits are not lost.
    """
    if mask is None:
        return None
    S = key.shape[2]
    mask = mask[(None,) * (4 - mask.dim())]
    mask = mask.expand(*mask.shape[:-1], S)
    dtype = mask.dtype if align == 1 and mask.dtype == torch.float32 and query.dtype != torch.float64 else query.dtype
    bias = query.new_empty(*mask.shape[:-1], -(-S // align) * align, dtype=dtype)[..., :S]
    if mask.dtype == torch.bool:
        bias.fill_(_floor(dtype)).masked_fill_(mask, 0.0)
    else:
        bias.copy_(mask).clamp_(min=_floor(dtype))
    return bias if align == 1 else bias.expand(query.shape[0], query.shape[1], query.shape[2], S)


def _floor(dtype: torch.dtype) -> float:
    """As good as minus infinity beside a score, and finite when a kernel has scaled it."""
    return max(torch.finfo(dtype).min, -1e30)
