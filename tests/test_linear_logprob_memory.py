"""What linear_logprob allocates on a CPU does not grow with the vocabulary."""

import pytest
import torch

from peft_ops.cli.memory import CPUMemory
from test_linear_logprob import HEADS, call, linear_logprob, problem


def peak(V, head, base):
    """Bytes at most alive, gradients of the head left out."""
    leaves, targets = problem(M=200, K=128, V=V, head=head, base=base)
    with CPUMemory() as memory:
        call(linear_logprob, leaves, targets)[0].sum().backward()
    return memory.peak - sum(
        t.nbytes for n, t in leaves.items() if n in HEADS[head] and isinstance(t, torch.Tensor)
    )  # fmt: skip


@pytest.mark.unpoisoned
@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("head", HEADS)
def test_memory_does_not_grow_with_the_vocabulary(head, base):
    """16,384 more columns are 13 MB of logits; lora_b's gradient may be there twice."""
    spare = 2 * 16_384 * 3 * 4 if head in ("LoRA", "all") else 0
    assert peak(40_960, head, base) < peak(24_576, head, base) + spare + 500_000
