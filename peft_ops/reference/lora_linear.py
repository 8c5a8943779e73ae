"""The pieces of y = x Wᵀ + bias + scaling · drop(x) Aᵀ Bᵀ and of its gradients, in plain PyTorch.

x [M, K], weight [N, K] (dense, any strides, or an NF4Weight), a = lora_A [R, K], b = lora_B [N, R]. S, dS and the
gradients of a and b are float32 (float64 for float64 inputs): rows are widened a few at a time, so a fp32 adapter on a
16-bit base never costs a fp32 copy of x, of dy or of y.
"""

from collections.abc import Iterator

import torch

from . import nf4_linear as nf4
from .dropout import dropout

_CHUNK_ELEMENTS = 1 << 19  # rows widened at once: 2 MiB of float32, which a core's cache holds


def down_project(x: torch.Tensor, a: torch.Tensor, p: float, seed: torch.Tensor | None) -> torch.Tensor:
    """s [M, R] = drop(x) aᵀ, float32."""
    wide = _wide(x, a)
    s = x.new_empty(x.shape[0], a.shape[0], dtype=wide)
    at = a.to(wide).t()
    for rows in _chunks(x):
        s[rows] = dropout(x[rows].to(wide), p, seed, rows.start) @ at
    return s


def linear_low_rank(
    x: torch.Tensor, weight, bias: torch.Tensor | None, s: torch.Tensor, b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """y [M, N] = x Wᵀ + bias + scaling · s bᵀ, in the dtype of x."""
    y = _base(x, weight, bias)
    return y.addmm_(s.to(y.dtype), b.to(y.dtype).t(), alpha=scaling)


def low_rank_gradients(
    dy: torch.Tensor, s: torch.Tensor | None, b: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """ds [M, R] = scaling · dy b and, where s is given, db [N, R] = scaling · dyᵀ s, float32; one pass over dy."""
    wide = _wide(dy, b)
    b = b.to(wide) * scaling
    ds = dy.new_empty(dy.shape[0], b.shape[1], dtype=wide)
    dbt = None if s is None else ds.new_zeros(b.shape[1], b.shape[0])
    for rows in _chunks(dy):
        part = dy[rows].to(wide)
        ds[rows] = part @ b
        if s is not None:
            dbt.addmm_(s[rows].t(), part, alpha=scaling)
    return ds, None if dbt is None else dbt.t()


def linear_low_rank_dx(
    dy: torch.Tensor, weight, ds: torch.Tensor, a: torch.Tensor, p: float, seed: torch.Tensor | None
) -> torch.Tensor:
    """dx [M, K] = dy W + drop'(ds a), in the dtype of dy; drop' is the mask of the forward over 1 - p."""
    dx = dy @ weight.to(dy.dtype) if isinstance(weight, torch.Tensor) else nf4.nf4_linear_dx(dy, weight)
    if p == 0.0:
        return dx.addmm_(ds.to(dx.dtype), a.to(dx.dtype))
    a = a.to(ds.dtype)
    for rows in _chunks(dx):
        dx[rows] += dropout(ds[rows] @ a, p, seed, rows.start).to(dx.dtype)
    return dx


def down_project_da(ds: torch.Tensor, x: torch.Tensor, p: float, seed: torch.Tensor | None) -> torch.Tensor:
    """da [R, K] = dsᵀ drop(x), float32; one pass over x."""
    da = ds.new_zeros(ds.shape[1], x.shape[1])
    for rows in _chunks(x):
        da.addmm_(ds[rows].t(), dropout(x[rows].to(ds.dtype), p, seed, rows.start))
    return da


def _base(x: torch.Tensor, weight, bias: torch.Tensor | None) -> torch.Tensor:
    if not isinstance(weight, torch.Tensor):
        return nf4.nf4_linear(x, weight, bias)
    return torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _wide(*tensors: torch.Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _chunks(t: torch.Tensor) -> Iterator[slice]:
    step = max(1, _CHUNK_ELEMENTS // max(1, t.shape[1]))
    return (slice(start, min(start + step, t.shape[0])) for start in range(0, t.shape[0], step))
