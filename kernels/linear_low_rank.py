"""A linear layer with its low-rank term: y = x Wᵀ + bias + scaling · s bᵀ, and dx = dy W + drop'(ds a).

Two routes, chosen by `configs.linear_route`: one GEMM that carries the low-rank term as a last step of its
reduction, or the vendor's GEMM (an NF4 weight: `nf4_linear`) and one in-place update.
"""

import torch
import triton
import triton.language as tl

from . import configs
from .launch import device_guard, dropout_arguments
from .low_rank import low_rank_update_
from .nf4_linear import nf4_linear, nf4_linear_dx
from .tiles import grouped_order, low_rank_tile


@triton.jit
def _linear_low_rank_kernel(
    x_ptr, w_ptr, bias_ptr, s_ptr, b_ptr, y_ptr, seed_ptr,
    M, N, K, R,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_sm, stride_bn, stride_br, stride_ym,
    scale, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, K] w [N, K]ᵀ + bias [N] + scale · keep ∘ (s [M, R] b [N, R]ᵀ), fp32 accumulate, one rounding."""
    block_m, block_n = grouped_order(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    m = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = low_rank_tile(
        s_ptr, b_ptr, seed_ptr, m, block_n * BLOCK_N, M, N, R, stride_sm, stride_bn, stride_br, scale, threshold,
        BLOCK_M, BLOCK_N, BLOCK_R, DROPOUT, PRECISION,
    )  # fmt: skip
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + m[:, None] * stride_xm + k[None, :].to(tl.int64) * stride_xk,
                    mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)  # fmt: skip
        w = tl.load(w_ptr + n[None, :] * stride_wn + k[:, None].to(tl.int64) * stride_wk,
                    mask=(n[None, :] < N) & (k[:, None] < K), other=0.0)  # fmt: skip
        acc = tl.dot(x, w, acc)
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + m[:, None] * stride_ym + n[None, :], acc.to(y_ptr.dtype.element_ty),
             mask=(m[:, None] < M) & (n[None, :] < N))  # fmt: skip


def linear_low_rank(
    x: torch.Tensor, weight, bias: torch.Tensor | None, s: torch.Tensor, b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """See peft_ops.reference.linear_low_rank."""
    if _fused(x, weight, dx=False):
        return _fused_linear(x, weight, bias, s, b, scaling, 0.0, None)
    if isinstance(weight, torch.Tensor):
        bias = None if bias is None else bias.to(x.dtype)
        y = torch.nn.functional.linear(x, weight.to(x.dtype), bias)
    else:
        y = nf4_linear(x, weight, bias)
    return low_rank_update_(y, s, b, scaling, 0.0, None)


def linear_low_rank_dx(
    dy: torch.Tensor, weight, ds: torch.Tensor, a: torch.Tensor, p: float, seed: torch.Tensor | None
) -> torch.Tensor:
    """See peft_ops.reference.linear_low_rank."""
    if p < 1.0 and _fused(dy, weight, dx=True):
        return _fused_linear(dy, weight.t(), None, ds, a.t(), 1.0, p, seed)
    dx = dy @ weight.to(dy.dtype) if isinstance(weight, torch.Tensor) else nf4_linear_dx(dy, weight)
    return low_rank_update_(dx, ds, a.t(), 1.0, p, seed)


def _fused(x: torch.Tensor, weight, dx: bool) -> bool:
    """Whether one GEMM makes x [rows, k] times weight and its low-rank term; k are W's columns, with dx its rows."""
    if not isinstance(weight, torch.Tensor) or not weight.dtype == x.dtype != torch.float32:
        return False
    out, k = weight.shape[::-1] if dx else weight.shape
    return configs.linear_route(x.shape[0], out, k, x.dtype, configs.arch_of(x.device), dx) == "fused"


def _fused_linear(x, weight, bias, s, b, scaling, p, seed) -> torch.Tensor:
    (M, K), N, R = x.shape, weight.shape[0], s.shape[1]
    y = x.new_empty(M, N)
    if y.numel() == 0:
        return y
    arch = configs.arch_of(x.device)
    block_r = configs.block_r(R, arch, x.dtype)
    config = configs.launch("linear_low_rank", arch, x.dtype, M, block_r)
    seed_ptr, threshold, keep_scale = dropout_arguments(p, seed, x)
    with device_guard(x):
        _linear_low_rank_kernel[(triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"]),)](
            x, weight, x if bias is None else bias, s, b, y, seed_ptr, M, N, K, R, *x.stride(), *weight.stride(),
            s.stride(0), *b.stride(), N, scaling * keep_scale, threshold, BLOCK_R=block_r,
            BIAS=bias is not None, DROPOUT=p > 0.0, PRECISION=configs.update_precision(arch, x.dtype), **config,
        )  # fmt: skip
    return y
