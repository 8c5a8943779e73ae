"""Odds-ratio preference optimisation: a likelihood and a preference in one loss, without a reference."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ._arguments import aligned, check_number, scalar
from .dpo import PreferenceLoss
from .masked import batch_mean


def log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 − e^x) for x ≤ 0, to the last digits for x near 0 and far below, and so are its gradients.

    Args:
        x: any shape, floating point.

    Returns: the shape and dtype of x; −Inf at 0, NaN above.

    Source: Mächler, "Accurately Computing log(1 − exp(−|a|))", 2012, equation 7.
    """
    half = -math.log(2)
    near, far = x.clamp(min=half), x.clamp(max=half)  # the branch not taken has a finite gradient
    return torch.where(x > half, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))


def orpo_loss(
    chosen_mean_logp: torch.Tensor, rejected_mean_logp: torch.Tensor, nll: torch.Tensor, beta: float = 0.1
) -> PreferenceLoss:
    """nll − β · mean(log σ(logit(chosen) − logit(rejected))), logit(p) = log p − log(1 − p) of p = e^mean_logp.

    Args:
        chosen_mean_logp, rejected_mean_logp: [B], floating point, log-probs averaged over the tokens of each answer.
        nll: [], the negative log-likelihood of the chosen answers, whose gradient flows on.
        beta: λ of the paper; 0 leaves the likelihood alone.

    In 1 − p a mean log-prob above −eps (of float32: p within rounding of 1) counts as −eps, so that an answer the
    policy is sure of, or an empty one (mean log-prob 0), gives no Inf and no gradient there. A pair with an empty
    answer counts in the mean; the empty one has no gradient.

    Returns: loss [], rewards β · mean_logp [B], float32 (float64 for float64).

    Raises:
        TypeError: log-probs or nll that are not floating point.
        ValueError: shapes that differ, a negative beta.

    Source: Hong et al., "ORPO", 2024, equations 4, 6 and 7.
    """
    check_number("beta", beta, 0.0)
    chosen, rejected = aligned("[B]", chosen_mean_logp=chosen_mean_logp, rejected_mean_logp=rejected_mean_logp)
    log_odds = _logit(chosen) - _logit(rejected)
    loss = scalar("nll", nll) - beta * batch_mean(F.logsigmoid(log_odds))
    return PreferenceLoss(loss, beta * chosen.detach(), beta * rejected.detach())


def _logit(logp: torch.Tensor) -> torch.Tensor:
    return logp - log1mexp(logp.clamp(max=-torch.finfo(logp.dtype).eps))
