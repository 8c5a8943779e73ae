"""y = x deq(W)ᵀ + bias and dx = dy deq(W) for an NF4 weight on a CPU.

Few rows: the library multiplies as it decodes. More: W is decoded a slab at a time into a workspace that is reused and
multiplied by torch. Either way a weight is code · absmax in float32, rounded once to the dtype of x.
"""

import threading
from collections.abc import Iterator

import torch

from . import native

FEW, FEW_DX = 16, 8  # rows of x, of dy that the library multiplies itself: above, torch is faster with its slabs
MANY = 128  # rows from which slabs are larger, so that there are fewer products
_SLAB, _SLAB_OF_MANY = 1 << 21, 1 << 23  # elements; in 16 bits 4 MiB, which stay in a shared cache, and 16
_local = threading.local()


def nf4_linear(x: torch.Tensor, weight, bias: torch.Tensor | None) -> torch.Tensor:
    """y [M, N] = x [M, K] deq(W)ᵀ + bias, in the dtype of x."""
    (N, K), M = weight.shape, x.shape[0]
    bias = None if bias is None else bias.to(x.dtype)
    y = x.new_empty(M, N)
    if M > FEW:
        for rows, w in _decoded_rows(weight, x.dtype, _slab(M)):
            if bias is None:
                torch.mm(x, w.t(), out=y[:, rows])
            else:
                torch.addmm(bias[rows], x, w.t(), out=y[:, rows])
        return y
    x, bias = native.rows(x), None if bias is None else bias.contiguous()
    arguments, _held = native.weight_arguments(weight)
    native.lib.nf4_linear(
        y.data_ptr(), x.data_ptr(), native.DTYPES[x.dtype], x.stride(0), *arguments, native.address(bias), M, N, K,
        native.threads(N * K),
    )  # fmt: skip
    return y


def nf4_linear_dx(dy: torch.Tensor, weight) -> torch.Tensor:
    """dx [M, K] = dy [M, N] deq(W), in the dtype of dy."""
    (N, K), M = weight.shape, dy.shape[0]
    dx = dy.new_empty(M, K)
    if M > FEW_DX or K % weight.blocksize:
        for columns, w in _decoded_columns(weight, dy.dtype, _slab(M)):
            torch.mm(dy, w, out=dx[:, columns])
        return dx
    dy = native.rows(dy)
    arguments, _held = native.weight_arguments(weight)
    native.lib.nf4_linear_dx(
        dx.data_ptr(), dy.data_ptr(), native.DTYPES[dy.dtype], dy.stride(0), *arguments, M, N, K, native.threads(N * K)
    )
    return dx


def nf4_linear_dx_add_(dx: torch.Tensor, dy: torch.Tensor, weight) -> torch.Tensor:
    """dx [M, K] += dy [M, N] deq(W), in place and returned."""
    if dy.shape[0] <= FEW_DX and weight.shape[1] % weight.blocksize == 0:
        return dx.add_(nf4_linear_dx(dy, weight))
    for columns, w in _decoded_columns(weight, dy.dtype, _slab(dy.shape[0])):
        dx[:, columns].addmm_(dy, w)
    return dx


def _slab(M: int) -> int:
    return _SLAB if M < MANY else _SLAB_OF_MANY


def _decoded_rows(weight, dtype: torch.dtype, slab: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, deq(W)[rows] in dtype), at most `slab` elements at a time, each in the memory of the ones before."""
    N, K = weight.shape
    step = max(1, min(N, slab // max(1, K)))
    arguments, _held = native.weight_arguments(weight)
    w = _workspace(step * K, dtype)
    for start in range(0, N, step):
        rows = slice(start, min(start + step, N))
        first, last = start * K, rows.stop * K
        native.lib.nf4_dequantize(
            w.data_ptr(), native.DTYPES[dtype], *arguments, first, last, native.threads(last - first)
        )
        yield rows, w[: last - first].view(-1, K)


def _decoded_columns(weight, dtype: torch.dtype, slab: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """(columns, deq(W)[:, columns] in dtype), at most `slab` elements or 64 columns at a time, each as above."""
    N, K = weight.shape
    step = max(1, min(K, max(64, slab // max(1, N))))
    arguments, _held = native.weight_arguments(weight)
    w = _workspace(step * N, dtype)
    for start in range(0, K, step):
        stop = min(start + step, K)
        native.lib.nf4_columns(
            w.data_ptr(), native.DTYPES[dtype], *arguments, N, K, start, stop, native.threads(N * (stop - start))
        )
        yield slice(start, stop), w[: N * (stop - start)].view(N, stop - start)


def _workspace(n: int, dtype: torch.dtype) -> torch.Tensor:
    """n elements, uninitialised: this thread's, and the next call's too, so one at a time is in use."""
    nbytes = n * dtype.itemsize
    memory = getattr(_local, "memory", None)
    if memory is None or memory.numel() < nbytes:
        with torch.inference_mode(False):
            memory = _local.memory = torch.empty(nbytes, dtype=torch.uint8)
    return memory[:nbytes].view(dtype)
