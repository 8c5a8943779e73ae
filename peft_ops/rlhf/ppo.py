"""Proximal policy optimisation on tokens: rewards with a KL penalty, advantages, clipped policy and value losses."""

from __future__ import annotations

import torch

from ..tuning.config import check_probability
from ._arguments import aligned, check_bool, check_number, check_positive
from .clipping import PolicyLoss, clipped_surrogate, policy_drift
from .kl import kl_estimate
from .masked import masked, masked_mean


@torch.no_grad()
def kl_rewards(
    scores: torch.Tensor, logp: torch.Tensor, reference_logp: torch.Tensor, mask: torch.Tensor,
    kl_coef: float = 0.05, estimator: str = "k1",
) -> torch.Tensor:  # fmt: skip
    """−kl_coef · KL at each token of the mask, and the score of the answer added at the last of them.

    Args:
        scores: [B], floating point, of the reward model.
        logp, reference_logp: [B, T], of the policy that drew the tokens, and of the reference.
        mask: [B, T] bool.
        estimator: see kl_estimate.

    An empty answer has no token to be rewarded at: its score is lost.

    Returns: rewards [B, T], float32 (float64 for float64), 0 where not mask; without gradient.

    Raises:
        TypeError: tensors that are not floating point, a mask that is not bool.
        ValueError: shapes that differ, a negative kl_coef, an unknown estimator.

    Source: Ziegler et al., "Fine-Tuning Language Models from Human Preferences", 2019, equation 2.
    """
    check_number("kl_coef", kl_coef, 0.0)
    penalty = kl_coef * kl_estimate(logp, reference_logp, estimator, mask)
    (scores,) = aligned("[B]", scores=scores)
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"scores must be [{mask.shape[0]}] to fit logp {tuple(mask.shape)}, got {tuple(scores.shape)}")
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return masked(scores[:, None], last) - penalty


@torch.no_grad()
def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation: A_t = δ_t + γλ A_{t+1}, δ_t = r_t + γ V_{t+1} − V_t, and returns A + V.

    t + 1 is the next token of the mask, in whatever place: padding on either side and tokens in between that the policy
    did not draw (of a tool) are passed over. After the last one A and V are 0.

    Args:
        rewards, values: [B, T], floating point.
        mask: [B, T] bool.

    Returns: (advantages, returns) [B, T], float32 (float64 for float64), 0 where not mask; without gradient.

    Raises:
        TypeError: tensors that are not floating point, a mask that is not bool.
        ValueError: shapes that differ, gamma or lam outside [0, 1].

    Source: Schulman et al., "High-Dimensional Continuous Control Using GAE", 2015, equation 16.
    """
    check_probability("gamma", gamma)
    check_probability("lam", lam)
    rewards, values = aligned("[B, T]", rewards=rewards, values=values)
    check_bool("mask", mask, rewards, "rewards")
    rewards, values = masked(rewards, mask), masked(values, mask)
    advantages = torch.zeros_like(rewards + values)
    next_value = next_advantage = advantages.new_zeros(advantages.shape[0])
    for t in range(mask.shape[1] - 1, -1, -1):
        here = mask[:, t]
        advantage = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * next_advantage
        next_advantage = torch.where(here, advantage, next_advantage)
        next_value = torch.where(here, values[:, t], next_value)
        advantages[:, t] = masked(advantage, here)
    return advantages, advantages + values


def ppo_policy_loss(
    logp: torch.Tensor, old_logp: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, clip: float = 0.2
) -> PolicyLoss:
    """The mean over tokens of −min(ρA, clip(ρ, 1 − clip, 1 + clip) A), ρ = e^(logp − old_logp).

    Args:
        logp: [B, T], floating point, of the policy that is trained.
        old_logp, advantages: [B, T], from when the tokens were drawn; constants.
        mask: [B, T] bool. An empty answer has no part in the mean; 0 where no answer has a token.

    Returns: float32 (float64 for float64). See clipped_surrogate for extreme ratios.

    Raises:
        TypeError: tensors that are not floating point, a mask that is not bool.
        ValueError: shapes that differ, clip that is not positive.

    Source: Schulman et al., "PPO", 2017, equation 7.
    """
    check_positive("clip", clip)
    logp, old_logp, advantages = aligned("[B, T]", logp=logp, old_logp=old_logp, advantages=advantages)
    check_bool("mask", mask, logp, "logp")
    logp, old_logp, advantages = (masked(t, mask) for t in (logp, old_logp.detach(), advantages.detach()))
    losses, clipped = clipped_surrogate(logp, old_logp, advantages, clip, clip)
    return PolicyLoss(masked_mean(losses, mask), *policy_drift(logp, old_logp, clipped, mask))


def ppo_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, clip: float | None = 0.2
) -> torch.Tensor:
    """The mean over tokens of ½ max((V − R)², (V_old + clamp(V − V_old, −clip, clip) − R)²).

    Args:
        values: [B, T], floating point, of the value model that is trained.
        old_values, returns: [B, T], from when the tokens were drawn; constants.
        mask: [B, T] bool. An empty answer has no part in the mean; 0 where no answer has a token.
        clip: None for ½ (V − R)².

    Returns: [], float32 (float64 for float64).

    Raises:
        TypeError: tensors that are not floating point, a mask that is not bool.
        ValueError: shapes that differ, clip that is not positive.

    Source: Schulman et al., "GAE", 2015, section 5; the clip is that of OpenAI's baselines (ppo2).
    """
    if clip is not None:
        check_positive("clip", clip)
    values, old_values, returns = aligned("[B, T]", values=values, old_values=old_values, returns=returns)
    check_bool("mask", mask, values, "values")
    values, old_values, returns = (masked(t, mask) for t in (values, old_values.detach(), returns.detach()))
    losses = (values - returns).square()
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        losses = torch.maximum(losses, (near - returns).square())
    return masked_mean(losses, mask) / 2
