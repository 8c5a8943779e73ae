"""s = drop(x) aᵀ and da = dsᵀ drop(x), in plain PyTorch.

x [M, K], a = lora_A [R, K], ds [M, R]; results are float32 (float64 for float64 inputs). drop(x) = keep · x / (1 - p)
with the mask of `dropout_keep(seed)`; seed is a 0-dim int64 tensor, or None where p is 0 or 1. An int64 [G] divides the
R rows of a (columns of s and ds) into G equal groups: for each x is dropped with the mask of its own seed.
"""

import torch

from .dropout import dropout, seed_groups
from .rows import ProductSum, wide_dtype, widened


def down_project(x: torch.Tensor, a: torch.Tensor, p: float, seed: torch.Tensor | None) -> torch.Tensor:
    """s [M, R] = drop(x) aᵀ."""
    wide = wide_dtype(x, a)
    s = x.new_empty(x.shape[0], a.shape[0], dtype=wide)
    at = a.to(wide).t()
    for rows, part in widened(x, wide):
        for columns, own in seed_groups(seed, a.shape[0]):
            torch.mm(dropout(part, p, own, rows.start), at[:, columns], out=s[rows, columns])
    return s


def down_project_da(ds: torch.Tensor, x: torch.Tensor, p: float, seed: torch.Tensor | None) -> torch.Tensor:
    """da [R, K] = dsᵀ drop(x); one pass over x."""
    groups = [
        (columns, own, ProductSum(x, columns.stop - columns.start, x.shape[1], ds.dtype))
        for columns, own in seed_groups(seed, ds.shape[1])
    ]
    for rows, part in widened(x, ds.dtype):
        for columns, own, da in groups:
            da.add(ds[rows, columns], dropout(part, p, own, rows.start))
    return groups[0][2].total() if len(groups) == 1 else torch.cat([da.total() for _, _, da in groups])
