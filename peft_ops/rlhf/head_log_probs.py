"""Log-probs of completion tokens from hidden states, the policy's and the reference's in one pass of the head."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..nn import Head

IGNORED = -100


class CompletionLogProbs(NamedTuple):
    """logp [B, T], mask [B, T] bool, and reference_logp [B, T] or None."""

    logp: torch.Tensor
    mask: torch.Tensor
    reference_logp: torch.Tensor | None


def completion_log_probs(
    head: Head, hidden: torch.Tensor, targets: torch.Tensor, reference_hidden: torch.Tensor | None = None,
    reference_logp: torch.Tensor | None = None, needs_reference: bool = False, temperature: float = 1.0,
) -> CompletionLogProbs:  # fmt: skip
    """Of targets under the head, without [tokens, vocabulary] logits in memory.

    Args:
        head: see nn.head_of; read it again after every change of the model.
        hidden: [B, T, K], the last hidden states; gradients flow into them and the head.
        targets: [B, T] int64, the token after each; -100 for what is no token of the completion.
        reference_hidden: [B, T, K], the reference's; its head is this one without the adapter.
        reference_logp: [B, T], instead: where the reference has another head, or its log-probs were computed before.

    Raises:
        TypeError: head is no Head, targets are not integers.
        ValueError: shapes that do not fit, both of reference_hidden and reference_logp, or neither of them where
            needs_reference.
    """
    if not isinstance(head, Head):
        raise TypeError(f"head must be a peft_ops.nn.Head (see head_of), got {type(head).__name__}")
    if not isinstance(targets, torch.Tensor) or targets.dtype != torch.int64:
        raise TypeError(f"targets must be an int64 tensor, got {getattr(targets, 'dtype', type(targets).__name__)}")
    for name, states in (("hidden", hidden), ("reference_hidden", reference_hidden)):
        if states is not None and (states.dim() != 3 or states.shape[:2] != targets.shape):
            raise ValueError(
                f"{name} must be [B, T, K] to fit targets {tuple(targets.shape)}, got {tuple(states.shape)}"
            )
    if reference_hidden is not None and reference_logp is not None:
        raise ValueError(
            "reference_hidden and reference_logp are two ways to give the reference: only one can be given"
        )
    if needs_reference and reference_hidden is None and reference_logp is None:
        raise ValueError("reference_hidden or reference_logp must be given")
    out = head.log_probs(hidden, targets, temperature, IGNORED, reference_hidden=reference_hidden)
    reference = out.reference if reference_logp is None else reference_logp
    return CompletionLogProbs(out.logp, targets != IGNORED, reference)


def halves(tensor: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(chosen, rejected) of a tensor [2B, ...] that has the chosen rows first."""
    if tensor.shape[0] % 2:
        raise ValueError(f"{name} must have as many chosen rows as rejected ones, got {tensor.shape[0]} in all")
    chosen, rejected = tensor.chunk(2)
    return chosen, rejected
