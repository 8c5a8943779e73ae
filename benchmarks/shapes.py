"""The shapes measured: M rows of x against a weight [N, K]."""

from itertools import product
from typing import NamedTuple

import torch

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16

SQUARE = (4096, 4096)
OF_MODELS = ((14336, 4096), (4096, 14336), (1024, 4096), (28672, 8192))  # MLP up and down, GQA key, 70B MLP
ON_CPU = (2048, 2048)
TINY = (256, 128)


class Shape(NamedTuple):
    M: int
    N: int
    K: int

    def __str__(self) -> str:
        return f"{self.M}-{self.N}x{self.K}" if self.M else f"{self.N}x{self.K}"


def linear_shapes(tiny: bool) -> list[Shape]:
    """Of x [M, K] and weight [N, K]; `tiny` is one shape that takes no time."""
    if tiny:
        return [Shape(8, *TINY)]
    if not ON_GPU:
        return [Shape(m, *ON_CPU) for m in (1, 16, 1024)]
    full = [Shape(m, *SQUARE) for m in (1, 16, 128, 1024, 8192, 16384)]
    return full + [Shape(m, *nk) for nk, m in product(OF_MODELS, (1, 1024, 8192))]


def adapter_shapes(tiny: bool) -> list[Shape]:
    """Of x [M, d] and an adapter on it: d of BERT-base and -large, and of a 7B model."""
    if tiny:
        return [Shape(8, 128, 128)]
    widths, rows = ((768, 1024, 4096), (1, 128, 1024, 8192)) if ON_GPU else ((768,), (1, 16, 1024, 4096))
    return [Shape(m, d, d) for d, m in product(widths, rows)]


def weight_shapes(tiny: bool) -> list[Shape]:
    """Of a weight alone: M = 0."""
    return [Shape(0, *nk) for nk in ((TINY,) if tiny else (SQUARE, *OF_MODELS) if ON_GPU else (ON_CPU,))]
