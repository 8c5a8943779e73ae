"""h = act(g) · u of a gated MLP, and its gradients, in plain PyTorch.

g, u, dh, h [M, N] of one dtype; computed in float32 (float64 for float64 inputs) and rounded once.
"""

import torch

from .activations import activate, derivative
from .rows import chunks, wide_dtype


def gated(g: torch.Tensor, u: torch.Tensor, activation: str) -> torch.Tensor:
    """h = act(g) · u."""
    h, wide = g.new_empty(g.shape), wide_dtype(g)
    for rows in chunks(g):
        h[rows] = activate(g[rows].to(wide), activation) * u[rows]
    return h


def gated_gradients(
    dh: torch.Tensor, g: torch.Tensor, u: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(h, dg = dh · u · act'(g), du = dh · act(g)) in one pass. dg may take the memory of dh."""
    h, du, wide = g.new_empty(g.shape), g.new_empty(g.shape), wide_dtype(g)
    dg = dh if dh.is_contiguous() else g.new_empty(g.shape)
    for rows in chunks(g):
        z, up, d = (t[rows].to(wide) for t in (g, u, dh))
        act = activate(z, activation)
        h[rows], du[rows] = act * up, d * act
        dg[rows] = d * up * derivative(z, activation)
    return h, dg, du
