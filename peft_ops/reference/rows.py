"""Walking rows a few at a time, so that widening to float32 costs a cache's worth of memory, never a copy."""

from collections.abc import Iterator

import torch

_CHUNK_ELEMENTS = 1 << 19  # 2 MiB of float32, which a core's cache holds


def chunks(t: torch.Tensor) -> Iterator[slice]:
    """Slices that cover the rows of t [M, K]."""
    step = max(1, _CHUNK_ELEMENTS // max(1, t.shape[1]))
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
