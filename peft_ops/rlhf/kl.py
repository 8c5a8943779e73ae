"""Estimates of KL(policy ‖ reference) from the log-probs of tokens that the policy drew."""

from __future__ import annotations

import torch

from ._arguments import aligned, check_bool, check_choice
from .masked import masked

ESTIMATORS = ("k1", "k2", "k3")


def kl_estimate(
    logp: torch.Tensor, reference_logp: torch.Tensor, estimator: str = "k3", mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Of each token, with d = reference_logp − logp: k1 = −d, k2 = d²/2, k3 = e^d − d − 1.

    k1 is unbiased; k2 is not, but its gradient is; k3 is unbiased and never negative. Where |d| is small k3 is summed
    as its series: e^d − d − 1 in float32 is noise, of either sign, as soon as |d| < 3e-4. It overflows to Inf where the
    reference gives a token e^88 times the policy's probability (float32); nothing is clamped.

    Args:
        logp, reference_logp: [B, T], floating point; gradients flow into both.
        mask: [B, T] bool; where it is False the result is 0, whatever the log-probs.

    Returns: [B, T], float32 (float64 for float64).

    Raises:
        TypeError: log-probs that are not floating point, a mask that is not bool.
        ValueError: an unknown estimator, shapes that differ.

    Source: Schulman, "Approximating KL Divergence", 2020, joschu.net/blog/kl-approx.html.
    """
    check_choice("estimator", estimator, ESTIMATORS)
    logp, reference_logp = aligned("[B, T]", logp=logp, reference_logp=reference_logp)
    d = reference_logp - logp
    if mask is not None:
        check_bool("mask", mask, logp, "logp")
        d = masked(d, mask)
    if estimator == "k1":
        return -d
    return d.square() / 2 if estimator == "k2" else _k3(d)


def _k3(d: torch.Tensor) -> torch.Tensor:
    """e^d − d − 1 to the last digits: d²/2 (1 + d/3 (1 + d/4 (...))) up to d^14 where |d| < 1/2."""
    small = d.clamp(-0.5, 0.5)  # so that the series and its gradient are finite where it is not taken
    series = torch.ones_like(d)
    for n in range(14, 2, -1):
        series = 1 + small / n * series
    return torch.where(d.abs() < 0.5, small.square() / 2 * series, torch.expm1(d) - d)
