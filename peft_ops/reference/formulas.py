"""Each op whole, as its formula reads, differentiable by plain autograd: the truth in tests, and the path inside
torch.vmap and torch.func transforms. x [M, K]; float32 adapters on a 16-bit x are computed in float32."""

import torch

from .activations import activate
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


def bottleneck_adapter(
    x: torch.Tensor, down_weight: torch.Tensor, down_bias: torch.Tensor | None, up_weight: torch.Tensor,
    up_bias: torch.Tensor | None, activation: str, scaling: float, residual: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """residual + scaling · (act(x W_downᵀ + b_down) W_upᵀ + b_up), in the dtype that x and residual promote to."""
    wide = torch.promote_types(x.dtype, down_weight.dtype)
    down_bias, up_bias = (None if t is None else t.to(wide) for t in (down_bias, up_bias))
    z = torch.nn.functional.linear(x.to(wide), down_weight.to(wide), down_bias)
    term = scaling * torch.nn.functional.linear(activate(z, activation), up_weight.to(wide), up_bias)
    if residual is None:
        return term.to(x.dtype)
    return (residual + term).to(torch.promote_types(x.dtype, residual.dtype))
