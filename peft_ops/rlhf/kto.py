"""Kahneman-Tversky optimisation: answers that are desirable or not, without pairs."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._arguments import aligned, check_bool, check_number, check_positive, scalar
from .masked import batch_mean


class UnpairedLoss(NamedTuple):
    """loss [] to run backward from; rewards [B], the implicit rewards βΔ, without gradient."""

    loss: torch.Tensor
    rewards: torch.Tensor


def kto_loss(
    policy: torch.Tensor, reference: torch.Tensor, desirable: torch.Tensor, kl: torch.Tensor, beta: float = 0.1,
    desirable_weight: float = 1.0, undesirable_weight: float = 1.0,
) -> UnpairedLoss:  # fmt: skip
    """With Δ = policy − reference, the mean over answers of w (1 − σ(β(Δ − kl))) for desirable ones and of
    w (1 − σ(β(kl − Δ))) for the others, w their weight.

    Args:
        policy, reference: [B], floating point, log-probs summed over the tokens of each answer; reference is constant.
        desirable: [B] bool.
        kl: [], see kto_kl; a constant.
        desirable_weight, undesirable_weight: λ_D and λ_U; the paper has λ_D n_D / (λ_U n_U) in [1, 3/2].

    An empty answer has Δ = 0: a constant without gradient, which counts in the mean.

    Returns: loss [], rewards βΔ [B], float32 (float64 for float64).

    Raises:
        TypeError: log-probs that are not floating point, desirable that is not bool.
        ValueError: shapes that differ, beta that is not positive, a negative weight.

    Source: Ethayarajh et al., "KTO", 2024, section 4.1, as λ_y − v(x, y) of equation 7.
    """
    check_positive("beta", beta)
    check_number("desirable_weight", desirable_weight, 0.0)
    check_number("undesirable_weight", undesirable_weight, 0.0)
    policy, reference = aligned("[B]", policy=policy, reference=reference)
    check_bool("desirable", desirable, policy, "policy")
    delta = policy - reference.detach()
    gain = delta - scalar("kl", kl).detach()
    losses = torch.sigmoid(-beta * torch.where(desirable, gain, -gain))  # 1 − σ(x) = σ(−x), which keeps small ones
    weight = torch.where(desirable, losses.new_tensor(desirable_weight), losses.new_tensor(undesirable_weight))
    return UnpairedLoss(batch_mean(weight * losses), beta * delta.detach())


@torch.no_grad()
def kto_kl(policy_mismatched: torch.Tensor, reference_mismatched: torch.Tensor) -> torch.Tensor:
    """max(0, mean(policy_mismatched − reference_mismatched)): the reference point, one number for the batch.

    Args:
        policy_mismatched, reference_mismatched: [B], floating point, summed log-probs of answers to other prompts of
            the batch (each prompt with the answer of its neighbour). With several processes: those of all of them, or
            else their mean before it is clamped.

    Returns: [], float32 (float64 for float64), without gradient; 0 for an empty batch.

    Raises:
        TypeError: log-probs that are not floating point.
        ValueError: shapes that differ.

    Source: Ethayarajh et al., "KTO", 2024, section 4.1.
    """
    pair = {"policy_mismatched": policy_mismatched, "reference_mismatched": reference_mismatched}
    policy, reference = aligned("[B]", **pair)
    return batch_mean(policy - reference).clamp(min=0)
