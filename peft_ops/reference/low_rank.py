"""A low-rank term added in place, and its gradients, in plain PyTorch.

y, dy [M, N]; s = the down-projected input [M, R]; b = lora_B [N, R]; sums are float32 (float64 for float64 inputs).
"""

import torch

from .dropout import dropout, seed_groups
from .rows import ProductSum, chunks, wide_dtype, widened


def low_rank_update_(
    y: torch.Tensor, s: torch.Tensor, b: torch.Tensor, scaling: float, p: float, seed: torch.Tensor | None
) -> torch.Tensor:
    """y += scaling · drop(s bᵀ), in place and returned; drop with the mask that `seed` gives an [M, N] tensor.

    seed int64 [G]: the R columns of s and b are G equal groups, whose terms are dropped each with its own mask.
    """
    if p == 0.0:
        return y.addmm_(s.to(y.dtype), b.to(y.dtype).t(), alpha=scaling)
    bt = b.to(s.dtype).t() * scaling
    for rows in chunks(y):
        first, *others = (
            dropout(s[rows, columns] @ bt[columns], p, own, rows.start)
            for columns, own in seed_groups(seed, s.shape[1])
        )
        y[rows] += sum(others, first).to(y.dtype)
    return y


def low_rank_gradients(
    dy: torch.Tensor, s: torch.Tensor | None, b: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """ds [M, R] = scaling · dy b and, where s is given, db [N, R] = scaling · dyᵀ s; one pass over dy."""
    wide = wide_dtype(dy, b)
    b = b.to(wide) * scaling
    ds = dy.new_empty(dy.shape[0], b.shape[1], dtype=wide)
    dbt = ProductSum(dy, b.shape[1], b.shape[0], wide)
    for rows, part in widened(dy, wide):
        torch.mm(part, b, out=ds[rows])
        if s is not None:
            dbt.add(s[rows], part)
    return ds, None if s is None else dbt.total().mul_(scaling).t()
