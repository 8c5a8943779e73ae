"""Scaled dot-product attention, whose gradients on a CPU are a multiple as fast as torch's."""

import torch
from torch.autograd.function import once_differentiable

from ..reference import formulas
from . import _text_attention as text
from ._arguments import autocast_input, check_device, functorch_active, without_autocast
from ._attention_arguments import check_heads, check_mask


class _Attention(torch.autograd.Function):
    """Saves references to its inputs, out and the log-sum-exp [B, H, T]: no weights, and no mask but the given one.

    A row that sees no key gets zeros; its log-sum-exp becomes +inf, of which its weights are zero in the backward.
    """

    @staticmethod
    @without_autocast
    def forward(ctx, query, key, value, mask, kernel, is_causal, scaling):
        out, lse, _ = text.attention(kernel, query, key, value, mask, is_causal, scaling, 0.0)
        if mask is not None and kernel != "none":
            sees_none = lse <= text.NO_KEY
            out.masked_fill_(sees_none.unsqueeze(-1), 0.0)
            lse.masked_fill_(sees_none, torch.inf)
        ctx.save_for_backward(query, key, value, mask, out, lse)
        ctx.kernel, ctx.is_causal, ctx.scaling = kernel, is_causal, scaling
        return out

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dout):
        query, key, value, mask, out, lse = ctx.saved_tensors
        gradients = text.attention_gradients(
            ctx.kernel, dout, query, key, value, mask, out, lse, (), ctx.is_causal, ctx.scaling, 0.0
        )
        return *(d if need else None for d, need in zip(gradients, ctx.needs_input_grad, strict=False)), *(None,) * 4


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None = None,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """softmax(scaling · query keyᵀ + mask) value, as torch's scaled_dot_product_attention with enable_gqa.

    On a CPU the native library computes it and its gradients, which keep query, key, value, out and the log-sum-exp.
    Everywhere else, where something traces (torch.compile, torch.export, functorch), and for D != Dv it is torch's.

    Args:
        query: [B, H, T, D], floating point; under autocast query, key and value are cast first, as by SDPA.
        key, value: [B, Hkv, S, D] and [B, Hkv, S, Dv], the dtype of query; H is a multiple of Hkv.
        scaling: of scores; D ** -0.5 by default.
        mask: broadcastable to [B, H, T, S]: bool (True attends) or floating point to be added, in which -inf and the
            lowest number of its dtype mean the same. A row that sees no key gets zeros.
        is_causal: row t sees keys up to t, from the top left as in SDPA; not with a mask.

    Returns: [B, H, T, Dv], the dtype of query.

    Raises:
        TypeError: a tensor that is not floating point (mask: or bool), of another dtype than query, or a DTensor.
        ValueError: shapes that do not fit, a mask with is_causal, a mask that requires a gradient, tensors on
            different devices.

    Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.2.1; Dao et al., "FlashAttention", 2022.
    """
    query, key, value = (autocast_input(t) if isinstance(t, torch.Tensor) else t for t in (query, key, value))
    check_heads(query, key, value)
    check_device(query, "query", key=key, value=value)
    check_mask("attention", query, key, mask, is_causal)
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    kernel = text.kernel_for(query, key, value, mask, is_causal, 0.0) if query.device.type == "cpu" else None
    if kernel is None or torch.compiler.is_compiling() or functorch_active():
        return formulas.attention(query, key, value, scaling, mask, bool(is_causal))
    return _Attention.apply(query, key, value, mask, kernel, bool(is_causal), scaling)
