"""How low-rank factors start from the weight that they are to be trained over: PiSSA and LoftQ."""

import re

import torch

from .. import nf4
from ..nf4 import NF4Weight

Factors = tuple[torch.Tensor, torch.Tensor]  # A [r, K], B [N, r]


def pissa_iterations(init: bool | str) -> int | None:
    """The number in 'pissa_niter_[number]'; 0 for 'pissa', which decomposes exactly; None for anything else."""
    match = re.fullmatch(r"pissa(?:_niter_(\d+))?", init) if isinstance(init, str) else None
    return None if match is None else int(match[1] or 0)


@torch.no_grad()
def principal_factors(w: torch.Tensor, r: int, scaling: float, iterations: int = 0) -> Factors:
    """A, B with scaling · B A the best approximation of w [N, K] of rank r, singular values shared between them.

    iterations: 0 decomposes exactly; else so many of a randomised subspace iteration (Halko et al., 2011).
    Ranks beyond min(N, K) are zero. float32 (float64 where w is).

    Source: Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation", 2024, section 3.
    """
    w = w.to(torch.promote_types(w.dtype, torch.float32))
    n, k = w.shape
    rank = min(r, n, k)
    if iterations:
        u, s, v = torch.svd_lowrank(w, rank, niter=iterations)
        vh = v.t()
    else:
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
    root = (s[:rank] / scaling).sqrt()
    a, b = w.new_zeros(r, k), w.new_zeros(n, r)
    a[:rank], b[:, :rank] = root[:, None] * vh[:rank], u[:, :rank] * root
    return a, b


@torch.no_grad()
def loftq(
    w: torch.Tensor, r: int, scaling: float, iterations: int, blocksize: int, double_quant: bool
) -> tuple[NF4Weight, torch.Tensor, torch.Tensor]:
    """(Q in NF4, A, B) with Q + scaling · B A close to w [N, K]: by turns Q from w - scaling · B A, A and B from w - Q.

    Source: Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", 2023, algorithm 1. (That
    of PEFT ignores the scaling: its sum is close to w where lora_alpha = r alone.)
    """
    wide = w.float()
    rest = wide
    for _ in range(iterations):
        weight = nf4.quantize(rest, blocksize, double_quant)
        a, b = principal_factors(wide - nf4.dequantize(weight, torch.float32), r, scaling)
        rest = wide - scaling * (b @ a)
    return weight, a, b
