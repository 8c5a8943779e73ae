"""Attention, on a CPU by one op that is differentiable in query, key and value; elsewhere torch's own."""

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from .._backend import implementation, is_plain
from ._arguments import autocast_input, without_autocast
from ._attention_arguments import check_attention, check_floating, check_mask
from ._text_attention import additive, floor, four_dimensional

OP = "attention"


class _Attention(torch.autograd.Function):
    """Saves references to query, key, value and mask, and out and the log-sum-exp [B, H, T]: no weights."""

    @staticmethod
    @without_autocast
    def forward(ctx, query, key, value, mask, is_causal, scaling):
        bias = additive(mask, query, key, 1)
        out, lse = implementation(OP, query).attention(query, key, value, bias, is_causal, scaling)
        if bias is not None:
            empty = lse <= 0.5 * floor(bias.dtype)
            if empty.any():
                out.masked_fill_(empty.unsqueeze(-1), 0.0)
                lse.masked_fill_(empty, torch.inf)  # no weight anywhere in the gradients
        ctx.save_for_backward(query, key, value, mask, out, lse)
        ctx.scalars = is_causal, scaling
        return out

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dout):
        query, key, value, mask, out, lse = ctx.saved_tensors
        gradients = implementation(OP, query).attention_gradients(
            dout, query, key, value, additive(mask, query, key, 1), out, lse, *ctx.scalars
        )
        needed = ctx.needs_input_grad
        return *(d if need else None for d, need in zip(gradients, needed[:3], strict=True)), None, None, None


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None = None,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """softmax(scaling · query keyᵀ + mask) value: as scaled_dot_product_attention with enable_gqa, natively on a CPU.

    On other devices, with D != Dv, and where something traces or watches (torch.compile, torch.export, torch.jit.trace,
    functorch transforms, fake tensors, dispatch modes) it is scaled_dot_product_attention itself. For the backward
    query, key, value and mask are kept as they are, and out [B, H, T, D] and a log-sum-exp [B, H, T]; a mask as
    numbers, 4 bytes an element of its own shape, lives for as long as the kernel runs.

    Args:
        query: [B, H, T, D], floating point; under autocast query, key and value are cast first, as by SDPA. T may be 0.
        key, value: [B, Hkv, S, D] and [B, Hkv, S, Dv], the dtype of query; H is a multiple of Hkv; S may be 0.
        scaling: of scores; D ** -0.5 by default.
        mask: broadcastable to [B, H, T, S]: bool (True attends) or floating point to be added, in which -inf and, on a
            CPU, the lowest number of its dtype mean that a key is not seen. A row that sees no key gives zeros.
        is_causal: row t sees keys up to t, from the top left as in SDPA; not with a mask.

    Returns: [B, H, T, Dv], the dtype of query.

    Raises:
        TypeError: a tensor that is not floating point (mask: or bool), of another dtype than query, or a DTensor.
        ValueError: shapes that do not fit, a mask with is_causal, a mask that requires a gradient, tensors on
            different devices.

    Source: Dao et al., "FlashAttention", 2022, algorithm 1 and appendix B; Ainslie et al., "GQA", 2023.
    """
    query, key, value = (autocast_input(t) if isinstance(t, torch.Tensor) else t for t in (query, key, value))
    check_floating(query=query, key=key, value=value)
    check_attention(query, key, value)
    check_mask(OP, query, key, mask, is_causal)
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    tensors = (query, key, value) if mask is None else (query, key, value, mask)
    here = is_plain(*tensors) and not torch.jit.is_tracing()
    if here and query.shape[-1] == value.shape[-1] and query.numel() and key.numel():
        return _Attention.apply(query, key, value, mask, bool(is_causal), scaling)
    if mask is not None:
        mask = four_dimensional(mask, key)
        mask = mask if mask.dtype == torch.bool else mask.to(query.dtype)
    grouped = bool(query.shape[1] != key.shape[1])  # no bool under torch.jit.trace
    return scaled_dot_product_attention(
        query, key, value, mask, is_causal=bool(is_causal), scale=scaling, enable_gqa=grouped
    )
