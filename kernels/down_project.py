"""s = drop(x) aᵀ and da = dsᵀ drop(x): the down-projection of an adapter, its dropout recomputed from (seed, index)."""

import torch
import triton
import triton.language as tl

from . import configs
from .launch import device_guard, dropout_arguments
from .tiles import dropout_keep, mixed_dot


@triton.jit
def _down_project_kernel(
    x_ptr, a_ptr, s_ptr, seed_ptr,
    M, K, R,
    stride_xm, stride_xk, stride_ar, stride_ak, stride_sp, stride_sm,
    threshold, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    SPLITS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """s[p] [M, R] = (keep · keep_scale · x) [M, K] a [R, K]ᵀ over every SPLITS-th block of K, fp32 accumulate."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    part = tl.program_id(2).to(tl.int64)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(tl.program_id(2) * BLOCK_K, K, BLOCK_K * SPLITS):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + m[:, None] * stride_xm + k[None, :].to(tl.int64) * stride_xk,
                    mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)  # fmt: skip
        if DROPOUT:
            x = tl.where(dropout_keep(seed, m, start, K, threshold, BLOCK_M, BLOCK_K), x, 0.0)
        a = tl.load(a_ptr + r[None, :] * stride_ar + k[:, None] * stride_ak,
                    mask=(r[None, :] < R) & (k[:, None] < K), other=0.0)  # fmt: skip
        acc = mixed_dot(x, a, acc, PRECISION)
    tl.store(s_ptr + part * stride_sp + m[:, None] * stride_sm + r[None, :], acc * keep_scale,
             mask=(m[:, None] < M) & (r[None, :] < R))  # fmt: skip


@triton.jit
def _down_project_da_kernel(
    ds_ptr, x_ptr, da_ptr, seed_ptr,
    M, K, R,
    stride_xm, stride_xk, stride_dsm, stride_dap, stride_dar,
    threshold, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    SPLITS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """da[p] [R, K] = ds [M, R]ᵀ (keep · keep_scale · x) [M, K] over every SPLITS-th block of M, fp32 accumulate."""
    first_k = tl.program_id(0) * BLOCK_K
    k = first_k + tl.arange(0, BLOCK_K)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    part = tl.program_id(2).to(tl.int64)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    for start in range(tl.program_id(2) * BLOCK_M, M, BLOCK_M * SPLITS):
        m = start + tl.arange(0, BLOCK_M).to(tl.int64)
        x = tl.load(x_ptr + m[:, None] * stride_xm + k[None, :].to(tl.int64) * stride_xk,
                    mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)  # fmt: skip
        if DROPOUT:
            x = tl.where(dropout_keep(seed, m, first_k, K, threshold, BLOCK_M, BLOCK_K), x, 0.0)
        ds = tl.load(ds_ptr + m[:, None] * stride_dsm + r[None, :],
                     mask=(m[:, None] < M) & (r[None, :] < R), other=0.0)  # fmt: skip
        acc = mixed_dot(tl.trans(x), ds, acc, PRECISION)
    tl.store(da_ptr + part * stride_dap + r[None, :].to(tl.int64) * stride_dar + k[:, None], acc * keep_scale,
             mask=(r[None, :] < R) & (k[:, None] < K))  # fmt: skip


def down_project(x: torch.Tensor, a: torch.Tensor, p: float, seed: torch.Tensor | None) -> torch.Tensor:
    """See peft_ops.reference.down_project."""
    (M, K), R = x.shape, a.shape[0]
    arch = configs.arch_of(x.device)
    block_r = configs.block_r(R, arch, x.dtype)
    config = configs.launch("down_project", arch, x.dtype, M, block_r)
    blocks = triton.cdiv(M, config["BLOCK_M"]), triton.cdiv(R, block_r)
    parts = configs.splits(blocks[0] * blocks[1], triton.cdiv(K, config["BLOCK_K"]))
    s = x.new_empty(parts, M, R, dtype=torch.float32)
    if M == 0 or K == 0 or p >= 1.0:
        return s[0].zero_()
    seed_ptr, threshold, keep_scale = dropout_arguments(p, seed, x)
    with device_guard(x):
        _down_project_kernel[(*blocks, parts)](
            x, a, s, seed_ptr, M, K, R, *x.stride(), *a.stride(), s.stride(0), R, threshold, keep_scale,
            BLOCK_R=block_r, SPLITS=parts, DROPOUT=p > 0.0, PRECISION=configs.fp32_precision(arch), **config,
        )  # fmt: skip
    return s[0] if parts == 1 else s.sum(0)


def down_project_da(ds: torch.Tensor, x: torch.Tensor, p: float, seed: torch.Tensor | None) -> torch.Tensor:
    """See peft_ops.reference.down_project; the parts are added in a fixed order."""
    (M, K), R = x.shape, ds.shape[1]
    arch = configs.arch_of(x.device)
    block_r = configs.block_r(R, arch, x.dtype)
    config = configs.launch("down_project_da", arch, x.dtype, M, block_r)
    blocks = triton.cdiv(K, config["BLOCK_K"]), triton.cdiv(R, block_r)
    parts = configs.splits(blocks[0] * blocks[1], triton.cdiv(M, config["BLOCK_M"]))
    da = x.new_empty(parts, R, K, dtype=torch.float32)
    if M == 0 or K == 0 or p >= 1.0:
        return da[0].zero_()
    seed_ptr, threshold, keep_scale = dropout_arguments(p, seed, x)
    with device_guard(x):
        _down_project_da_kernel[(*blocks, parts)](
            ds, x, da, seed_ptr, M, K, R, *x.stride(), ds.stride(0), da.stride(0), K, threshold, keep_scale,
            BLOCK_R=block_r, SPLITS=parts, DROPOUT=p > 0.0, PRECISION=configs.fp32_precision(arch), **config,
        )  # fmt: skip
    return da[0] if parts == 1 else da.sum(0)
