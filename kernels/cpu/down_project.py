"""s = drop(x) aᵀ and da = dsᵀ drop(x) on a CPU, in float32; x is widened and masked a tile at a time."""

import torch

from . import native


def down_project(x: torch.Tensor, a: torch.Tensor, p: float, seed: torch.Tensor | None) -> torch.Tensor:
    """s [M, R] = drop(x) aᵀ."""
    (M, K), R = x.shape, a.shape[0]
    if p >= 1.0:
        return torch.zeros(M, R)
    s, x, a, seed = torch.empty(M, R, dtype=torch.float32), native.rows(x), native.operand(a), native.seeds(seed)
    native.lib.down_project(
        s.data_ptr(), x.data_ptr(), native.DTYPES[x.dtype], x.stride(0), a.data_ptr(), a.stride(0), M, K, R,
        *native.dropout_arguments(p, seed, R), native.threads(M * K),
    )  # fmt: skip
    return s


def down_project_da(ds: torch.Tensor, x: torch.Tensor, p: float, seed: torch.Tensor | None) -> torch.Tensor:
    """da [R, K] = dsᵀ drop(x); one pass over x."""
    return _product_sum(ds, x, p, seed, 1.0)


def _product_sum(
    ds: torch.Tensor, x: torch.Tensor, p: float, seed: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """[R, K] = scaling · dsᵀ drop(x)."""
    (M, K), R = x.shape, ds.shape[1]
    if p >= 1.0:
        return torch.zeros(R, K)
    da, ds = torch.empty(R, K, dtype=torch.float32), ds.float().contiguous()
    x, seed = native.rows(x), native.seeds(seed)
    native.lib.down_project_da(
        da.data_ptr(), ds.data_ptr(), x.data_ptr(), native.DTYPES[x.dtype], x.stride(0), M, K, R,
        *native.dropout_arguments(p, seed, R, scaling), native.threads(M * K),
    )  # fmt: skip
    return da
