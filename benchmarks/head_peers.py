"""Contenders for log-probabilities over a vocabulary: `build(hidden [M, K], head, targets [M]) -> logp [M]`, and
`cross entropy`, which is a mean, for peers that have nothing else.

head: weight [V, K], and lora_A [r, K], lora_B [V, r] or None for both.
"""

from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from benchmarks.peers import _needs
from peft_ops.ops import linear_logprob

CHUNK = 256  # tokens: the fastest of 128 to 1024 on two cores, or within noise of it


class Head(NamedTuple):
    weight: torch.Tensor
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None


def ours(hidden: torch.Tensor, head: Head, targets: torch.Tensor) -> torch.Tensor:
    return linear_logprob(hidden, head.weight, None, targets, head.a, head.b).logp


def logits(hidden: torch.Tensor, head: Head, targets: torch.Tensor) -> torch.Tensor:
    """All of them at once, softmax in float32."""
    z = hidden @ head.weight.t()
    if head.a is not None and head.b is not None:
        z = z + ((hidden.to(head.a.dtype) @ head.a.t()) @ head.b.t()).to(z.dtype)
    return torch.log_softmax(z.float(), -1).gather(-1, targets[:, None])[:, 0]


def chunked(hidden: torch.Tensor, head: Head, targets: torch.Tensor) -> torch.Tensor:
    """CHUNK tokens at a time, under checkpointing where there is a backward."""
    parts = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([logits(h, head, t) for h, t in parts])
    return torch.cat([checkpoint(logits, h, head, t, use_reentrant=False) for h, t in parts])


def trl(hidden: torch.Tensor, head: Head, targets: torch.Tensor) -> torch.Tensor:
    """TRL 1.16's fused head at its own chunk size; it knows no adapter."""
    utils = _needs("trl.trainer.utils")
    chunk = utils._CHUNKED_LOGPROB_CHUNK_SIZE
    arguments = hidden, head.weight, None, targets, 1.0, chunk, None, 1.0, ("log_probs",)
    return utils._ChunkedLogProbFunction.apply(*arguments)[0]


LOGPROB = {"peft-ops": ours, "chunked torch": chunked, "logits": logits, "TRL": trl}


def ours_loss(hidden, head, targets):
    return -ours(hidden, head, targets).mean()


def logits_loss(hidden, head, targets):
    return torch.nn.functional.cross_entropy((hidden @ head.weight.t()).float(), targets)


def liger_loss(hidden, head, targets):
    loss = _needs("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    return loss(head.weight, hidden, targets)


def cut_cross_entropy_loss(hidden, head, targets):
    return _needs("cut_cross_entropy").linear_cross_entropy(hidden, head.weight, targets)


CROSS_ENTROPY = {
    "peft-ops": ours_loss, "logits": logits_loss, "Liger": liger_loss, "cut-cross-entropy": cut_cross_entropy_loss,
}  # fmt: skip
