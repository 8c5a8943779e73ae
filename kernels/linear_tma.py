"""A linear layer with its low-rank term in one persistent GEMM whose tiles the tensor memory accelerator moves.

Hopper and Blackwell. Tiles of x, W and y go between memory and shared memory by descriptors made on the host, so that
no thread computes an address; a program walks tiles, and each tile's accumulator opens with its low-rank term.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import configs
from .arches import multiprocessors
from .launch import device_guard, dropout_arguments
from .tiles import dropout_keep, grouped_order


@triton.jit
def _linear_tma_kernel(
    x_desc, w_desc, y_desc, bias_ptr, s_ptr, b_ptr, seed_ptr,
    M, N, K, R,
    stride_sm, stride_bn, stride_br,
    scale, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr, FLATTEN: tl.constexpr, ROWS: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, K] w [N, K]ᵀ + bias [N] + scale · keep ∘ (s [M, R] b [N, R]ᵀ), fp32 accumulate, one rounding.

    w lies as [N, K] where ROWS, as [K, N] otherwise; R <= BLOCK_R. y is stored in 1 or 2 SUBTILES of its columns. With
    FLATTEN the first steps of a tile are loaded while the one before is stored.
    """
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), blocks_m * blocks_n, tl.num_programs(0), flatten=FLATTEN):
        block_m, block_n = grouped_order(tile, blocks_m, blocks_n, GROUP_M)
        first_m, first_n = block_m * BLOCK_M, block_n * BLOCK_N
        m, n = first_m + tl.arange(0, BLOCK_M).to(tl.int64), first_n + tl.arange(0, BLOCK_N).to(tl.int64)
        r = tl.arange(0, BLOCK_R)
        s = tl.load(s_ptr + m[:, None] * stride_sm + r[None, :], mask=(m[:, None] < M) & (r[None, :] < R), other=0.0)
        b = tl.load(b_ptr + n[None, :] * stride_bn + r[:, None] * stride_br,
                    mask=(n[None, :] < N) & (r[:, None] < R), other=0.0)  # fmt: skip
        acc = tl.dot(s * scale, b.to(tl.float32), input_precision=PRECISION)
        if DROPOUT:
            acc = tl.where(dropout_keep(tl.load(seed_ptr), m, first_n, N, threshold, BLOCK_M, BLOCK_N), acc, 0.0)
        for k in range(0, K, BLOCK_K):
            x = x_desc.load([first_m, k])
            w = w_desc.load([first_n, k]).T if ROWS else w_desc.load([k, first_n])
            acc = tl.dot(x, w, acc)
        if BIAS:
            acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if SUBTILES == 1:
            y_desc.store([first_m, first_n], acc.to(y_desc.dtype))
        else:
            left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
            y_desc.store([first_m, first_n], left.to(y_desc.dtype))
            y_desc.store([first_m, first_n + BLOCK_N // 2], right.to(y_desc.dtype))


def _tma_takes(x: torch.Tensor, weight: torch.Tensor, rank: int) -> bool:
    """Whether descriptors can be made: rows that start at multiples of 16 bytes, here and in the result; and whether
    the rank is one step. torch.compile is given another route."""
    if torch.compiler.is_compiling() or rank > configs.LINEAR_TMA_RANK:
        return False
    stored = weight if weight.stride(1) == 1 else weight.t()
    aligned = all(
        t.stride(1) == 1 and t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 for t in (x, stored)
    )
    whole = weight.shape[0] * x.element_size() % 16 == 0 and min(*x.shape, *weight.shape) > 0
    return aligned and whole


def _tma_linear(x, weight, bias, s, b, scaling, p, seed) -> torch.Tensor:
    """y [M, N]; weight [N, K] lies by rows or by columns."""
    (M, K), N, R, arch = x.shape, weight.shape[0], s.shape[1], configs.arch_of(x.device)
    config, y, rows = configs.linear_tma(M, N, R, p > 0.0, arch), x.new_empty(M, N), weight.stride(1) == 1
    block_m, block_n, block_k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    stored, tile = (weight, [block_n, block_k]) if rows else (weight.t(), [block_k, block_n])
    seed_ptr, threshold, keep_scale = dropout_arguments(p, seed, x)
    programs = min(multiprocessors(x.device), triton.cdiv(M, block_m) * triton.cdiv(N, block_n))
    with device_guard(x):
        _linear_tma_kernel[(programs,)](
            TensorDescriptor.from_tensor(x, [block_m, block_k]), TensorDescriptor.from_tensor(stored, tile),
            TensorDescriptor.from_tensor(y, [block_m, block_n // config["SUBTILES"]]),
            x if bias is None else bias.contiguous(), s, b, seed_ptr, M, N, K, R, s.stride(0), *b.stride(),
            scaling * keep_scale, threshold, ROWS=rows, BIAS=bias is not None, DROPOUT=p > 0.0,
            PRECISION=configs.update_precision(arch, x.dtype), **config,
        )  # fmt: skip
    return y
