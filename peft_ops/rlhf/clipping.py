"""The clipped surrogate of PPO, which GRPO shares, and what a policy loss reports."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .kl import kl_estimate
from .masked import masked_mean


class PolicyLoss(NamedTuple):
    """loss [] to run backward from; the rest [] without gradient, means over tokens.

    clip_fraction: the part of the tokens whose gradient was clipped away.
    approx_kl: KL(old ‖ policy) by k3, how far the policy has gone since it drew the tokens.
    reference_kl: KL(policy ‖ reference) by k3, where the loss has such a term.
    """

    loss: torch.Tensor
    clip_fraction: torch.Tensor
    approx_kl: torch.Tensor
    reference_kl: torch.Tensor | None = None


def clipped_surrogate(
    logp: torch.Tensor, old_logp: torch.Tensor, advantages: torch.Tensor, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(−min(ρA, clip(ρ, 1 − clip_low, 1 + clip_high) A), where the clipped one is smaller), ρ = e^(logp − old_logp).

    The minimum leaves one bound to each sign of A: ρ ≤ 1 + clip_high where A ≥ 0, ρ ≥ 1 − clip_low where A < 0. So
    log ρ is clamped before the exponential: a ratio that would overflow is never computed where its gradient is 0,
    and where min and clamp would give 0 · Inf. Where A < 0 nothing bounds ρ from above: past e^88 (float32) the loss is
    Inf.

    Args:
        logp, old_logp, advantages: [B, T], float32 or float64; gradients flow into logp.

    Returns: [B, T] and [B, T] bool.

    Source: Schulman et al., "PPO", 2017, equation 7; two bounds: Yu et al., "DAPO", 2025, equation 10.
    """
    log_ratio, negative = logp - old_logp, advantages < 0
    low, high = math.log1p(-clip_low) if clip_low < 1 else -math.inf, math.log1p(clip_high)
    ratio = torch.where(negative, log_ratio.clamp(min=low), log_ratio.clamp(max=high)).exp()
    clipped = (negative & (log_ratio < low)) | ((advantages > 0) & (log_ratio > high))
    return -ratio * advantages, clipped


@torch.no_grad()
def policy_drift(
    logp: torch.Tensor, old_logp: torch.Tensor, clipped: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """clip_fraction and approx_kl of a PolicyLoss, from [B, T] each."""
    return masked_mean(clipped.to(logp.dtype), mask), masked_mean(kl_estimate(old_logp, logp, "k3"), mask)
