"""softmax(scaling · Q Kᵀ + bias) V by torch's flash attention for a CPU, and its gradients from out and log-sum-exp."""

import torch

_aten = torch.ops.aten


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, is_causal: bool,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(out [B, H, T, D], lse [B, H, T]) of query [B, H, T, D] over key and value [B, Hkv, S, D] on a CPU, any strides.

    H is a multiple of Hkv, S at least 1. bias is added to scores: finite, four-dimensional, broadcastable to
    [B, H, T, S], in the dtype of query or, beside 16-bit queries, float32. With is_causal, which takes no bias, row t
    sees keys up to t. lse is float32, float64 for float64.
    """
    return _aten._scaled_dot_product_flash_attention_for_cpu(
        _dense(query), _dense(key), _dense(value), 0.0, is_causal, attn_mask=bias, scale=scaling
    )


def attention_gradients(
    dout: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None,
    out: torch.Tensor, lse: torch.Tensor, is_causal: bool, scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dq, dk, dv) in the dtype of query, of weights exp(score − lse), whatever keys else went into out and lse.

    An lse of +inf gives a row no weight anywhere.
    """
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        _dense(dout), _dense(query), _dense(key), _dense(value), out, lse, 0.0, is_causal, attn_mask=bias, scale=scaling
    )


def _dense(t: torch.Tensor) -> torch.Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()
