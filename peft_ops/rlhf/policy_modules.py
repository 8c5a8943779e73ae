"""Losses of policy optimisation as modules: hidden states and a head in, the loss of the functions out."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..nn import Head
from ._arguments import check_number
from .clipping import PolicyLoss
from .grpo import grpo_loss
from .head_log_probs import completion_log_probs
from .loss_module import LossModule
from .ppo import ppo_policy_loss, ppo_value_loss


class ActorCriticLoss(NamedTuple):
    """loss [] = policy.loss + vf_coef · value_loss to run backward from; value_loss [] without gradient."""

    loss: torch.Tensor
    policy: PolicyLoss
    value_loss: torch.Tensor


class GRPOLoss(LossModule):
    """grpo_loss. temperature: the one that the tokens were drawn at."""

    def __init__(
        self, beta: float = 0.0, clip_low: float = 0.2, clip_high: float = 0.2, reduction: str = "dapo",
        max_length: int | None = None, temperature: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.beta, self.clip_low, self.clip_high = beta, clip_low, clip_high
        self.reduction, self.max_length, self.temperature = reduction, max_length, temperature

    def forward(
        self, head: Head, hidden: torch.Tensor, targets: torch.Tensor, advantages: torch.Tensor,
        old_logp: torch.Tensor | None = None, reference_hidden: torch.Tensor | None = None,
        reference_logp: torch.Tensor | None = None, num_tokens: float | torch.Tensor | None = None,
    ) -> PolicyLoss:  # fmt: skip
        """Arguments as of completion_log_probs and grpo_loss; a reference is needed where beta > 0."""
        logp, mask, reference = completion_log_probs(
            head, hidden, targets, reference_hidden, reference_logp, self.beta > 0, self.temperature
        )
        return grpo_loss(
            logp, old_logp, advantages, mask, reference, self.beta, self.clip_low, self.clip_high, self.reduction,
            self.max_length, num_tokens,
        )  # fmt: skip


class PPOLoss(LossModule):
    """ppo_policy_loss + vf_coef · ppo_value_loss. temperature: the one that the tokens were drawn at."""

    def __init__(
        self, clip: float = 0.2, value_clip: float | None = 0.2, vf_coef: float = 0.1, temperature: float = 1.0
    ) -> None:
        super().__init__()
        check_number("vf_coef", vf_coef, 0.0)
        self.clip, self.value_clip, self.vf_coef, self.temperature = clip, value_clip, vf_coef, temperature

    def forward(
        self, head: Head, hidden: torch.Tensor, targets: torch.Tensor, values: torch.Tensor, old_logp: torch.Tensor,
        old_values: torch.Tensor, advantages: torch.Tensor, returns: torch.Tensor,
    ) -> ActorCriticLoss:  # fmt: skip
        """Arguments as of completion_log_probs, ppo_policy_loss and ppo_value_loss."""
        logp, mask, _ = completion_log_probs(head, hidden, targets, temperature=self.temperature)
        policy = ppo_policy_loss(logp, old_logp, advantages, mask, self.clip)
        value = ppo_value_loss(values, old_values, returns, mask, self.value_clip)
        return ActorCriticLoss(policy.loss + self.vf_coef * value, policy, value.detach())
