"""The loss of a reward model: of two answers the chosen one has the higher reward (Bradley-Terry)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._arguments import aligned, check_number
from .masked import batch_mean


def reward_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, margin: torch.Tensor | None = None, centering: float = 0.0
) -> torch.Tensor:
    """mean(−log σ(chosen − rejected − margin)) + centering · mean((chosen + rejected)²).

    Args:
        chosen, rejected: [B], floating point, rewards of the two answers.
        margin: [B], by how much the chosen one is better, in units of the reward; a constant.
        centering: weight of the term that holds rewards near 0.

    Returns: [], float32 (float64 for float64); 0 for an empty batch.

    Raises:
        TypeError: tensors that are not floating point.
        ValueError: shapes that differ, a negative centering.

    Source: Ouyang et al., "InstructGPT", 2022, equation 1; margin: Touvron et al., "Llama 2", 2023, equation 2;
    centering: Eisenstein et al., "Helping or Herding?", 2023, equation 2.
    """
    check_number("centering", centering, 0.0)
    chosen, rejected = aligned("[B]", chosen=chosen, rejected=rejected)
    difference = chosen - rejected
    if margin is not None:
        difference = difference - aligned("[B]", chosen=chosen, margin=margin)[1].detach()
    loss = batch_mean(-F.logsigmoid(difference))
    return loss + centering * batch_mean((chosen + rejected).square()) if centering else loss
