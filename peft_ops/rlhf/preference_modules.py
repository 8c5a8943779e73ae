"""Losses on preferences as modules: hidden states and a head in, the loss of the functions out."""

from __future__ import annotations

import torch
from torch import nn

from ..nn import Head
from .dpo import PreferenceLoss, dpo_loss
from .head_log_probs import completion_log_probs, halves
from .kto import UnpairedLoss, kto_kl, kto_loss
from .loss_module import LossModule
from .masked import masked_mean, masked_sum
from .orpo import orpo_loss
from .reward import reward_loss
from .simpo import simpo_loss


class RewardLoss(LossModule):
    """reward_loss of the scores at the last token of each answer."""

    def __init__(self, centering: float = 0.0) -> None:
        super().__init__()
        self.centering = centering

    def forward(
        self, score: nn.Module, hidden: torch.Tensor, mask: torch.Tensor, margin: torch.Tensor | None = None
    ) -> PreferenceLoss:
        """
        Args:
            score: what makes [2B, 1] of hidden states [2B, K], such as the `score` of LlamaForSequenceClassification.
            hidden: [2B, T, K], the chosen answers, then the rejected ones.
            mask: [2B, T] bool, True on tokens that are no padding; of an empty row the first hidden state is scored.
            margin: [B], see reward_loss.
        """
        if hidden.dim() != 3 or mask.shape != hidden.shape[:2]:
            raise ValueError(f"mask must be [2B, T] to fit hidden {tuple(hidden.shape)}, got {tuple(mask.shape)}")
        place = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
        last = torch.where(mask, place, 0).amax(1)
        rewards = score(hidden[torch.arange(hidden.shape[0], device=hidden.device), last]).squeeze(-1)
        chosen, rejected = halves(rewards, "hidden")
        loss = reward_loss(chosen, rejected, margin, self.centering)
        return PreferenceLoss(loss, chosen.detach().to(loss.dtype), rejected.detach().to(loss.dtype))


class DPOLoss(LossModule):
    """dpo_loss; 'ipo' averages over tokens."""

    def __init__(self, beta: float = 0.1, loss_type: str = "sigmoid", label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.beta, self.loss_type, self.label_smoothing = beta, loss_type, label_smoothing

    def forward(
        self, head: Head, hidden: torch.Tensor, targets: torch.Tensor, reference_hidden: torch.Tensor | None = None,
        reference_logp: torch.Tensor | None = None,
    ) -> PreferenceLoss:  # fmt: skip
        """Rows [2B, ...] are the chosen answers, then the rejected ones; arguments as of completion_log_probs."""
        logp, mask, reference = completion_log_probs(head, hidden, targets, reference_hidden, reference_logp, True)
        assert reference is not None
        policy, fixed = halves(masked_sum(logp, mask), "hidden"), halves(masked_sum(reference, mask), "hidden")
        lengths = halves(mask.sum(1), "hidden")
        return dpo_loss(*policy, *fixed, self.beta, self.loss_type, self.label_smoothing, *lengths)


class KTOLoss(LossModule):
    """kto_loss."""

    def __init__(self, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> None:
        super().__init__()
        self.beta, self.desirable_weight, self.undesirable_weight = beta, desirable_weight, undesirable_weight

    def forward(
        self, head: Head, hidden: torch.Tensor, targets: torch.Tensor, desirable: torch.Tensor, kl: torch.Tensor,
        reference_hidden: torch.Tensor | None = None, reference_logp: torch.Tensor | None = None,
    ) -> UnpairedLoss:  # fmt: skip
        """Arguments as of completion_log_probs and kto_loss."""
        logp, mask, reference = completion_log_probs(head, hidden, targets, reference_hidden, reference_logp, True)
        assert reference is not None
        policy, fixed = masked_sum(logp, mask), masked_sum(reference, mask)
        return kto_loss(policy, fixed, desirable, kl, self.beta, self.desirable_weight, self.undesirable_weight)

    @torch.no_grad()
    def kl(
        self, head: Head, hidden: torch.Tensor, targets: torch.Tensor, reference_hidden: torch.Tensor | None = None,
        reference_logp: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """kto_kl of answers to other prompts: hidden states and targets of mismatched pairs."""
        logp, mask, reference = completion_log_probs(head, hidden, targets, reference_hidden, reference_logp, True)
        assert reference is not None
        return kto_kl(masked_sum(logp, mask), masked_sum(reference, mask))


class ORPOLoss(LossModule):
    """orpo_loss; the likelihood is the mean over the tokens of all chosen answers."""

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> PreferenceLoss:
        """Rows [2B, ...] are the chosen answers, then the rejected ones; arguments as of completion_log_probs."""
        logp, mask, _ = completion_log_probs(head, hidden, targets)
        nll = -masked_mean(halves(logp, "hidden")[0], halves(mask, "hidden")[0])
        return orpo_loss(*halves(masked_mean(logp, mask, -1), "hidden"), nll, self.beta)


class SimPOLoss(LossModule):
    """simpo_loss."""

    def __init__(self, beta: float = 2.0, gamma: float = 0.5, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.beta, self.gamma, self.label_smoothing = beta, gamma, label_smoothing

    def forward(self, head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> PreferenceLoss:
        """Rows [2B, ...] are the chosen answers, then the rejected ones; arguments as of completion_log_probs."""
        logp, mask, _ = completion_log_probs(head, hidden, targets)
        means = halves(masked_mean(logp, mask, -1), "hidden")
        return simpo_loss(*means, self.beta, self.gamma, self.label_smoothing)
