"""What trainers log about the logits beside log-probabilities: a pass of the head without gradients, in pieces."""

import torch

from ..nf4 import NF4Weight
from ..nn import Head
from ..ops import lora_linear, nf4_linear

STATISTICS = ("mean_logits", "is_top1", "log_sum_sq_probs")
_LOGITS = 2**24  # float32, at a time: 64 MiB


@torch.no_grad()
def head_statistics(
    head: Head, hidden: torch.Tensor, targets: torch.Tensor, temperature: float, names: tuple[str, ...]
) -> dict[str, torch.Tensor]:
    """{name: [M]} of z = logits / temperature, for those of STATISTICS that are in `names`; hidden [M, K], targets [M].

    mean_logits: the mean of z over the vocabulary. is_top1: whether the target has the largest z (bool).
    log_sum_sq_probs: log Σ softmax(z)². The adapter's dropout is left out.
    """
    rows = max(1, _LOGITS // head.weight.shape[0])
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in STATISTICS if name in names}
    for h, t in zip(hidden.split(rows), targets.split(rows), strict=True) if parts else ():
        z = _logits(head, h) / temperature
        if "mean_logits" in parts:
            parts["mean_logits"].append(z.mean(-1))
        if "is_top1" in parts:
            parts["is_top1"].append(z.argmax(-1) == t)
        if "log_sum_sq_probs" in parts:
            parts["log_sum_sq_probs"].append((2 * z).logsumexp(-1) - 2 * z.logsumexp(-1))
    return {name: torch.cat(values) for name, values in parts.items()}


def _logits(head: Head, x: torch.Tensor) -> torch.Tensor:
    if head.lora_a is not None and head.lora_b is not None:
        z = lora_linear(x, head.weight, head.bias, head.lora_a, head.lora_b, head.scaling)
    elif isinstance(head.weight, NF4Weight):
        z = nf4_linear(x, head.weight, head.bias)
    else:
        z = torch.nn.functional.linear(x, head.weight, head.bias)
    z = z.to(torch.promote_types(z.dtype, torch.float32)) * head.logit_scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
