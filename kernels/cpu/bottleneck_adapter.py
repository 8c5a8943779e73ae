"""The way up from a bottleneck, and the gradients on the way back, on a CPU: skinny products, y written once."""

import torch

from . import native
from .down_project import _product_sum
from .low_rank import low_rank_gradients
from .low_rank_output import low_rank_output


def up_project(
    s: torch.Tensor, bias: torch.Tensor | None, weight: torch.Tensor, up_bias: torch.Tensor | None,
    activation: str, scaling: float, residual: torch.Tensor | None, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """y = residual + scaling · (act(s + bias) weightᵀ + up_bias), a new tensor of `dtype`, rounded once."""
    h = s if bias is None and activation == "linear" else _activated(s, bias, activation, None)
    y = torch.empty(s.shape[0], weight.shape[0], dtype=dtype)
    return low_rank_output(
        y, residual, h, weight, scaling, None, None if up_bias is None else up_bias.float() * scaling
    )


def up_project_gradients(
    dy: torch.Tensor, s: torch.Tensor, bias: torch.Tensor | None, weight: torch.Tensor,
    activation: str, scaling: float, need_weight: bool, need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """dz [M, R] = scaling · dy weight ∘ act'(z); where needed, dweight [N, R] = scaling · dyᵀ act(z) and
    dup_bias [N] = scaling · Σ dy. A read of dy for each."""
    dy = native.rows(dy)
    dz, _ = low_rank_gradients(dy, None, weight, scaling)
    h = _activated(s, bias, activation, dz)
    dweight = _product_sum(h, dy, 0.0, None, scaling).t() if need_weight else None
    return dz, dweight, _sum_of_rows(dy).mul_(scaling) if need_bias else None


def _activated(s: torch.Tensor, bias: torch.Tensor | None, activation: str, d: torch.Tensor | None) -> torch.Tensor:
    """act(z) [M, R] of z = s + bias, in float32; d, where there is one, is multiplied by act'(z)."""
    (M, R), s = s.shape, s.float().contiguous()
    h, bias = torch.empty(M, R, dtype=torch.float32), None if bias is None else native.padded(bias)
    native.lib.activated(
        h.data_ptr(), native.address(d), s.data_ptr(), native.address(bias), native.ACTIVATIONS[activation], M, R,
        native.threads(M * R),
    )  # fmt: skip
    return h


def _sum_of_rows(dy: torch.Tensor) -> torch.Tensor:
    """Σ_m dy[m] [N], in float32."""
    (M, N) = dy.shape
    total = torch.empty(N, dtype=torch.float32)
    native.lib.scaled_and_summed(
        None, total.data_ptr(), dy.data_ptr(), native.DTYPES[dy.dtype], dy.stride(0), None, 0, None, M, N,
        native.threads(M * N),
    )  # fmt: skip
    return total
