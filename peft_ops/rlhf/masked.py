"""Sums and means over completion tokens; what the mask leaves out, NaN too, reaches neither result nor gradient."""

from __future__ import annotations

import torch

from ._arguments import check_bool


def masked(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """values where mask, 0 elsewhere; [..., T] both. Losses do this before anything else: 0 · NaN is NaN."""
    return torch.where(mask, values, 0)


def masked_sum(values: torch.Tensor, mask: torch.Tensor, dim: int | None = -1) -> torch.Tensor:
    """Σ of values where mask. Of log-probs [B, T], the log-prob [B] of each completion.

    Args:
        values: any shape; 16-bit values (and bools) are summed in float32.
        mask: bool, the shape of values.
        dim: None for all.

    Returns: float32 (float64 for float64); 0 over nothing.

    Raises:
        TypeError: mask is not bool.
        ValueError: shapes or devices differ.
    """
    values = _checked(values, mask)
    return masked(values, mask).sum() if dim is None else masked(values, mask).sum(dim)


def masked_mean(values: torch.Tensor, mask: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """The mean of values where mask, as masked_sum; 0 over nothing. Over dim=-1 of log-probs, the average log-prob."""
    total = masked_sum(values, mask, dim)
    return total / (mask.sum() if dim is None else mask.sum(dim)).clamp(min=1)


def whiten(values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """Values of unit variance, and of mean 0 or (shift_mean=False) their own mean, over all tokens where mask.

    (v − mean) / √max(var, 1e-8), var the mean of squares; equal values, a single one too, go to 0. 0 where not mask.

    Args, Raises: as masked_sum.

    Source: Ziegler et al., "Fine-Tuning Language Models from Human Preferences", 2019 (code); the variance is that of
    OpenRLHF, which does not divide by n − 1.
    """
    values = masked(_checked(values, mask), mask)
    mean = masked_mean(values, mask)
    centred = values - mean
    white = centred * masked_mean(masked(centred, mask).square(), mask).clamp(min=1e-8).rsqrt()
    return masked(white if shift_mean else white + mean, mask)


def batch_mean(values: torch.Tensor) -> torch.Tensor:
    """The mean [] over a batch [B]; 0 over an empty one, with a graph that a backward can run through."""
    return values.sum() / max(values.numel(), 1)


def _checked(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if not isinstance(values, torch.Tensor):
        raise TypeError(f"values must be a tensor, got {type(values).__name__}")
    check_bool("mask", mask, values, "values")
    return values.to(torch.promote_types(values.dtype, torch.float32))
