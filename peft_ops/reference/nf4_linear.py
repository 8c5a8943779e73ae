"""y = x deq(W)ᵀ + bias and dx = dy deq(W) for an NF4 weight, in plain PyTorch.

Forward and backward see the same weight values, rounded once to the dtype of x. W is decoded a slab at a time, rows in
the forward and columns in the backward: each output is one product, and no more than a slab is ever in memory. (Where
blocks do not end with the rows, the backward's slab is all of W.)
"""

import math
from collections.abc import Iterator

import torch

from .nf4 import _decode, _nf4_absmax, nf4_dequantize

_SLAB = 1 << 20  # elements


def nf4_linear(x: torch.Tensor, weight, bias: torch.Tensor | None) -> torch.Tensor:
    """y [M, N] = x [M, K] deq(W)ᵀ + bias, in the dtype of x."""
    N = weight.shape[0]
    bias = None if bias is None else bias.to(x.dtype)
    y = x.new_empty(x.shape[0], N)
    for rows, w in decoded_rows(weight, x.dtype):
        y[:, rows] = torch.nn.functional.linear(x, w, None if bias is None else bias[rows])
    return y


def decoded_rows(weight, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, deq(W)[rows] in dtype), a slab at a time."""
    N, K = weight.shape
    packed, absmax, blocksize = weight.packed.reshape(-1), _nf4_absmax(weight), weight.blocksize
    for rows in _slabs(N, K, blocksize):
        first, last = rows.start * K, rows.stop * K
        scales = absmax[first // blocksize : -(-last // blocksize)]
        w = _decode(packed[first // 2 : (last + 1) // 2], scales, blocksize, last - first, dtype)
        yield rows, w.view(rows.stop - rows.start, K)


def nf4_linear_dx(dy: torch.Tensor, weight) -> torch.Tensor:
    """dx [M, K] = dy [M, N] deq(W), in the dtype of dy."""
    K, dx = weight.shape[1], None
    for columns, w in _decoded_columns(weight, dy.dtype):
        if columns == slice(0, K):
            return dy @ w
        dx = dy.new_empty(dy.shape[0], K) if dx is None else dx
        dx[:, columns] = dy @ w
    return dy.new_zeros(dy.shape[0], K) if dx is None else dx


def nf4_linear_dx_add_(dx: torch.Tensor, dy: torch.Tensor, weight) -> torch.Tensor:
    """dx [M, K] += dy [M, N] deq(W), in place and returned."""
    for columns, w in _decoded_columns(weight, dy.dtype):
        dx[:, columns].addmm_(dy, w)
    return dx


def _decoded_columns(weight, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """(columns, deq(W)[:, columns] in dtype), a slab at a time; all at once where blocks do not end with the rows."""
    (N, K), blocksize = weight.shape, weight.blocksize
    if K % blocksize:
        yield slice(0, K), nf4_dequantize(weight, dtype).view(N, K)
        return
    blocks = K // blocksize
    packed, absmax = weight.packed.reshape(N, blocks, blocksize // 2), _nf4_absmax(weight).view(N, blocks)
    for part in _slabs(blocks, N * blocksize, 1):
        codes, scales = packed[:, part].reshape(-1), absmax[:, part].reshape(-1)
        w = _decode(codes, scales, blocksize, 2 * codes.numel(), dtype)
        yield slice(part.start * blocksize, part.stop * blocksize), w.view(N, (part.stop - part.start) * blocksize)


def _slabs(rows: int, width: int, blocksize: int) -> Iterator[slice]:
    """Ranges of the rows of [rows, width], about _SLAB elements each, that start where a block starts."""
    least = blocksize // math.gcd(width, blocksize)
    step = rows if torch.compiler.is_compiling() else max(1, _SLAB // max(1, width * least)) * least
    return (slice(start, min(start + step, rows)) for start in range(0, rows, max(1, step)))
