"""A linear layer with its low-rank term, forward and for the gradient of x, on a CPU: torch's product, an update."""

import torch

from .down_project import down_project
from .low_rank import low_rank_update_
from .nf4_linear import nf4_linear, nf4_linear_dx


def lora_linear(
    x: torch.Tensor, weight, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, scaling: float, p: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """y = x Wᵀ + bias + scaling · s bᵀ, in the dtype of x, and s = drop(x) aᵀ as `down_project` gives it."""
    s = down_project(x, a, p, seed)
    return linear_low_rank(x, weight, bias, s, b, scaling), s


def linear_low_rank(
    x: torch.Tensor, weight, bias: torch.Tensor | None, s: torch.Tensor, b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """y = x Wᵀ + bias + scaling · s bᵀ, in the dtype of x."""
    if isinstance(weight, torch.Tensor):
        y = torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    else:
        y = nf4_linear(x, weight, bias)
    return low_rank_update_(y, s, b, scaling, 0.0, None)


def linear_low_rank_dx(
    dy: torch.Tensor, weight, ds: torch.Tensor, a: torch.Tensor, p: float, seed: torch.Tensor | None
) -> torch.Tensor:
    """dx = dy W + drop(ds a), in the dtype of dy; drop with the mask of the forward."""
    dx = dy @ weight.to(dy.dtype) if isinstance(weight, torch.Tensor) else nf4_linear_dx(dy, weight)
    return low_rank_update_(dx, ds, a.t(), 1.0, p, seed)
