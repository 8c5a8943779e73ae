"""Attention over the text alone by the best kernel torch has for the device that gives the log-sum-exp, and its
gradients from any (out, log-sum-exp): merged ones give those of attention over more keys than the text.

Rows with no key to attend to are not special: a mask goes in as numbers no lower than `floor`, beside which a score
vanishes, so that such a row comes out finite, with a log-sum-exp so low that merging gives it no weight.
"""

import torch

from .._backend import implementation
from ..reference.rows import wide_dtype

_aten = torch.ops.aten
_MAX_HEAD_DIM = 256  # of torch's flash attention on a GPU, and of our kernels


def kernel_for(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, is_causal: bool, p: float
) -> str | None:
    """ "none" (there is no text), "cpu", "flash" or "efficient"; None where the plain formula has to serve."""
    (_, _, T, D), S, Dv = query.shape, key.shape[2], value.shape[3]
    if query.numel() == 0 or Dv == 0:
        return None
    if query.device.type == "cpu":
        return ("none" if S == 0 else "cpu") if Dv == D and p == 0.0 else None
    whole = 4 if query.dtype == torch.float32 else 8
    if not query.is_cuda or p == 1.0 or max(D, Dv) > _MAX_HEAD_DIM or D % whole or Dv % whole:
        return None
    if S == 0:
        return "none"
    half = query.dtype in (torch.float16, torch.bfloat16)
    square = not is_causal or T == S  # flash attention aligns to the bottom right
    if mask is None and half and Dv == D and square and _capability(query) >= 8:
        return "flash"
    least = 8 if query.dtype == torch.bfloat16 else 5
    known = (half or query.dtype == torch.float32) and _capability(query) >= least
    return "efficient" if known and (Dv == D or not torch.version.hip) else None


def attention(
    kernel: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    is_causal: bool, scaling: float, p: float,
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor | None, ...]]:  # fmt: skip
    """(out [B, H, T, Dv], lse [B, H, >= T], what the gradients ask back); padding behind T in lse is the kernel's."""
    if kernel == "none":
        out = query.new_zeros(*query.shape[:3], value.shape[3])
        return out, query.new_full(query.shape[:3], -torch.inf, dtype=wide_dtype(query)), ()
    q, k, v, bias = _arguments(kernel, query, key, value, mask)
    if kernel == "cpu":
        out, lse = implementation("attention", query).attention(q, k, v, bias, is_causal, scaling)
        return out, lse, ()
    if kernel == "flash":
        out, lse, cum_q, cum_k, _, _, *rng, _ = _aten._scaled_dot_product_flash_attention(
            q, k, v, p, is_causal, False, scale=scaling
        )
        return out, lse, (cum_q, cum_k, *rng)
    out, lse, *rng = _aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, p, is_causal, scale=scaling)
    return out, lse, tuple(rng)


def attention_gradients(
    kernel: str, dout: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    mask: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor, state: tuple, is_causal: bool, scaling: float,
    p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dq, dk, dv) of the text's keys: weights are exp(score − lse), whatever keys else went into out and lse."""
    if kernel == "none":
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    q, k, v, bias = _arguments(kernel, query, key, value, mask)
    if kernel == "cpu":
        return implementation("attention", query).attention_gradients(dout, q, k, v, bias, out, lse, is_causal, scaling)
    if kernel == "flash":
        cum_q, cum_k, *rng = state
        return _aten._scaled_dot_product_flash_attention_backward(
            _aligned(dout), q, k, v, out, lse, cum_q, cum_k, q.shape[2], k.shape[2], p, is_causal, *rng, scale=scaling
        )
    dq, dk, dv, _ = _aten._scaled_dot_product_efficient_attention_backward(
        _aligned(dout), q, k, v, bias, out, lse, *state, p, [True, True, True, False], is_causal, scale=scaling
    )
    if dk.shape[1] != key.shape[1]:
        dk, dv = (t.unflatten(1, (key.shape[1], -1)).sum(2) for t in (dk, dv))
    return dq, dk, dv


def _arguments(kernel, query, key, value, mask) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(query, key, value, bias) as a kernel wants them; views where they are so already."""
    if kernel == "cpu":
        return query, key, value, additive(mask, query, key, 1)
    q, k, v = map(_aligned, (query, key, value))
    if kernel == "flash":
        return q, k, v, None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # for as long as the kernel runs: no such copy is kept
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return q, k, v, additive(mask, query, key, 16)


def _capability(t: torch.Tensor) -> int:
    return torch.cuda.get_device_capability(t.device)[0]


def _aligned(t: torch.Tensor) -> torch.Tensor:
    """With a dense last dimension, and rows that start at multiples of 16 bytes."""
    starts = (t.storage_offset(), *t.stride()[:-1])
    whole = 16 // t.element_size()
    if t.stride(-1) == 1 and all(start % whole == 0 for start in starts):
        return t
    return t.clone(memory_format=torch.contiguous_format)


def additive(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor, align: int) -> torch.Tensor | None:
    """The mask as numbers to add, four-dimensional; with `align`, [B, H, T, S] whose rows start at multiples of it.

    In the dtype of query; with align 1, for a CPU, float32 beside 16-bit queries: float16 has no number that is low
    enough, and bits of a float32 mask are not lost.
    """
    if mask is None:
        return None
    S, mask = key.shape[2], four_dimensional(mask, key)
    dtype = wide_dtype(query) if align == 1 else query.dtype
    bias = query.new_empty(*mask.shape[:3], -(-S // align) * align, dtype=dtype).narrow(3, 0, S)
    if mask.dtype == torch.bool:
        bias.fill_(floor(dtype)).masked_fill_(mask, 0.0)
    else:
        bias.copy_(mask)
        if (lowest := torch.finfo(mask.dtype).min) > floor(dtype):  # of float16
            bias.masked_fill_(mask <= lowest, floor(dtype))
        bias.clamp_(min=floor(dtype))
    return bias if align == 1 else bias.expand(*query.shape[:3], S)


def four_dimensional(mask: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """A view whose last dimension is as long as key [B, Hkv, S, D]; the others may be 1."""
    mask = torch.atleast_1d(mask)
    return mask.expand((1,) * (4 - mask.dim()) + (*mask.shape[:-1], key.shape[2]))


def floor(dtype: torch.dtype) -> float:
    """As good as minus infinity beside a score, and finite when a kernel has scaled it."""
    return max(torch.finfo(dtype).min, -1e30)
