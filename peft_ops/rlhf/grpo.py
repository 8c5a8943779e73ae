"""Group-relative policy optimisation: advantages from the rewards of a group, a clipped loss, four ways to average."""

from __future__ import annotations

import torch

from ..tuning.config import check_count, check_probability
from ._arguments import aligned, check_bool, check_choice, check_number, check_positive
from .clipping import PolicyLoss, clipped_surrogate, policy_drift
from .kl import kl_estimate
from .masked import batch_mean, masked, masked_mean, masked_sum

REDUCTIONS = ("dapo", "grpo", "bnpo", "dr_grpo")


@torch.no_grad()
def group_advantages(rewards: torch.Tensor, group_size: int, scale: bool = True, eps: float = 1e-4) -> torch.Tensor:
    """(r − mean) / (std + eps) within each group of answers to one prompt; r − mean without scale.

    Args:
        rewards: [B], floating point; a group's answers stand side by side.
        group_size: answers per prompt; divides B. In a group of one, as in one of equal rewards, all advantages are 0.
        eps: keeps groups whose rewards hardly differ from weighing much.

    The standard deviation divides by group_size − 1. A NaN reward makes the advantages of its group NaN (TRL takes such
    answers out; do so before).

    Returns: [B], float32 (float64 for float64), without gradient.

    Raises:
        TypeError: rewards that are not floating point, group_size that is not an int.
        ValueError: group_size < 1 or not a divisor of B, a negative eps.

    Source: Shao et al., "DeepSeekMath", 2024, section 4.1.2; without scale: Liu et al., "Understanding R1-Zero-Like
    Training", 2025, section 3.2.
    """
    check_count("group_size", group_size)
    check_number("eps", eps, 0.0)
    (rewards,) = aligned("[B]", rewards=rewards)
    if rewards.shape[0] % group_size:
        raise ValueError(f"group_size must divide the {rewards.shape[0]} rewards, got {group_size}")
    groups = rewards.view(-1, group_size)
    groups = groups - groups[:, :1]  # equal rewards are 0 now, exactly, however large
    centred = groups - groups.mean(1, keepdim=True)
    if scale:
        std = (centred.square().sum(1, keepdim=True) / max(group_size - 1, 1)).sqrt()
        centred = torch.where(centred == 0, centred, centred / (std + eps))
    return centred.reshape(-1)


def grpo_loss(
    logp: torch.Tensor, old_logp: torch.Tensor | None, advantages: torch.Tensor, mask: torch.Tensor,
    reference_logp: torch.Tensor | None = None, beta: float = 0.0, clip_low: float = 0.2, clip_high: float = 0.2,
    reduction: str = "dapo", max_length: int | None = None, num_tokens: float | torch.Tensor | None = None,
) -> PolicyLoss:  # fmt: skip
    """Of each token l = −min(ρA, clip(ρ, 1 − clip_low, 1 + clip_high) A) + beta · k3(policy ‖ reference), averaged:

    - 'grpo': the mean over answers of the mean over their tokens; an empty answer counts as a 0,
    - 'bnpo': the mean over the tokens of this batch,
    - 'dr_grpo': Σ l / (B · max_length); an empty answer counts in B,
    - 'dapo': Σ l / num_tokens, the tokens of all batches of this optimizer step (and of all processes, divided by how
      many there are), so that every token weighs the same; None: of this batch, as 'bnpo'.

    Args:
        logp: [B, T], floating point, of the policy that is trained.
        old_logp: [B, T], of the policy that drew the tokens; None where that is this very policy: ρ = 1, with its
            gradient. A constant.
        advantages: [B], or [B, T]; constants.
        mask: [B, T] bool. An empty answer has no gradient.
        reference_logp: [B, T], a constant; needed where beta > 0.
        num_tokens: a number or a tensor []; less than 1 counts as 1.

    Returns: float32 (float64 for float64). See clipped_surrogate and kl_estimate for extreme ratios.

    Raises:
        TypeError: tensors that are not floating point, a mask that is not bool.
        ValueError: shapes that differ, an unknown reduction, a negative beta or clip, clip_low > 1, beta > 0 without
            reference_logp, 'dr_grpo' without max_length >= 1.

    Source: Shao et al., "DeepSeekMath", 2024, equation 3; Liu et al., "Understanding R1-Zero-Like Training", 2025,
    section 3.2 (dr_grpo); Yu et al., "DAPO", 2025, equations 8 and 12; bnpo, defaults: TRL 1.16.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_number("beta", beta, 0.0)
    check_probability("clip_low", clip_low)
    check_number("clip_high", clip_high, 0.0)
    if reduction == "dr_grpo":
        if max_length is None:
            raise ValueError("reduction 'dr_grpo' needs max_length, the longest completion that is generated")
        check_count("max_length", max_length)
    if beta > 0 and reference_logp is None:
        raise ValueError(f"beta={beta} needs reference_logp")
    tensors = {"logp": logp, "old_logp": old_logp, "reference_logp": reference_logp if beta else None}
    logp, *others = aligned("[B, T]", **{name: t for name, t in tensors.items() if t is not None})
    check_bool("mask", mask, logp, "logp")
    logp, *others = (masked(t, mask) for t in (logp, *(t.detach() for t in others)))
    old_logp = logp.detach() if old_logp is None else others.pop(0)
    advantages = masked(_per_token(advantages, logp), mask)
    losses, clipped = clipped_surrogate(logp, old_logp, advantages, clip_low, clip_high)
    reference_kl = None
    if beta:
        kl = kl_estimate(logp, others[0], "k3")
        losses, reference_kl = losses + beta * kl, masked_mean(kl.detach(), mask)
    loss = _reduced(losses, mask, reduction, max_length, num_tokens)
    return PolicyLoss(loss, *policy_drift(logp, old_logp, clipped, mask), reference_kl)


def _per_token(advantages: torch.Tensor, logp: torch.Tensor) -> torch.Tensor:
    """Advantages [B] or [B, T] as [B, T]."""
    if isinstance(advantages, torch.Tensor) and advantages.dim() == 2:
        return aligned("[B, T]", logp=logp, advantages=advantages)[1].detach()
    (advantages,) = aligned("[B]", advantages=advantages)
    if advantages.shape != logp.shape[:1]:
        raise ValueError(
            f"advantages must be [{logp.shape[0]}] to fit logp {tuple(logp.shape)}, got {tuple(advantages.shape)}"
        )
    return advantages.detach()[:, None].expand_as(logp)


def _reduced(
    losses: torch.Tensor, mask: torch.Tensor, reduction: str, max_length: int | None,
    num_tokens: float | torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    if reduction == "grpo":
        return batch_mean(masked_mean(losses, mask, -1))
    if reduction == "bnpo" or (reduction == "dapo" and num_tokens is None):
        return masked_mean(losses, mask)
    total = masked_sum(losses, mask, None)
    if reduction == "dr_grpo":
        assert max_length is not None
        return total / max(losses.shape[0] * max_length, 1)
    if isinstance(num_tokens, torch.Tensor):
        return total / num_tokens.clamp(min=1)
    assert num_tokens is not None
    check_positive("num_tokens", num_tokens)
    return total / max(num_tokens, 1)
