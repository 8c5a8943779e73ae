"""The way up from a bottleneck, with its activation and residual, and the gradients on the way back, in plain PyTorch.

s [M, R] = x W_downᵀ as `down_project` gives it, z = s + bias [R]; weight = W_up [N, R], up_bias [N]; y, dy, residual
[M, N]. Sums are float32 (float64 for float64 inputs).
"""

import torch

from .activations import activate, derivative
from .rows import ProductSum, chunks, wide_dtype, widened


def up_project(
    s: torch.Tensor, bias: torch.Tensor | None, weight: torch.Tensor, up_bias: torch.Tensor | None,
    activation: str, scaling: float, residual: torch.Tensor | None, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """y = residual + scaling · (act(s + bias) weightᵀ + up_bias), a new tensor of `dtype`, rounded once."""
    h = activate(_wide_z(s, bias), activation).to(torch.promote_types(s.dtype, dtype))
    y = s.new_empty(s.shape[0], weight.shape[0], dtype=dtype)
    wt, shift = weight.to(h.dtype).t(), h.new_zeros(()) if up_bias is None else up_bias.to(h.dtype)
    for rows in chunks(y):
        term = torch.addmm(shift, h[rows], wt, alpha=scaling, beta=scaling)
        y[rows] = term if residual is None else term.add_(residual[rows])
    return y


def up_project_gradients(
    dy: torch.Tensor, s: torch.Tensor, bias: torch.Tensor | None, weight: torch.Tensor,
    activation: str, scaling: float, need_weight: bool, need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """dz [M, R] = scaling · dy weight ∘ act'(z); where needed, dweight [N, R] = scaling · dyᵀ act(z) and
    dup_bias [N] = scaling · Σ dy. One pass over dy."""
    wide = wide_dtype(dy, s, weight)
    z, w = _wide_z(s, bias).to(wide), weight.to(wide)
    h = activate(z, activation)
    dz = dy.new_empty(z.shape, dtype=wide)
    dwt = ProductSum(dy, w.shape[1], w.shape[0], wide)
    dbias = dy.new_zeros(w.shape[0], dtype=wide)
    for rows, part in widened(dy, wide):
        torch.mm(part, w, out=dz[rows])
        if need_weight:
            dwt.add(h[rows], part)
        if need_bias:
            dbias += part.sum(0)
    dz.mul_(derivative(z, activation)).mul_(scaling)
    return dz, dwt.total().mul_(scaling).t() if need_weight else None, dbias.mul_(scaling) if need_bias else None


def _wide_z(s: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return s if bias is None else s + bias.to(s.dtype)
