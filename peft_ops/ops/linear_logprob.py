"""log softmax(head(hidden)) of chosen tokens, and cross-entropy, without the [tokens, vocabulary] logits."""

from typing import NamedTuple

import torch

from ..nf4 import NF4Weight
from ..reference import formulas


class TokenLogProbs(NamedTuple):
    """Of every token, in the shape of targets, float32 (float64 for float64); 0 where the target is ignored.

    entropy and reference are None where they were not asked for.
    """

    logp: torch.Tensor
    entropy: torch.Tensor | None = None
    reference: torch.Tensor | None = None


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor | NF4Weight,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    lora_a: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
    reference_hidden: torch.Tensor | None = None,
) -> TokenLogProbs:
    """Stand-in; see the next commit."""
    flat, t = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    logp, h = formulas.linear_logprob(
        flat, weight, bias, lora_a, lora_b, t, scaling, 0.0, None, logit_scale, softcap, temperature, ignore_index
    )
    reference = None
    if reference_hidden is not None:
        with torch.no_grad():
            reference, _ = formulas.linear_logprob(
                reference_hidden.reshape(flat.shape), weight, bias, None, None, t, scaling, 0.0, None, logit_scale,
                softcap, temperature, ignore_index,
            )  # fmt: skip
        reference = reference.view(targets.shape)
    return TokenLogProbs(logp.view(targets.shape), h.view(targets.shape) if entropy else None, reference)
