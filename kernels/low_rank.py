"""y += scaling · drop'(s bᵀ) in place, and the gradients of a low-rank term, in one pass where partial sums allow."""

import torch
import triton
import triton.language as tl

from . import configs
from .down_project import down_project, down_project_da
from .launch import device_guard, dropout_arguments, seed_groups
from .tiles import low_rank_tile, mixed_dot


@triton.jit
def _low_rank_update_kernel(
    y_ptr, s_ptr, b_ptr, seed_ptr,
    M, N, R,
    stride_ym, stride_yn, stride_sm, stride_bn, stride_br,
    scale, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUPS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y [M, N] += Σ over GROUPS of scale · keep[g] ∘ (s[g] [M, R] b[g] [N, R]ᵀ), fp32 accumulate, one rounding to the
    dtype of y; columns g · R and on of s and b are group g's."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_n = tl.program_id(1) * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)
    term = low_rank_tile(
        s_ptr, b_ptr, seed_ptr, m, first_n, M, N, R, stride_sm, stride_bn, stride_br, scale, threshold,
        BLOCK_M, BLOCK_N, BLOCK_R, DROPOUT, PRECISION,
    )  # fmt: skip
    for group in range(1, GROUPS):
        term += low_rank_tile(
            s_ptr + group * R, b_ptr + group * R * stride_br, seed_ptr + group, m, first_n, M, N, R, stride_sm,
            stride_bn, stride_br, scale, threshold, BLOCK_M, BLOCK_N, BLOCK_R, DROPOUT, PRECISION,
        )  # fmt: skip
    inside = (m[:, None] < M) & (n[None, :] < N)
    y_tile = y_ptr + m[:, None] * stride_ym + n[None, :].to(tl.int64) * stride_yn
    y = tl.load(y_tile, mask=inside, other=0.0).to(tl.float32) + term
    tl.store(y_tile, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _low_rank_gradients_kernel(
    dy_ptr, s_ptr, b_ptr, ds_ptr, db_ptr,
    M, N, R,
    stride_dym, stride_dyn, stride_sm, stride_bn, stride_br, stride_dsp, stride_dsm, stride_dbp, stride_dbn,
    scaling, steps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ds[block of N] [M, R] = scaling · dy b and db[part of M] [N, R] = scaling · dyᵀ s, fp32: partial sums, one read
    of dy [M, N]. A program owns a block of N and `steps` blocks of M."""
    block_n, part = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    b = tl.load(b_ptr + n[:, None] * stride_bn + r[None, :] * stride_br,
                mask=(n[:, None] < N) & (r[None, :] < R), other=0.0)  # fmt: skip
    db = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for step in range(0, steps):
        m = (part * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        rows = (m[:, None] < M) & (r[None, :] < R)
        dy = tl.load(dy_ptr + m[:, None] * stride_dym + n[None, :].to(tl.int64) * stride_dyn,
                     mask=(m[:, None] < M) & (n[None, :] < N), other=0.0)  # fmt: skip
        ds = mixed_dot(dy, b, tl.zeros((BLOCK_M, BLOCK_R), tl.float32), PRECISION)
        tl.store(ds_ptr + block_n * stride_dsp + m[:, None] * stride_dsm + r[None, :], ds * scaling, mask=rows)
        s = tl.load(s_ptr + m[:, None] * stride_sm + r[None, :], mask=rows, other=0.0)
        db = mixed_dot(tl.trans(dy), s, db, PRECISION)
    tl.store(db_ptr + part * stride_dbp + n[:, None].to(tl.int64) * stride_dbn + r[None, :], db * scaling,
             mask=(n[:, None] < N) & (r[None, :] < R))  # fmt: skip


def low_rank_update_(
    y: torch.Tensor, s: torch.Tensor, b: torch.Tensor, scaling: float, p: float, seed: torch.Tensor | None
) -> torch.Tensor:
    """See peft_ops.reference.low_rank."""
    (M, N), R = y.shape, s.shape[1]
    if y.numel() == 0 or p >= 1.0:
        return y
    arch = configs.arch_of(y.device)
    groups = seed_groups(p, seed, R)
    block_r = configs.block_r(R // groups, arch, y.dtype)
    name = "low_rank_update" if groups == 1 else "low_rank_update_groups"
    config = configs.launch(name, arch, y.dtype, M, block_r)
    seed_ptr, threshold, keep_scale = dropout_arguments(p, seed, y)
    with device_guard(y):
        _low_rank_update_kernel[triton.cdiv(M, config["BLOCK_M"]), triton.cdiv(N, config["BLOCK_N"])](
            y, s, b, seed_ptr, M, N, R // groups, *y.stride(), s.stride(0), *b.stride(), scaling * keep_scale,
            threshold, BLOCK_R=block_r, GROUPS=groups, DROPOUT=p > 0.0,
            PRECISION=configs.update_precision(arch, y.dtype), **config,
        )  # fmt: skip
    return y


def low_rank_gradients(
    dy: torch.Tensor, s: torch.Tensor | None, b: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See peft_ops.reference.low_rank; partial sums are added in a fixed order."""
    (M, N), R = dy.shape, b.shape[1]
    arch = configs.arch_of(dy.device)
    if s is None or dy.numel() == 0 or not configs.gradients_in_one_read(R, arch, dy.dtype):
        ds = down_project(dy, b.t(), 0.0, None).mul_(scaling)
        return ds, None if s is None else down_project_da(s, dy, 0.0, None).mul_(scaling).t()
    block_r = configs.block_r(R, arch, dy.dtype)
    config = configs.launch("low_rank_gradients", arch, dy.dtype, M, block_r)
    blocks_m, blocks_n, blocks_r = (
        triton.cdiv(M, config["BLOCK_M"]), triton.cdiv(N, config["BLOCK_N"]), triton.cdiv(R, block_r),
    )  # fmt: skip
    steps = triton.cdiv(blocks_m, configs.splits(blocks_n * blocks_r, blocks_m))
    parts = triton.cdiv(blocks_m, steps)
    ds = dy.new_empty(blocks_n, M, R, dtype=torch.float32)
    db = dy.new_empty(parts, N, R, dtype=torch.float32)
    with device_guard(dy):
        _low_rank_gradients_kernel[blocks_n, blocks_r, parts](
            dy, s, b, ds, db, M, N, R, *dy.stride(), s.stride(0), *b.stride(), ds.stride(0), R, N * R, R,
            scaling, steps, BLOCK_R=block_r, PRECISION=configs.fp32_precision(arch), **config,
        )  # fmt: skip
    return _total(ds), _total(db)


def _total(parts: torch.Tensor) -> torch.Tensor:
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)
