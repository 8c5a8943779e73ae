"""Each op whole, as its formula reads, differentiable by plain autograd: the truth in tests, and the path inside
torch.vmap and torch.func transforms. x [M, K]; float32 adapters on a 16-bit x are computed in float32."""

import torch

from .dora import NORM_FLOOR
from .dropout import dropout
from .nf4 import nf4_dequantize


def nf4_linear(x: torch.Tensor, weight, bias: torch.Tensor | None) -> torch.Tensor:
    """x deq(W)ᵀ + bias."""
    w = nf4_dequantize(weight, x.dtype).view(weight.shape)
    return torch.nn.functional.linear(x, w, None if bias is None else bias.to(x.dtype))


def lora_linear(
    x: torch.Tensor, weight, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor,
    scaling: float, p: float, seed: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """x Wᵀ + bias + scaling · drop(x) aᵀ bᵀ."""
    if isinstance(weight, torch.Tensor):
        base = torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    else:
        base = nf4_linear(x, weight, bias)
    low_rank = dropout(x.to(torch.promote_types(x.dtype, a.dtype)), p, seed) @ a.t() @ b.t().to(a.dtype)
    return base + (scaling * low_rank).to(base.dtype)


def dora_linear(
    x: torch.Tensor, weight, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, magnitude: torch.Tensor,
    scaling: float, p: float, seed: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """(magnitude / ‖W + scaling · b a‖) ∘ (x Wᵀ + scaling · drop(x) aᵀ bᵀ) + bias, the norm of each row detached."""
    g = magnitude / dora_norm(weight, a, b, scaling)
    y = g * lora_linear(x, weight, None, a, b, scaling, p, seed)
    return (y if bias is None else y + bias).to(x.dtype)


def dora_norm(weight, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """‖W + scaling · b a‖ of each row, a constant to autograd."""
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    if isinstance(weight, torch.Tensor):
        w = weight.to(torch.promote_types(wide, weight.dtype))
    else:
        w = nf4_dequantize(weight, wide).view(weight.shape)
    w = w.detach() + scaling * (b.detach().to(w.dtype) @ a.detach().to(w.dtype))
    return torch.linalg.vector_norm(w, dim=1).clamp_min(NORM_FLOOR)


def lora_embedding(
    x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float,
    padding_idx: int | None = None, scale_grad_by_freq: bool = False, embed_scale: float | torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """embed_scale · (weight[x] + scaling · a[:, x]ᵀ bᵀ)."""

    def rows(table: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(x, table, padding_idx, scale_grad_by_freq=scale_grad_by_freq)

    base, low_rank = rows(weight), scaling * (rows(a.t()) @ b.t().to(a.dtype))
    if embed_scale is not None:
        base, low_rank = base * embed_scale, low_rank * embed_scale
    return base + low_rank.to(base.dtype)
