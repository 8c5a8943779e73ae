"""Direct preference optimisation, with its conservative, robust and IPO forms."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ._arguments import aligned, check_choice, check_positive, check_shape, check_smoothing
from .masked import batch_mean

LOSS_TYPES = ("sigmoid", "ipo", "robust")


class PreferenceLoss(NamedTuple):
    """loss [] to run backward from; chosen_rewards and rejected_rewards [B], the implicit rewards, without gradient."""

    loss: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor

    @property
    def accuracy(self) -> torch.Tensor:
        """[]: the part of the pairs whose chosen answer has the higher reward; a tie is none. 0 for an empty batch."""
        return batch_mean((self.chosen_rewards > self.rejected_rewards).to(self.chosen_rewards.dtype))


def dpo_loss(
    policy_chosen: torch.Tensor, policy_rejected: torch.Tensor, reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor, beta: float = 0.1, loss_type: str = "sigmoid", label_smoothing: float = 0.0,
    chosen_length: torch.Tensor | None = None, rejected_length: torch.Tensor | None = None,
) -> PreferenceLoss:  # fmt: skip
    """With Δ = log π − log π_ref of an answer, δ = Δ_chosen − Δ_rejected, ε = label_smoothing, the mean over pairs of

    - 'sigmoid': −(1 − ε) log σ(βδ) − ε log σ(−βδ); ε > 0 is conservative DPO,
    - 'robust': (−(1 − ε) log σ(βδ) + ε log σ(−βδ)) / (1 − 2ε), unbiased where a part ε of the labels is flipped,
    - 'ipo': (Δ_chosen / |chosen| − Δ_rejected / |rejected| − 1 / (2β))².

    Args:
        policy_chosen, policy_rejected: [B], floating point, log-probs summed over the tokens of each answer.
        reference_chosen, reference_rejected: [B], those of the reference; constants.
        chosen_length, rejected_length: [B], int or floating point, tokens of each answer, for 'ipo' alone; 0 counts as
            1. Without them 'ipo' takes the sums, as the paper is written.

    An empty answer has log-prob 0 under both: Δ = 0, a constant without gradient, and the pair counts in the mean.

    Returns: loss [], rewards βΔ [B], float32 (float64 for float64).

    Raises:
        TypeError: log-probs that are not floating point.
        ValueError: shapes that differ, an unknown loss_type, beta that is not positive, label_smoothing outside
            [0, 0.5) or with 'ipo', one length without the other.

    Source: Rafailov et al., "DPO", 2023, equation 7; Mitchell, "A note on DPO with noisy preferences", 2023,
    equation 3; Chowdhury et al., "Provably Robust DPO", 2024, arXiv 2403.00409, section 3; Azar et al., "IPO", 2023,
    equation 17, with the averages over tokens that its authors used (TRL 1.16).
    """
    check_choice("loss_type", loss_type, LOSS_TYPES)
    check_positive("beta", beta)
    check_smoothing(loss_type, label_smoothing, ("sigmoid", "robust"))
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = aligned(
        "[B]", policy_chosen=policy_chosen, policy_rejected=policy_rejected,
        reference_chosen=reference_chosen, reference_rejected=reference_rejected,
    )  # fmt: skip
    chosen, rejected = policy_chosen - reference_chosen.detach(), policy_rejected - reference_rejected.detach()
    rewards = beta * chosen.detach(), beta * rejected.detach()
    if loss_type == "ipo":
        if (chosen_length is None) != (rejected_length is None):
            raise ValueError("chosen_length and rejected_length must be given both or neither")
        if chosen_length is not None and rejected_length is not None:
            chosen = chosen / _lengths("chosen_length", chosen_length, chosen)
            rejected = rejected / _lengths("rejected_length", rejected_length, chosen)
        return PreferenceLoss(batch_mean((chosen - rejected - 1 / (2 * beta)).square()), *rewards)
    delta = beta * (chosen - rejected)
    right, wrong = -F.logsigmoid(delta), -F.logsigmoid(-delta)
    sign = -1 if loss_type == "robust" else 1
    losses = (1 - label_smoothing) * right + sign * label_smoothing * wrong if label_smoothing else right
    return PreferenceLoss(batch_mean(losses) / (1 - (1 - sign) * label_smoothing), *rewards)


def _lengths(name: str, length: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if not isinstance(length, torch.Tensor):
        raise TypeError(f"{name} must be a tensor [B], got {type(length).__name__}")
    check_shape(name, length, like.shape, "policy_chosen", like.device)
    return length.to(like.dtype).clamp(min=1)
