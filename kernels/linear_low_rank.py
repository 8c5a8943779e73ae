"""A linear layer with its low-rank term: y = x Wᵀ + bias + scaling · s bᵀ, and dx = dy W + drop'(ds a).

Routes over a dense W, chosen by `configs.linear_route`: the vendor's GEMM and one in-place update, one GEMM that opens
its accumulator with the low-rank term, `linear_tma` or `linear_few_rows`. An NF4 weight goes to `linear_few_rows` where
it is decoded inside the GEMM, to `nf4_linear` and one update otherwise.
"""

import torch
import triton
import triton.language as tl

from . import configs
from .down_project import _down_project_parts, down_project
from .launch import device_guard, dropout_arguments
from .linear_few_rows import _few_rows_linear
from .linear_tma import _tma_linear, _tma_takes
from .low_rank import low_rank_update_
from .nf4_linear import _decodes_inside, nf4_linear, nf4_linear_dx
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


def lora_linear(
    x: torch.Tensor, weight, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, scaling: float, p: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """See peft_ops.reference.linear_low_rank."""
    if _route(x, weight, a.shape[0]) == "few rows":
        return _few_rows_linear(x, weight, bias, _down_project_parts(x, a, p, seed), b, scaling, 0.0, None)
    s = down_project(x, a, p, seed)
    return linear_low_rank(x, weight, bias, s, b, scaling), s


def linear_low_rank(
    x: torch.Tensor, weight, bias: torch.Tensor | None, s: torch.Tensor, b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """See peft_ops.reference.linear_low_rank."""
    route = _route(x, weight, s.shape[1])
    if route == "few rows":
        return _few_rows_linear(x, weight, bias, s[None], b, scaling, 0.0, None)[0]
    if route in _GEMMS:
        return _GEMMS[route](x, weight, bias, s, b, scaling, 0.0, None)
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
    if not isinstance(weight, torch.Tensor):
        return low_rank_update_(nf4_linear_dx(dy, weight), ds, a.t(), 1.0, p, seed)
    route = "vendor" if p >= 1.0 else _route(dy, weight.t(), ds.shape[1], dx=True)
    if route == "few rows":
        return _few_rows_linear(dy, weight.t(), None, ds[None], a.t(), 1.0, p, seed)[0]
    if route in _GEMMS:
        return _GEMMS[route](dy, weight.t(), None, ds, a.t(), 1.0, p, seed)
    return low_rank_update_(dy @ weight.to(dy.dtype), ds, a.t(), 1.0, p, seed)


def _route(x: torch.Tensor, weight, rank: int, dx: bool = False) -> str:
    """How y = x Wᵀ and its low-rank term are made, in the backward with dx; float32 and mixed dtypes have no kernel
    here."""
    if not isinstance(weight, torch.Tensor):
        return "few rows" if _decodes_inside(x, weight) else "vendor"
    if not weight.dtype == x.dtype != torch.float32:
        return "vendor"
    (N, K), arch = weight.shape, configs.arch_of(x.device)
    route = configs.linear_route(x.shape[0], N, K, x.dtype, arch, dx)
    return "fused" if route == "tma" and not _tma_takes(x, weight, rank) else route


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


_GEMMS = {"fused": _fused_linear, "tma": _tma_linear}  # with the low-rank term inside
