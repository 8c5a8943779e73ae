"""Simple preference optimisation: average log-probs as rewards, with a margin and without a reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._arguments import aligned, check_number, check_positive, check_smoothing
from .dpo import PreferenceLoss
from .masked import batch_mean


def simpo_loss(
    chosen_mean_logp: torch.Tensor, rejected_mean_logp: torch.Tensor, beta: float = 2.0, gamma: float = 0.5,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:  # fmt: skip
    """The mean over pairs of −(1 − ε) log σ(m) − ε log σ(−m), m = β (chosen − rejected) − γ, ε = label_smoothing.

    Args:
        chosen_mean_logp, rejected_mean_logp: [B], floating point, log-probs averaged over the tokens of each answer.
        gamma: the margin between rewards, TRL's simpo_gamma; the authors' gamma_beta_ratio is gamma / beta.

    An empty answer has mean log-prob 0, a constant without gradient; the pair counts in the mean.

    Returns: loss [], rewards β · mean_logp [B], float32 (float64 for float64).

    Raises:
        TypeError: log-probs that are not floating point.
        ValueError: shapes that differ, beta that is not positive, a negative gamma, label_smoothing outside [0, 0.5).

    Source: Meng et al., "SimPO", 2024, equation 6; label_smoothing as in TRL's CPOTrainer.
    """
    check_positive("beta", beta)
    check_number("gamma", gamma, 0.0)
    check_smoothing("simpo", label_smoothing, ("simpo",))
    chosen, rejected = aligned("[B]", chosen_mean_logp=chosen_mean_logp, rejected_mean_logp=rejected_mean_logp)
    margin = beta * (chosen - rejected) - gamma
    losses = -F.logsigmoid(margin)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-margin)
    return PreferenceLoss(batch_mean(losses), beta * chosen.detach(), beta * rejected.detach())
