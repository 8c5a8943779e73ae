"""A low-rank term added in place, and its gradients, on a CPU; sums are float32."""

import torch

from . import native
from .down_project import _product_sum

_ONE_PASS = 16  # ranks up to which ds and db in one pass over dy are faster than in a pass each
_CHUNKS, _LEAST_ROWS = 16, 64  # of rows, whose parts of db are summed last


def low_rank_update_(
    y: torch.Tensor, s: torch.Tensor, b: torch.Tensor, scaling: float, p: float, seed: torch.Tensor | None
) -> torch.Tensor:
    """y += scaling · drop(s bᵀ), in place and returned; drop with the mask that `seed` gives an [M, N] tensor."""
    (M, N), R = y.shape, b.shape[1]
    if p >= 1.0:
        return y
    if y.stride(1) != 1:
        return y.copy_(low_rank_update_(y.contiguous(), s, b, scaling, p, seed))
    s, bt, seed = s.float().contiguous(), native.operand(b.t()), native.seeds(seed)
    native.lib.low_rank_update(
        y.data_ptr(), native.DTYPES[y.dtype], y.stride(0), s.data_ptr(), bt.data_ptr(), bt.stride(0), M, N, R,
        *native.dropout_arguments(p, seed, R, scaling), native.threads(M * N),
    )  # fmt: skip
    torch.autograd.graph.increment_version(y)  # autograd checks what it saved by it
    return y


def low_rank_gradients(
    dy: torch.Tensor, s: torch.Tensor | None, b: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """ds [M, R] = scaling · dy b and, where s is given, db [N, R] = scaling · dyᵀ s."""
    (M, N), R = dy.shape, b.shape[1]
    dy, bt = native.rows(dy), native.operand(b.t())
    ds, threads = torch.empty(M, R, dtype=torch.float32), native.threads(M * N)
    if s is None or R > _ONE_PASS:
        native.lib.down_project(
            ds.data_ptr(), dy.data_ptr(), native.DTYPES[dy.dtype], dy.stride(0), bt.data_ptr(), bt.stride(0), M, N, R,
            *native.dropout_arguments(0.0, None, R, scaling), threads,
        )  # fmt: skip
        return ds, None if s is None else _product_sum(s, dy, 0.0, None, scaling).t()
    s, chunks = s.float().contiguous(), max(1, min(_CHUNKS, M // _LEAST_ROWS))
    parts = torch.empty(chunks, R, N, dtype=torch.float32)
    native.lib.low_rank_gradients(
        ds.data_ptr(), parts.data_ptr(), dy.data_ptr(), native.DTYPES[dy.dtype], dy.stride(0), bt.data_ptr(),
        bt.stride(0), s.data_ptr(), M, N, R, chunks, scaling, threads,
    )  # fmt: skip
    return ds, (parts[0] if chunks == 1 else parts.sum(0)).t()
