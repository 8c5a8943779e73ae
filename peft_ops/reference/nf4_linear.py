"""y = x deq(W)ᵀ + bias and dx = dy deq(W) for an NF4 weight, in plain PyTorch.

Forward and backward see the same weight values, rounded once to the dtype of x.
"""

import torch

from .nf4 import nf4_dequantize


def nf4_linear(x: torch.Tensor, weight, bias: torch.Tensor | None) -> torch.Tensor:
    """y [M, N] = x [M, K] deq(W)ᵀ + bias, in the dtype of x."""
    w = nf4_dequantize(weight, x.dtype).view(weight.shape)
    return torch.nn.functional.linear(x, w, None if bias is None else bias.to(x.dtype))


def nf4_linear_dx(dy: torch.Tensor, weight) -> torch.Tensor:
    """dx [M, K] = dy [M, N] deq(W), in the dtype of dy."""
    return dy @ nf4_dequantize(weight, dy.dtype).view(weight.shape)
