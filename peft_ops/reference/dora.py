"""What DoRA adds to LoRA: the norm of each row of the adapted weight, and a scale per output, in plain PyTorch.

x [M, K]; u, y, dy [M, N]; weight W [N, K], dense with any strides or an NF4Weight; a [R, K]; b [N, R]; s = the
down-projected input [M, R]; g = magnitude / norm [N]. Sums are float32 (float64 for float64 inputs).
"""

from collections.abc import Iterator

import torch

from .nf4_linear import decoded_rows, nf4_linear
from .rows import chunks, wide_dtype, widened

NORM_FLOOR = 1e-18  # of a row of zeros, whose square is still a float32: dividing by it gives no NaN


def dora_norm(weight, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """norm [N] = ‖W + scaling · b a‖ of each row, at least NORM_FLOOR; one pass over W, a few rows at a time.

    An NF4 weight is decoded in float32, so that the norm does not depend on the dtype of x.
    """
    wide = wide_dtype(a, b, *([weight] if isinstance(weight, torch.Tensor) else []))
    a, b = a.to(wide), b.to(wide)
    norm = b.new_empty(b.shape[0])
    for rows, w in _rows(weight, wide):
        norm[rows] = torch.linalg.vector_norm(torch.addmm(w, b[rows], a, alpha=scaling), dim=1)
    return norm.clamp_min_(NORM_FLOOR)


def _rows(weight, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    return widened(weight, dtype) if isinstance(weight, torch.Tensor) else decoded_rows(weight, dtype)


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
    bt = b.to(s.dtype).t()
    for rows in chunks(u):
        part = torch.addmm(u[rows].to(s.dtype), s[rows], bt, alpha=scaling).mul_(g)
        y[rows] = part if bias is None else part.add_(bias)
    return y, u if keep_u else None


def dora_gradients(
    dy: torch.Tensor, u: torch.Tensor | None, g: torch.Tensor, need_dz: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(dz [M, N] = g ∘ dy in the dtype of dy, where needed; dg [N] = Σ_m dy ∘ u, where u is given); one read of dy."""
    dz = dy.new_empty(dy.shape) if need_dz else None
    dg = None if u is None else torch.zeros_like(g)
    for rows, part in widened(dy, g.dtype):
        if dg is not None and u is not None:
            dg += (part * u[rows]).sum(0)
        if dz is not None:
            dz[rows] = part * g
    return dz, dg
