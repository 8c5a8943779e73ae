"""Walking rows a few at a time, so that widening to float32 costs a cache's worth of memory, never a copy."""

from collections.abc import Iterator

import torch

CHUNK_ELEMENTS = 1 << 19  # 2 MiB of float32, which a core's cache holds


def chunks(t: torch.Tensor) -> Iterator[slice]:
    """Slices that cover the rows of t [M, K]."""
    step = max(1, CHUNK_ELEMENTS // max(1, t.shape[1]))
    return (slice(start, min(start + step, t.shape[0])) for start in range(0, t.shape[0], step))


def widened(t: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, t[rows] in dtype), a few rows at a time; a copy's memory serves again for the next, warm in the cache."""
    buffer = None
    for rows in chunks(t):
        if t.dtype == dtype:
            yield rows, t[rows]
            continue
        if buffer is None:
            buffer = t.new_empty(rows.stop, t.shape[1], dtype=dtype)
        yield rows, buffer[: rows.stop - rows.start].copy_(t[rows])


def wide_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """What sums are kept in: float32, or float64 where an operand is."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


class ProductSum:
    """Σ leftᵀ right over chunks of rows, for left [rows, R] and right [rows, K] with R small.

    Columns go as a batch of groups: a batched product of this form takes two thirds of a plain one's time on a CPU.
    """

    def __init__(self, like: torch.Tensor, R: int, K: int, dtype: torch.dtype):
        self.groups = 8 if K % 8 == 0 else 1
        self.sums = like.new_zeros(self.groups, R, K // self.groups, dtype=dtype)

    def add(self, left: torch.Tensor, right: torch.Tensor) -> None:
        columns = right.unflatten(1, (self.groups, -1)).transpose(0, 1)
        self.sums.baddbmm_(left.t().contiguous().expand(self.groups, -1, -1), columns)

    def total(self) -> torch.Tensor:
        """[R, K]."""
        return self.sums.transpose(0, 1).flatten(1)
