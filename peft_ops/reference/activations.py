"""Activation functions by the names that adapter configurations use, and their derivatives, in plain PyTorch."""

import math

import torch
import torch.nn.functional as F

ACTIVATIONS = ("linear", "relu", "leakyrelu", "gelu", "gelu_new", "silu", "tanh")
ALIASES = {"swish": "silu"}
_SLOPE = 0.01  # of leakyrelu below zero
_CUBIC, _ROOT = 0.044715, math.sqrt(2 / math.pi)  # of gelu_new: Hendrycks and Gimpel 2016, the tanh approximation


def activate(z: torch.Tensor, activation: str) -> torch.Tensor:
    """act(z), elementwise; gelu is the exact one by erf, gelu_new its approximation by tanh."""
    match activation:
        case "relu":
            return F.relu(z)
        case "leakyrelu":
            return F.leaky_relu(z, _SLOPE)
        case "gelu":
            return F.gelu(z)
        case "gelu_new":
            return F.gelu(z, approximate="tanh")
        case "silu":
            return F.silu(z)
        case "tanh":
            return torch.tanh(z)
    return z


def derivative(z: torch.Tensor, activation: str) -> torch.Tensor:
    """act'(z), elementwise; zero (leakyrelu: its slope) at the corner of relu, as in torch."""
    match activation:
        case "relu":
            return torch.where(z <= 0, 0.0, torch.ones_like(z))
        case "leakyrelu":
            return torch.where(z > 0, 1.0, torch.full_like(z, _SLOPE))
        case "gelu":
            density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
            return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * density
        case "gelu_new":
            t = torch.tanh(_ROOT * (z + _CUBIC * z**3))
            return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * _ROOT * (1 + 3 * _CUBIC * z * z)
        case "silu":
            s = torch.sigmoid(z)
            return s * (1 + z * (1 - s))
        case "tanh":
            return 1 - torch.tanh(z) ** 2
    return torch.ones_like(z)
