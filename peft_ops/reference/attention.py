"""Attention over the text on a CPU, with its log-sum-exp, and its gradients from any (out, log-sum-exp), by torch.

query, dout, out [B, H, T, D]; key, value [B, Hkv, S, D], H a multiple of Hkv; lse [B, H, T] in float32 (float64 for
float64), the log of the sum of a row's exponentiated scores; bias, finite and of four dimensions, is broadcastable to
[B, H, T, S], or None. is_causal: row t sees keys up to t, from the top left; not with a bias.
"""

import torch


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, is_causal: bool,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(out, lse) of softmax(scaling · query keyᵀ + bias) value."""
    q, k, v = map(_dense, (query, key, value))
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return forward(q, k, v, 0.0, is_causal, attn_mask=bias, scale=scaling)


def attention_gradients(
    dout: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None,
    out: torch.Tensor, lse: torch.Tensor, is_causal: bool, scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dq, dk, dv): weights are exp(score − lse), whatever keys else went into out and lse; none where lse is +inf."""
    dout, q, k, v = map(_dense, (dout, query, key, value))
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(dout, q, k, v, out, lse, 0.0, is_causal, attn_mask=bias, scale=scaling)


def _dense(t: torch.Tensor) -> torch.Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()
