"""A linear layer of few rows with its low-rank term: W is read once for all of them, and launches are what is left.

The down-projection leaves partial sums of s, which are added here, in order, where they are needed. Over a dense W
one kernel does the rest (two launches in all); over NF4 the kernel that adds up `nf4_linear`'s splits does (three).
"""

import torch
import triton
import triton.language as tl

from . import configs
from .launch import device_guard, dropout_arguments
from .nf4_linear import _linear_parts
from .tiles import dropout_keep


@triton.jit
def _low_rank_of_parts(
    s_ptr, total_ptr, b_ptr, m, n, M, N, R, stride_sp, stride_sm, stride_bn, stride_br, scale, first,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_M] of b [N, R] (scale · Σ_p s[p] [M, R])ᵀ, float32; the sum goes to total [M, R] where `first`.

    m, n: int64 rows of s and b.
    """
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in tl.range(0, R, BLOCK_R, num_stages=1):  # through registers: parts by stages would fill shared memory
        r = start + tl.arange(0, BLOCK_R)
        inside = (m[:, None] < M) & (r[None, :] < R)
        s = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for part in tl.static_range(PARTS):
            s += tl.load(s_ptr + part * stride_sp + m[:, None] * stride_sm + r[None, :], mask=inside, other=0.0)
        if PARTS > 1:
            tl.store(total_ptr + m[:, None] * R + r[None, :], s, mask=inside & first)
        b = tl.load(b_ptr + n[:, None] * stride_bn + r[None, :] * stride_br,
                    mask=(n[:, None] < N) & (r[None, :] < R), other=0.0)  # fmt: skip
        acc = tl.dot(b.to(tl.float32), tl.trans(s * scale), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _linear_few_rows_kernel(
    x_ptr, w_ptr, bias_ptr, s_ptr, total_ptr, b_ptr, y_ptr, seed_ptr,
    M, N, K, R,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_sp, stride_sm, stride_bn, stride_br,
    scale, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PARTS: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, K] w [N, K]ᵀ + bias [N] + scale · keep ∘ (Σ_p s[p] [M, R] b [N, R]ᵀ), fp32, one rounding.

    W is the left operand, so that few rows of x fill a matrix instruction.
    """
    first_n = tl.program_id(0) * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N).to(tl.int64)
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = _low_rank_of_parts(
        s_ptr, total_ptr, b_ptr, m, n, M, N, R, stride_sp, stride_sm, stride_bn, stride_br, scale, first_n == 0,
        BLOCK_N, BLOCK_M, BLOCK_R, PARTS, PRECISION,
    )  # fmt: skip
    if DROPOUT:
        keep = dropout_keep(tl.load(seed_ptr), m, first_n, N, threshold, BLOCK_M, BLOCK_N)
        acc = tl.where(tl.trans(keep), acc, 0.0)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        w = tl.load(w_ptr + n[:, None] * stride_wn + k[None, :].to(tl.int64) * stride_wk,
                    mask=(n[:, None] < N) & (k[None, :] < K), other=0.0)  # fmt: skip
        x = tl.load(x_ptr + m[None, :] * stride_xm + k[:, None].to(tl.int64) * stride_xk,
                    mask=(m[None, :] < M) & (k[:, None] < K), other=0.0)  # fmt: skip
        acc = tl.dot(w, x, acc)
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    tl.store(y_ptr + m[None, :] * N + n[:, None], acc.to(y_ptr.dtype.element_ty),
             mask=(m[None, :] < M) & (n[:, None] < N))  # fmt: skip


@triton.jit
def _sum_splits_low_rank_kernel(
    part_ptr, bias_ptr, s_ptr, total_ptr, b_ptr, y_ptr,
    M, N, R,
    stride_sp, stride_sm, stride_bn, stride_br,
    scale,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    PARTS: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y [M, N] = Σ part [SPLITS, M, N] + bias [N], in the order of `_sum_splits_kernel`, + scale · Σ_p s[p] bᵀ."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (m[None, :] < M) & (n[:, None] < N)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for split in tl.static_range(SPLITS):
        acc += tl.load(part_ptr + (split * M + m[None, :]) * N + n[:, None], mask=inside, other=0.0)
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    acc += _low_rank_of_parts(
        s_ptr, total_ptr, b_ptr, m, n, M, N, R, stride_sp, stride_sm, stride_bn, stride_br, scale,
        tl.program_id(0) == 0, BLOCK_N, BLOCK_M, BLOCK_R, PARTS, PRECISION,
    )  # fmt: skip
    tl.store(y_ptr + m[None, :] * N + n[:, None], acc.to(y_ptr.dtype.element_ty), mask=inside)


def _few_rows_linear(x, weight, bias, s, b, scaling, p, seed) -> tuple[torch.Tensor, torch.Tensor]:
    """(y [M, N], the sum of s [M, R]) for partial sums s [parts, M, R] and a W of either kind."""
    M, N, (parts, _, R) = x.shape[0], weight.shape[0], s.shape
    y, total = x.new_empty(M, N), s[0] if parts == 1 else torch.empty_like(s[0])
    if y.numel() == 0:
        return y, s.sum(0)
    arch = configs.arch_of(x.device)
    bias = None if bias is None else bias.contiguous()
    flags = dict(
        BLOCK_R=min(32, configs.block_r(R, arch, x.dtype)), PARTS=parts, BIAS=bias is not None,
        PRECISION=configs.update_precision(arch, x.dtype),
    )  # fmt: skip
    low_rank = s, total, b, y
    strides = s.stride(0), s.stride(1), *b.stride()
    if isinstance(weight, torch.Tensor):
        _dense(x, weight, bias, low_rank, strides, scaling, p, seed, arch, flags)
    else:
        _nf4(x, weight, bias, low_rank, strides, scaling, arch, flags)
    return y, total


def _dense(x, weight, bias, low_rank, strides, scaling, p, seed, arch, flags) -> None:
    (M, K), (N, _), R = x.shape, weight.shape, low_rank[0].shape[2]
    config = configs.launch("linear_few_rows" if weight.stride(1) == 1 else "linear_few_rows_dx", arch, x.dtype)
    seed_ptr, threshold, keep_scale = dropout_arguments(p, seed, x)
    with device_guard(x):
        _linear_few_rows_kernel[triton.cdiv(N, config["BLOCK_N"]), triton.cdiv(M, config["BLOCK_M"])](
            x, weight, x if bias is None else bias, *low_rank, seed_ptr, M, N, K, R, *x.stride(), *weight.stride(),
            *strides, scaling * keep_scale, threshold, DROPOUT=p > 0.0, **flags, **config,
        )  # fmt: skip


def _nf4(x, weight, bias, low_rank, strides, scaling, arch, flags) -> None:
    (M, _), (N, _), R = x.shape, weight.shape, low_rank[0].shape[2]
    part, config = _linear_parts(x, weight, None, torch.float32), configs.launch("sum_splits_low_rank", arch, x.dtype)
    with device_guard(x):
        _sum_splits_low_rank_kernel[triton.cdiv(N, config["BLOCK_N"]), triton.cdiv(M, config["BLOCK_M"])](
            part, part if bias is None else bias, *low_rank, M, N, R, *strides, scaling,
            SPLITS=part.shape[0], **flags, **config,
        )  # fmt: skip
