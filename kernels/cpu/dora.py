"""What DoRA adds to LoRA on a CPU: norms in one pass over W, one over y, one over dy."""

import torch

from . import native
from .low_rank_output import low_rank_output
from .nf4_linear import nf4_linear


def dora_norm(weight, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """norm [N] = ‖W + scaling · b a‖ of each row, at least 1e-18, in float32; an NF4 weight is decoded in float32."""
    (N, K), R = weight.shape, a.shape[0]
    norm, b = torch.empty(N, dtype=torch.float32), b.float() * scaling
    sizes = N, K, R, native.threads(N * K)
    if not isinstance(weight, torch.Tensor):
        arguments, _held = native.weight_arguments(weight)
        a, b = native.operand(a), b.contiguous()
        native.lib.nf4_dora_norm(norm.data_ptr(), *arguments, a.data_ptr(), a.stride(0), b.data_ptr(), *sizes)
        return norm
    w = native.memory(weight)
    if w.stride(0) == 1 and w.stride(1) != 1:
        at, bt = a.float().t().contiguous(), native.operand(b.t())
        native.lib.dora_norm_of_columns(
            norm.data_ptr(), w.data_ptr(), native.DTYPES[w.dtype], w.stride(1), at.data_ptr(), bt.data_ptr(),
            bt.stride(0), *sizes,
        )  # fmt: skip
        return norm
    w, a, b = native.rows(w), native.operand(a), b.contiguous()
    native.lib.dora_norm(
        norm.data_ptr(), w.data_ptr(), native.DTYPES[w.dtype], w.stride(0), a.data_ptr(), a.stride(0), b.data_ptr(),
        *sizes,
    )  # fmt: skip
    return norm


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
    y = low_rank_output(torch.empty_like(u) if keep_u else u, u, s, b, scaling, g, bias)
    return y, u if keep_u else None


def dora_gradients(
    dy: torch.Tensor, u: torch.Tensor | None, g: torch.Tensor, need_dz: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(dz [M, N] = g ∘ dy in the dtype of dy, where needed; dg [N] = Σ_m dy ∘ u, where u is given); one read of dy."""
    (M, N), dy, g = dy.shape, native.rows(dy), native.padded(g)
    dz = torch.empty(M, N, dtype=dy.dtype) if need_dz else None
    dg = None if u is None else torch.empty(N, dtype=torch.float32)
    u = None if u is None else native.rows(u)
    native.lib.scaled_and_summed(
        native.address(dz), native.address(dg), dy.data_ptr(), native.DTYPES[dy.dtype], dy.stride(0),
        native.address(u), 0 if u is None else u.stride(0), g.data_ptr(), M, N, native.threads(M * N),
    )  # fmt: skip
    return dz, dg
