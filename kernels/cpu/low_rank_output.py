"""How DoRA's and the adapter's low-rank terms leave on a CPU: added, scaled, shifted and rounded once."""

import torch

from . import native


def low_rank_output(
    y: torch.Tensor, u: torch.Tensor | None, s: torch.Tensor, b: torch.Tensor, scaling: float,
    g: torch.Tensor | None, bias: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Writes y [M, N] = g ∘ (u + scaling · s bᵀ) + bias and returns it. Neighbours in a row of y are side by side in
    memory, which may be that of u [M, N], of any dtype; u, g and bias [N] may be None."""
    (M, N), R = y.shape, b.shape[1]
    u, u_dtype = None if u is None else native.rows(u), native.DTYPES[(y if u is None else u).dtype]
    g, bias = (None if t is None else native.padded(t) for t in (g, bias))
    s, bt = s.float().contiguous(), native.operand(b.t())
    native.lib.low_rank_output(
        y.data_ptr(), native.DTYPES[y.dtype], y.stride(0), native.address(u), u_dtype, 0 if u is None else u.stride(0),
        s.data_ptr(), bt.data_ptr(), bt.stride(0), native.address(g), native.address(bias), M, N, R, scaling,
        native.threads(M * N),
    )  # fmt: skip
    return y
