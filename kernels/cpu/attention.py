"""Attention over text with its log-sum-exp, and its gradients from any (out, log-sum-exp), on a CPU."""

import torch

from . import heads, native


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, is_causal: bool,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(out [B, H, T, D], lse [B, H, T] in float32); in memory out's heads are side by side, as the next layer reads
    them."""
    B, H, T, D = query.shape
    q, k, v = map(heads.rows, (query, key, value))
    bias = heads.bias_rows(bias, query, key.shape[2])
    out = torch.empty_strided((B, H, T, D), (T * H * D, D, H * D, 1), dtype=query.dtype)  # no view: see autograd
    lse = torch.empty(B, H, T, dtype=torch.float32)
    native.lib.attention(
        out.data_ptr(), lse.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr(), native.address(bias),
        native.DTYPES[q.dtype], heads.strides(out, q, k, v, bias), heads.sizes(q, k, v), is_causal, scaling,
        heads.threads(q, k),
    )  # fmt: skip
    return out, lse


def attention_gradients(
    dout: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None,
    out: torch.Tensor, lse: torch.Tensor, is_causal: bool, scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dq, dk, dv), laid out as query, key and value are."""
    dout, q, k, v, out, lse = map(heads.rows, (dout, query, key, value, out, lse.unsqueeze(-1)))
    bias = heads.bias_rows(bias, query, key.shape[2])
    dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
    native.lib.attention_gradients(
        dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), dout.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr(),
        out.data_ptr(), lse.data_ptr(), native.address(bias), native.DTYPES[q.dtype],
        heads.strides(dq, dk, dv, dout, q, k, v, out, lse, bias), heads.sizes(q, k, v), is_causal, scaling,
        heads.threads(q, k),
    )  # fmt: skip
    return dq, dk, dv
