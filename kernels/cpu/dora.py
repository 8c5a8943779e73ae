"""DoRA's forward over a 4-bit weight on a CPU: the same product as without an adapter, then one pass over y."""

import torch

from .nf4_linear import nf4_linear

_CHUNK = 1 << 19  # elements of float32 that a core's cache holds


def dora_linear(
    x: torch.Tensor, weight, bias: torch.Tensor | None, s: torch.Tensor, b: torch.Tensor, scaling: float,
    g: torch.Tensor, keep_u: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """(y, u): y = g ∘ (u + scaling · s bᵀ) + bias with u = x Wᵀ, both in the dtype of x; without keep_u, y takes the
    memory of u, and u is None."""
    if isinstance(weight, torch.Tensor):
        u = torch.nn.functional.linear(x, weight.to(x.dtype))
    else:
        u = nf4_linear(x, weight, None)
    y = u.new_empty(u.shape) if keep_u else u
    bt, step = b.to(s.dtype).t(), max(1, _CHUNK // max(1, u.shape[1]))
    for start in range(0, u.shape[0], step):
        rows = slice(start, start + step)
        part = torch.addmm(u[rows].to(s.dtype), s[rows], bt, alpha=scaling).mul_(g)
        y[rows] = part if bias is None else part.add_(bias)
    return y, u if keep_u else None
