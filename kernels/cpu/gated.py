"""h = act(g) · u of a gated MLP, and its gradients, on a CPU: one pass, computed in float32 and rounded once."""

import torch

from . import native


def gated(g: torch.Tensor, u: torch.Tensor, activation: str) -> torch.Tensor:
    """h = act(g) · u, for g, u, h [M, N] of one dtype."""
    (M, N), g, u = g.shape, native.rows(g), native.rows(u)
    h = torch.empty(M, N, dtype=g.dtype)
    native.lib.gated(
        h.data_ptr(), g.data_ptr(), g.stride(0), u.data_ptr(), u.stride(0), native.DTYPES[g.dtype],
        native.ACTIVATIONS[activation], M, N, native.threads(M * N),
    )  # fmt: skip
    return h


def gated_gradients(
    dh: torch.Tensor, g: torch.Tensor, u: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(h, dg = dh · u · act'(g), du = dh · act(g)) in one pass. dg may take the memory of dh."""
    (M, N), dh, g, u = g.shape, native.rows(dh), native.rows(g), native.rows(u)
    h, du = (torch.empty(M, N, dtype=g.dtype) for _ in range(2))
    dg = dh if dh.is_contiguous() else torch.empty(M, N, dtype=g.dtype)
    native.lib.gated_gradients(
        h.data_ptr(), dg.data_ptr(), du.data_ptr(), dh.data_ptr(), dh.stride(0), g.data_ptr(), g.stride(0),
        u.data_ptr(), u.stride(0), native.DTYPES[g.dtype], native.ACTIVATIONS[activation], M, N, native.threads(M * N),
    )  # fmt: skip
    if dg is dh:
        torch.autograd.graph.increment_version(dh)
    return h, dg, du
