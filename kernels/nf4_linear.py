"""y = x deq(W)ᵀ + bias and dx = dy deq(W) for an NF4 weight, two routes each, chosen by rows in `configs`.

Few rows, and blocks that end with the rows of W: one kernel decodes tiles of W and multiplies them, the reduction split
over programs where the output alone would not fill a GPU (float32 partial sums, added in order). Otherwise: slabs of W
that fit the L2 cache are decoded into a workspace and multiplied by the vendor's GEMM. On both routes, in both
directions, a weight is code · absmax in float32, rounded once to the dtype of x.
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from . import configs
from .launch import device_guard
from .nf4 import _decode_into, _nf4_lookup, _nf4_pair, _nf4_scale, _weight_arguments


@triton.jit
def _nf4_tile(
    packed_ptr, absmax_ptr, nested_ptr, offset_ptr, map_ptr, lookup, rows, N, first_column, K,
    BLOCKSIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NESTED: tl.constexpr, SHUFFLE: tl.constexpr,
    EVEN: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """(even, odd) columns [BLOCK_N, BLOCK_K / 2] of a tile of W [N, K]; 0 outside, which there is none of with
    EVEN. rows: int64 [BLOCK_N]; lookup: see _nf4_lookup."""
    HALF: tl.constexpr = BLOCK_K // 2
    GROUPS: tl.constexpr = 1 if BLOCK_K <= BLOCKSIZE else BLOCK_K // BLOCKSIZE
    column = first_column + 2 * (HALF // GROUPS) * tl.arange(0, GROUPS)
    inside = None if EVEN else (rows[:, None] < N) & (column[None, :] < K)
    block = rows[:, None] * (K // BLOCKSIZE) + (column // BLOCKSIZE)[None, :]
    scale = _nf4_scale(block, inside, absmax_ptr, nested_ptr, offset_ptr, map_ptr, NESTED)
    if GROUPS > 1:
        scale = tl.reshape(tl.broadcast_to(scale[:, :, None], (BLOCK_N, GROUPS, HALF // GROUPS)), (BLOCK_N, HALF))
    at = first_column // 2 + tl.arange(0, HALF)
    bytes_ptr = packed_ptr + rows[:, None] * (K // 2) + at[None, :]
    if EVEN:
        byte = tl.load(bytes_ptr)
    else:
        byte = tl.load(bytes_ptr, mask=(rows[:, None] < N) & (at[None, :] < K // 2), other=0)
    high, low = _nf4_pair(byte, lookup, SHUFFLE)
    return (high * scale).to(DTYPE), (low * scale).to(DTYPE)


@triton.jit
def _nf4_linear_kernel(
    x_ptr, packed_ptr, absmax_ptr, nested_ptr, offset_ptr, map_ptr, pairs_ptr, bias_ptr, y_ptr,
    M, N, K, stride_xm, split_k,
    BLOCKSIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    NESTED: tl.constexpr, SHUFFLE: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y [splits, M, N]: sums over split_k columns each of x [M, K] deq(W [N, K])ᵀ, plus bias [N], fp32 accumulate.

    W is the left operand, [BLOCK_N, BLOCK_K] a step, so that few rows of x fill a matrix instruction; even and odd
    columns are multiplied apart, so that high and low nibbles need no interleaving. EVEN: whole blocks of K, so that
    nothing is masked; rows behind the last are the last again.
    """
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    last_n, last_m = tl.minimum(n, N - 1), tl.minimum(m, M - 1)
    first = tl.program_id(2) * split_k
    lookup = _nf4_lookup(pairs_ptr, SHUFFLE)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(first, tl.minimum(first + split_k, K), BLOCK_K):
        w_even, w_odd = _nf4_tile(
            packed_ptr, absmax_ptr, nested_ptr, offset_ptr, map_ptr, lookup, last_n, N, start, K,
            BLOCKSIZE, BLOCK_N, BLOCK_K, NESTED, SHUFFLE, EVEN, x_ptr.dtype.element_ty,
        )  # fmt: skip
        k = start + tl.arange(0, BLOCK_K)
        if EVEN:
            x = tl.load(x_ptr + last_m[:, None] * stride_xm + k[None, :])
        else:
            x = tl.load(x_ptr + last_m[:, None] * stride_xm + k[None, :], mask=k[None, :] < K, other=0.0)
        x_even, x_odd = tl.split(tl.reshape(x, (BLOCK_M, BLOCK_K // 2, 2)))
        acc = tl.dot(w_even, tl.trans(x_even), acc, input_precision=PRECISION)
        acc = tl.dot(w_odd, tl.trans(x_odd), acc, input_precision=PRECISION)
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    out = (tl.program_id(2).to(tl.int64) * M + m[None, :]) * N + n[:, None]
    tl.store(y_ptr + out, acc.to(y_ptr.dtype.element_ty), mask=(m[None, :] < M) & (n[:, None] < N))


@triton.jit
def _nf4_linear_dx_kernel(
    dy_ptr, packed_ptr, absmax_ptr, nested_ptr, offset_ptr, map_ptr, pairs_ptr, dx_ptr,
    M, N, K, stride_dym, split_n,
    BLOCKSIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    NESTED: tl.constexpr, SHUFFLE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx [splits, M, K]: sums over split_n rows each of dy [M, N] deq(W [N, K]), fp32 accumulate.

    Even and odd columns are accumulated apart and interleaved once at the end. EVEN: whole blocks of N and K.
    """
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    last_m = tl.minimum(m, M - 1)
    first = tl.program_id(2) * split_n
    lookup = _nf4_lookup(pairs_ptr, SHUFFLE)
    even = tl.zeros((BLOCK_M, BLOCK_K // 2), tl.float32)
    odd = tl.zeros((BLOCK_M, BLOCK_K // 2), tl.float32)
    for start in range(first, tl.minimum(first + split_n, N), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        w_even, w_odd = _nf4_tile(
            packed_ptr, absmax_ptr, nested_ptr, offset_ptr, map_ptr, lookup, n.to(tl.int64), N,
            tl.program_id(0) * BLOCK_K, K, BLOCKSIZE, BLOCK_N, BLOCK_K, NESTED, SHUFFLE, EVEN,
            dy_ptr.dtype.element_ty,
        )  # fmt: skip
        if EVEN:
            dy = tl.load(dy_ptr + last_m[:, None] * stride_dym + n[None, :])
        else:
            dy = tl.load(dy_ptr + last_m[:, None] * stride_dym + n[None, :], mask=n[None, :] < N, other=0.0)
        even = tl.dot(dy, w_even, even, input_precision=PRECISION)
        odd = tl.dot(dy, w_odd, odd, input_precision=PRECISION)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    out = (tl.program_id(2).to(tl.int64) * M + m[:, None]) * K + k[None, :]
    dx = tl.reshape(tl.join(even, odd), (BLOCK_M, BLOCK_K)).to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + out, dx, mask=(m[:, None] < M) & (k[None, :] < K))


@triton.jit
def _sum_splits_kernel(part_ptr, bias_ptr, y_ptr, n, N, SPLITS: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr):
    """y [M, N], flat n elements = the sum of part [SPLITS, M, N] in order, plus bias [N]."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        acc += tl.load(part_ptr + n * split + i, mask=i < n, other=0.0)
    if BIAS:
        acc += tl.load(bias_ptr + i % N, mask=i < n, other=0.0).to(tl.float32)
    tl.store(y_ptr + i, acc.to(y_ptr.dtype.element_ty), mask=i < n)


def nf4_linear(x: torch.Tensor, weight, bias: torch.Tensor | None) -> torch.Tensor:
    """See peft_ops.reference.nf4_linear."""
    if not _decodes_inside(x, weight):
        return _slab_linear(x, weight, bias)
    parts = _linear_parts(x, weight, bias, x.dtype)
    return parts[0] if parts.shape[0] == 1 else _sum_splits(parts, bias, x.dtype)


def _decodes_inside(x: torch.Tensor, weight) -> bool:
    """Whether y = x deq(W)ᵀ decodes W inside the GEMM."""
    M, (N, K) = x.shape[0], weight.shape
    arch = configs.arch_of(x.device)
    return min(N, K) > 0 and K % weight.blocksize == 0 and configs.nf4_fused(M, N, x.dtype, arch)


def _linear_parts(x: torch.Tensor, weight, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """[splits, M, N]: y alone in `dtype` with its bias, or float32 parts of the sum, without."""
    M, (N, K), arch = x.shape[0], weight.shape, configs.arch_of(x.device)
    x = x if x.stride(1) == 1 else x.contiguous()
    config = configs.nf4_linear("nf4_linear", M, arch, x.dtype)
    grid = (triton.cdiv(N, config["BLOCK_N"]), triton.cdiv(M, config["BLOCK_M"]))
    splits, split_k = configs.nf4_splits(grid, K, config["BLOCK_K"])
    y = x.new_empty(splits, M, N, dtype=dtype if splits == 1 else torch.float32)
    bias_ptr = x if bias is None else bias.contiguous()
    with device_guard(x):
        _nf4_linear_kernel[(*grid, splits)](
            x, *_weight_arguments(weight), bias_ptr, y,
            M, N, K, x.stride(0), split_k, BLOCKSIZE=weight.blocksize, NESTED=weight.absmax is None,
            SHUFFLE=configs.nf4_shuffle(x.device), EVEN=K % config["BLOCK_K"] == 0,
            BIAS=bias is not None and splits == 1, PRECISION=configs.fp32_precision(arch), enable_fp_fusion=False,
            **config,
        )  # fmt: skip
    return y


def nf4_linear_dx(dy: torch.Tensor, weight) -> torch.Tensor:
    """See peft_ops.reference.nf4_linear."""
    M, (N, K), arch = dy.shape[0], weight.shape, configs.arch_of(dy.device)
    if min(N, K) == 0 or K % weight.blocksize or not configs.nf4_fused(M, K, dy.dtype, arch, "nf4_linear_dx"):
        return _slab_linear_dx(dy, weight)
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    config = configs.nf4_linear("nf4_linear_dx", M, arch, dy.dtype)
    grid = (triton.cdiv(K, config["BLOCK_K"]), triton.cdiv(M, config["BLOCK_M"]))
    splits, split_n = configs.nf4_splits(grid, N, config["BLOCK_N"])
    dx = dy.new_empty(M, K) if splits == 1 else dy.new_empty(splits, M, K, dtype=torch.float32)
    with device_guard(dy):
        _nf4_linear_dx_kernel[(*grid, splits)](
            dy, *_weight_arguments(weight), dx,
            M, N, K, dy.stride(0), split_n, BLOCKSIZE=weight.blocksize, NESTED=weight.absmax is None,
            SHUFFLE=configs.nf4_shuffle(dy.device), EVEN=N % config["BLOCK_N"] == K % config["BLOCK_K"] == 0,
            PRECISION=configs.fp32_precision(arch), enable_fp_fusion=False, **config,
        )  # fmt: skip
    return dx if splits == 1 else _sum_splits(dx, None, dy.dtype)


def nf4_linear_dx_add_(dx: torch.Tensor, dy: torch.Tensor, weight) -> torch.Tensor:
    """See peft_ops.reference.nf4_linear. Few rows are added afterwards: they are few bytes."""
    M, (N, K) = dy.shape[0], weight.shape
    if (
        min(N, K) == 0
        or K % weight.blocksize
        or not configs.nf4_fused(M, K, dy.dtype, configs.arch_of(dy.device), "nf4_linear_dx")
    ):
        return _slab_linear_dx(dy, weight, dx)
    return dx.add_(nf4_linear_dx(dy, weight))


def _sum_splits(part: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    y = part.new_empty(part.shape[1:], dtype=dtype)
    with device_guard(part):
        _sum_splits_kernel[(triton.cdiv(y.numel(), 512),)](
            part, part if bias is None else bias.contiguous(), y, y.numel(), y.shape[1],
            SPLITS=part.shape[0], BLOCK=512, BIAS=bias is not None,
        )  # fmt: skip
    return y


def _slab_linear(x: torch.Tensor, weight, bias: torch.Tensor | None) -> torch.Tensor:
    N = weight.shape[0]
    bias = None if bias is None else bias.to(x.dtype)
    y = None
    for rows, w in _decoded_slabs(weight, x.dtype):
        if rows == slice(0, N):
            return torch.nn.functional.linear(x, w, bias)
        y = x.new_empty(x.shape[0], N) if y is None else y
        if bias is None:
            torch.mm(x, w.t(), out=y[:, rows])
        else:
            torch.addmm(bias[rows], x, w.t(), out=y[:, rows])
    return x.new_empty(x.shape[0], N) if y is None else y


def _decoded_slabs(weight, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, deq(W)[rows]): as many rows at a time as stay in the L2 cache, each in the memory of the last."""
    N, K = weight.shape
    align = weight.blocksize // math.gcd(K, weight.blocksize)
    rows = configs.nf4_slab(N, K * dtype.itemsize, align, configs.arch_of(weight.packed.device), dtype)
    slab = torch.empty(rows, K, dtype=dtype, device=weight.packed.device)
    for start in range(0, N, max(1, rows)):
        part = slice(start, min(start + rows, N))
        yield part, _decode_into(slab[: part.stop - start], weight, start * K // weight.blocksize, None)


def _slab_linear_dx(dy: torch.Tensor, weight, onto: torch.Tensor | None = None) -> torch.Tensor:
    """dy deq(W), or that added to `onto` in place."""
    (N, K), blocksize = weight.shape, weight.blocksize
    arch = configs.arch_of(dy.device)
    columns = K if K % blocksize else configs.nf4_slab(K, N * dy.element_size(), blocksize, arch, dy.dtype)
    if columns == K:
        w = _decode_into(torch.empty(N, K, dtype=dy.dtype, device=dy.device), weight, 0, None)
        return dy @ w if onto is None else onto.addmm_(dy, w)
    slab = torch.empty(N * columns, dtype=dy.dtype, device=dy.device)
    dx = dy.new_empty(dy.shape[0], K) if onto is None else onto
    for start in range(0, K, columns):
        width = min(columns, K - start)
        w = _decode_into(slab[: N * width], weight, start // blocksize, width // blocksize).view(N, width)
        if onto is None:
            torch.mm(dy, w, out=dx[:, start : start + width])
        else:
            dx[:, start : start + width].addmm_(dy, w)
    return dx
