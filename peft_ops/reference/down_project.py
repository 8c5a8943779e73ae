"""s = drop(x) aᵀ and da = dsᵀ drop(x), in plain PyTorch.

x [M, K], a = lora_A [R, K], ds [M, R]; results are float32 (float64 for float64 inputs). drop(x) = keep · x / (1 - p)
with the mask of `dropout_keep(seed)`; seed is a 0-dim int64 tensor, or None where p is 0 or 1.
"""

import torch

from .dropout import dropout
from .rows import ProductSum, wide_dtype, widened


def down_project(x: torch.Tensor, a: torch.Tensor, p: float, seed: torch.Tensor | None) -> torch.Tensor:
    """s [M, R] = drop(x) aᵀ."""
    wide = wide_dtype(x, a)
    s = x.new_empty(x.shape[0], a.shape[0], dtype=wide)
    at = a.to(wide).t()
    for rows, part in widened(x, wide):
        torch.mm(dropout(part, p, seed, rows.start), at, out=s[rows])
    return s


def down_project_da(ds: torch.Tensor, x: torch.Tensor, p: float, seed: torch.Tensor | None) -> torch.Tensor:
    """da [R, K] = dsᵀ drop(x); one pass over x."""
    da = ProductSum(x, ds.shape[1], x.shape[1], ds.dtype)
    for rows, part in widened(x, ds.dtype):
        da.add(ds[rows], dropout(part, p, seed, rows.start))
    return da.total()
