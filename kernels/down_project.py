"""s = drop(x) aᵀ and da = dsᵀ drop(x): the down-projection of an adapter, its dropout recomputed from (seed, index).

Blocks of r are neighbours in the order of programs, so that L2 has x for all but the first of them. They belong to one
group each, whose seed they take.
"""

import torch
import triton
import triton.language as tl

from . import configs
from .launch import device_guard, dropout_arguments, seed_groups
from .tiles import dropout_keep, group_block, mixed_dot


@triton.jit
def _down_project_kernel(
    x_ptr, a_ptr, s_ptr, seed_ptr,
    M, K, R, blocks_r,
    stride_xm, stride_xk, stride_ar, stride_ak, stride_sp, stride_sm,
    threshold, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    SPLITS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """s[p] [M, groups · R] = (keep[group] · keep_scale · x) [M, K] a [groups · R, K]ᵀ over every SPLITS-th block of K,
    fp32 accumulate; `blocks_r` in all groups."""
    group, r, inside = group_block(tl.program_id(0) % blocks_r, R, BLOCK_R)
    m = (tl.program_id(0) // blocks_r).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(1).to(tl.int64)
    if DROPOUT:
        seed = tl.load(seed_ptr + group)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(tl.program_id(1) * BLOCK_K, K, BLOCK_K * SPLITS):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + m[:, None] * stride_xm + k[None, :].to(tl.int64) * stride_xk,
                    mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)  # fmt: skip
        if DROPOUT:
            x = tl.where(dropout_keep(seed, m, start, K, threshold, BLOCK_M, BLOCK_K), x, 0.0)
        a = tl.load(a_ptr + r[None, :] * stride_ar + k[:, None] * stride_ak,
                    mask=inside[None, :] & (k[:, None] < K), other=0.0)  # fmt: skip
        acc = mixed_dot(x, a, acc, PRECISION)
    tl.store(s_ptr + part * stride_sp + m[:, None] * stride_sm + r[None, :], acc * keep_scale,
             mask=(m[:, None] < M) & inside[None, :])  # fmt: skip


@triton.jit
def _down_project_da_kernel(
    ds_ptr, x_ptr, da_ptr, seed_ptr,
    M, K, R,
    stride_xm, stride_xk, stride_dsm, stride_dap, stride_dar,
    threshold, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    SPLITS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """da[p] [groups · R, K] = ds [M, groups · R]ᵀ (keep[group] · keep_scale · x) [M, K] over every SPLITS-th block of
    M, fp32 accumulate."""
    if DROPOUT:
        group, r, inside = group_block(tl.program_id(0), R, BLOCK_R)
        seed = tl.load(seed_ptr + group)
    else:
        r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = r < R
    first_k = tl.program_id(1) * BLOCK_K
    k = first_k + tl.arange(0, BLOCK_K)
    part = tl.program_id(2).to(tl.int64)
    acc = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    for start in range(tl.program_id(2) * BLOCK_M, M, BLOCK_M * SPLITS):
        m = start + tl.arange(0, BLOCK_M).to(tl.int64)
        x = tl.load(x_ptr + m[:, None] * stride_xm + k[None, :].to(tl.int64) * stride_xk,
                    mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)  # fmt: skip
        if DROPOUT:
            x = tl.where(dropout_keep(seed, m, first_k, K, threshold, BLOCK_M, BLOCK_K), x, 0.0)
        ds = tl.load(ds_ptr + m[:, None] * stride_dsm + r[None, :],
                     mask=(m[:, None] < M) & inside[None, :], other=0.0)  # fmt: skip
        acc = mixed_dot(tl.trans(x), ds, acc, PRECISION)
    tl.store(da_ptr + part * stride_dap + r[None, :].to(tl.int64) * stride_dar + k[:, None], acc * keep_scale,
             mask=inside[None, :] & (k[:, None] < K))  # fmt: skip


def down_project(x: torch.Tensor, a: torch.Tensor, p: float, seed: torch.Tensor | None) -> torch.Tensor:
    """See peft_ops.reference.down_project; the parts are added in a fixed order."""
    s = _down_project_parts(x, a, p, seed)
    return s[0] if s.shape[0] == 1 else s.sum(0)


def _down_project_parts(x: torch.Tensor, a: torch.Tensor, p: float, seed: torch.Tensor | None) -> torch.Tensor:
    """[parts, M, R]: partial sums of s."""
    (M, K), R = x.shape, a.shape[0]
    arch = configs.arch_of(x.device)
    groups = seed_groups(p, seed, R)
    block_r = configs.block_r(R // groups, arch, x.dtype)
    config = configs.launch("down_project", arch, x.dtype, M, block_r)
    blocks_r = groups * triton.cdiv(R // groups, block_r)
    blocks = blocks_r * triton.cdiv(M, config["BLOCK_M"])
    parts = configs.splits(blocks, triton.cdiv(K, config["BLOCK_K"]))
    s = x.new_empty(parts, M, R, dtype=torch.float32)
    if M == 0 or K == 0 or p >= 1.0:
        return s[:1].zero_()
    seed_ptr, threshold, keep_scale = dropout_arguments(p, seed, x)
    with device_guard(x):
        _down_project_kernel[blocks, parts](
            x, a, s, seed_ptr, M, K, R // groups, blocks_r, *x.stride(), *a.stride(), s.stride(0), R, threshold,
            keep_scale, BLOCK_R=block_r, SPLITS=parts, DROPOUT=p > 0.0, PRECISION=configs.fp32_precision(arch),
            **config,
        )  # fmt: skip
    return s


def down_project_da(ds: torch.Tensor, x: torch.Tensor, p: float, seed: torch.Tensor | None) -> torch.Tensor:
    """See peft_ops.reference.down_project; the parts are added in a fixed order."""
    (M, K), R = x.shape, ds.shape[1]
    arch = configs.arch_of(x.device)
    groups = seed_groups(p, seed, R)
    block_r = configs.block_r(R // groups, arch, x.dtype)
    config = configs.launch("down_project_da", arch, x.dtype, M, block_r)
    blocks = groups * triton.cdiv(R // groups, block_r), triton.cdiv(K, config["BLOCK_K"])
    parts = configs.splits(blocks[0] * blocks[1], triton.cdiv(M, config["BLOCK_M"]))
    da = x.new_empty(parts, R, K, dtype=torch.float32)
    if M == 0 or K == 0 or p >= 1.0:
        return da[0].zero_()
    seed_ptr, threshold, keep_scale = dropout_arguments(p, seed, x)
    with device_guard(x):
        _down_project_da_kernel[(*blocks, parts)](
            ds, x, da, seed_ptr, M, K, R // groups, *x.stride(), ds.stride(0), da.stride(0), K, threshold, keep_scale,
            BLOCK_R=block_r, SPLITS=parts, DROPOUT=p > 0.0, PRECISION=configs.fp32_precision(arch), **config,
        )  # fmt: skip
    return da[0] if parts == 1 else da.sum(0)
