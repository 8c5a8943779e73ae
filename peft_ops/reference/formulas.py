"""Each op whole, as its formula reads, differentiable by plain autograd: the truth in tests, and the path inside
torch.vmap and torch.func transforms. x [M, K]; float32 adapters on a 16-bit x are computed in float32."""

import torch

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
