"""The shapes measured: M rows of x against a weight [N, K], attention, blocks of a Llama."""

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


class Step(NamedTuple):
    """A training step of M tokens in sequences of `length`: hidden size K, MLP N, `layers` of `heads`, `kv` of keys."""

    M: int
    N: int
    K: int
    length: int
    layers: int
    heads: int
    kv: int
    vocabulary: int
    method: str
    p: float
    checkpointed: bool

    def __str__(self) -> str:
        return f"{self.M}-{self.N}x{self.K}-{self.variant}"

    @property
    def variant(self) -> str:
        checkpointed = ", checkpointed" if self.checkpointed else ""
        return f"{self.method}, p={self.p}, length {self.length}{checkpointed}"


class Attention(NamedTuple):
    """B batch rows of M queries against N keys of K, `heads` of them for H heads of query, beside a prefix of n, or
    none."""

    M: int
    N: int
    K: int
    B: int
    H: int
    heads: int
    n: int

    def __str__(self) -> str:
        return f"{self.M}-{self.N}x{self.K}-{self.variant}"

    @property
    def variant(self) -> str:
        return f"B={self.B} heads={self.H}/{self.heads}" + (f" n={self.n}" if self.n else "")


def attention_shapes(tiny: bool) -> list[Attention]:
    """Of training: GPT-2's heads and Llama's."""
    if tiny:
        return [Attention(8, 8, 16, 1, 2, 1, 3)]
    if not ON_GPU:
        return [Attention(512, 512, 64, 2, 12, 12, n) for n in (5, 50)] + [Attention(512, 512, 128, 1, 16, 4, 100)]
    gpt2 = [Attention(1024, 1024, 64, 8, 16, 16, n) for n in (5, 50)]
    return gpt2 + [Attention(2048, 2048, 128, 4, 32, 8, n) for n in (20, 50, 200)]


def self_attention_shapes(tiny: bool) -> list[Attention]:
    """Of training without a prefix, on a CPU: on a GPU it is torch's own. A Llama's heads first."""
    if ON_GPU:
        return []
    if tiny:
        return [Attention(8, 8, 16, 1, 2, 1, 0)]
    cases = ((128, 32, 32, 8, 2), (128, 128, 8, 8, 2), (512, 64, 4, 8, 8), (2048, 64, 1, 8, 8))
    return [Attention(T, T, D, B, H, heads, 0) for T, D, B, H, heads in cases]


def decoding_shapes(tiny: bool) -> list[Attention]:
    """Of one new token against a cache."""
    return [shape._replace(M=1, B=4 if tiny else 32 if ON_GPU else 8) for shape in attention_shapes(tiny)]


def linear_shapes(tiny: bool) -> list[Shape]:
    """Of x [M, K] and weight [N, K]; `tiny` is one shape that takes no time."""
    if tiny:
        return [Shape(8, *TINY)]
    if not ON_GPU:
        return [Shape(m, *ON_CPU) for m in (1, 16, 1024)]
    full = [Shape(m, *SQUARE) for m in (1, 4, 16, 64, 512, 2048, 8192, 16384)]
    return full + [Shape(m, *nk) for nk, m in product(OF_MODELS, (1, 16, 512, 8192))]


def nf4_shapes(tiny: bool) -> list[Shape]:
    """Of x and a 4-bit weight without adapter."""
    return linear_shapes(tiny) if tiny or ON_GPU else [Shape(m, *SQUARE) for m in (1, 16, 256, 1024)]


def few_rows_shapes(tiny: bool) -> list[Shape]:
    """Of the same in training mode, on a CPU: on a GPU the mode changes nothing."""
    return [] if ON_GPU else [shape for shape in nf4_shapes(tiny) if shape.M <= 256]


def adapter_shapes(tiny: bool) -> list[Shape]:
    """Of x [M, d] and an adapter on it: d of BERT-base and -large, and of a 7B model."""
    if tiny:
        return [Shape(8, 128, 128)]
    widths, rows = ((768, 1024, 4096), (1, 128, 1024, 8192)) if ON_GPU else ((768,), (1, 16, 1024, 4096))
    return [Shape(m, d, d) for d, m in product(widths, rows)]


def head_shapes(tiny: bool) -> list[Shape]:
    """Of an output head: M tokens, a vocabulary of N; Qwen's, Llama 3's and Gemma's on a GPU."""
    if tiny:
        return [Shape(8, 300, 32)]
    if not ON_GPU:
        return [Shape(1024, 32768, 512)]
    return [Shape(8192, 151936, 4096), Shape(8192, 128256, 4096), Shape(8192, 256000, 2304), Shape(512, 151936, 4096)]


def large_head_shapes(tiny: bool) -> list[Shape]:
    """Logits of gigabytes, on a CPU; a GPU's shapes are as large."""
    return [] if ON_GPU else [Shape(8, 300, 32) if tiny else Shape(4096, 131072, 256)]


def weight_shapes(tiny: bool) -> list[Shape]:
    """Of a weight alone: M = 0."""
    return [Shape(0, *nk) for nk in ((TINY,) if tiny else (SQUARE, *OF_MODELS) if ON_GPU else (SQUARE,))]


def mlp_shapes(tiny: bool) -> list[Shape]:
    """Of a gated MLP: M rows, N features inside, K outside; Llama 3's 8B and 70B on a GPU."""
    if tiny:
        return [Shape(8, *TINY)]
    if not ON_GPU:
        return [Shape(m, 1792, 512) for m in (16, 1024)]
    return [*(Shape(m, 14336, 4096) for m in (16, 512, 2048, 8192)), Shape(2048, 28672, 8192)]


def qkv_shapes(tiny: bool) -> list[Shape]:
    """Of query, key and value of one x: K features, N of the keys and of the values; the query has K."""
    if tiny:
        return [Shape(8, 64, 128)]
    if not ON_GPU:
        return [Shape(m, 256, 1024) for m in (16, 1024)]
    return [*(Shape(m, 1024, 4096) for m in (16, 512, 2048, 8192)), Shape(2048, 1024, 8192)]


def step_shapes(tiny: bool) -> list[Step]:
    """Llama 3's 8B with four of its layers, 8192 tokens a step; on a CPU a narrow and a wide model of its MLP's
    proportions, of four and of two layers."""
    if tiny:
        return [Step(16, 48, 32, 8, 2, 4, 2, 64, *case) for case in (("LoRA", 0.0, False), ("QLoRA", 0.1, True))]
    cases = list(product(("LoRA", "QLoRA"), (0.0, 0.1), (False, True)))
    if not ON_GPU:
        models = ((4096, 256, 4), (1024, 1024, 2))
        return [
            Step(m, d * 7 // 2, d, 128, layers, 8, 2, 2048, *case)
            for m, d, layers in models for case in cases if not case[-1]
        ]  # fmt: skip
    of_8b = (4, 32, 8, 128256)
    return [Step(8192, 14336, 4096, length, *of_8b, *case) for length in (2048, 8192, 512) for case in cases]
