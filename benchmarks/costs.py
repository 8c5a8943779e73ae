"""The least that an op must do: floating-point operations, and bytes through memory (each operand once).

The budget's floors: x [M, K], weight [N, K], rank R, elements of 2 bytes, float32 adapters. Forward M K + M N + N K
elements, backward 2 M K + 2 M N + N K; what a contender does beyond them is its own.
"""

from typing import NamedTuple

from benchmarks.peers import BLOCKSIZE, BOTTLENECK, R
from benchmarks.shapes import Attention, Shape, Step

HALF = 2  # bytes of a 16-bit element
NF4 = 0.5 + (1 + 4 / 256) / BLOCKSIZE  # bytes of a weight with nested scales
NF4_PLAIN = 0.5 + 4 / BLOCKSIZE


class Cost(NamedTuple):
    flops: float
    least_bytes: float

    def __add__(self, other: "Cost") -> "Cost":  # type: ignore[override]
        return Cost(self.flops + other.flops, self.least_bytes + other.least_bytes)


def cost(op: str, shape: Shape | Attention | Step, variant: str = "") -> Cost | None:
    """Of an op by the name that the report gives it; None where bytes say nothing."""
    name, backward = op.removesuffix(" forward").removesuffix(" forward + backward"), op.endswith("backward")
    if isinstance(shape, Step):
        return None
    if isinstance(shape, Attention):
        return _attention(shape, backward)
    M, N, K = shape
    match name:
        case "lora_linear":
            return _lora(M, N, K, HALF, backward)
        case "qlora_linear":
            return _lora(M, N, K, NF4, backward)
        case "dora_linear":  # W once more, for its norms with B A
            return _lora(M, N, K, HALF, backward) + Cost(2 * N * K * R, HALF * N * K)
        case "nf4_linear":
            return _frozen(M, N, K, NF4, backward)
        case "nf4 quantize" | "nf4 dequantize" | "nf4 dequantize into out":
            return Cost(N * K, N * K * (HALF + (NF4 if variant == "nested" else NF4_PLAIN)))
        case "bottleneck_adapter":
            return _adapter(M, K, backward)
        case "gated_mlp":  # x, y, dy, x again, dx: what lies between the projections need not leave the chip
            between = Cost(0, -HALF * M * (4 * K + 9 * N if backward else K + 3 * N))
            return between + sum((_lora(M, *nk, HALF, backward) for nk in ((N, K), (N, K), (K, N))), Cost(0, 0))
        case "qkv projections":
            shared = Cost(0, -HALF * M * K * (2 * 3 if backward else 2))
            return shared + sum((_lora(M, n, K, HALF, backward) for n in (K, N, N)), Cost(0, 0))
        case "linear_logprob" | "linear_cross_entropy":
            return _head(M, N, K, backward, variant)
    return None


def _frozen(M: int, N: int, K: int, weight: float, backward: bool) -> Cost:
    """Forward, and dx = dy W."""
    calls = 2 if backward else 1
    return Cost(2 * M * N * K * calls, calls * (HALF * M * (N + K) + weight * N * K))


def _lora(M: int, N: int, K: int, weight: float, backward: bool) -> Cost:
    """Forward 2 M N K + 2 M R (N + K); backward 2 M N K + 4 M R (N + K), x read once more and dy for dS with dB."""
    adapter = 4 * R * (N + K)
    low_rank = Cost(2 * M * R * (N + K) * (3 if backward else 1), adapter * (3 if backward else 1))
    again = Cost(0, HALF * M * (N + K) if backward else 0)
    return _frozen(M, N, K, weight, backward) + low_rank + again


def _adapter(M: int, d: int, backward: bool) -> Cost:
    parameters = 4 * 2 * d * BOTTLENECK
    forward = Cost(4 * M * d * BOTTLENECK, HALF * 2 * M * d + parameters)
    return forward + Cost(8 * M * d * BOTTLENECK, HALF * 3 * M * d + 2 * parameters) if backward else forward


def _attention(s: Attention, backward: bool) -> Cost:
    """Training is causal: half of the text's scores. Its backward takes five products for the forward's two."""
    keys = s.n + (s.N / 2 if s.M > 1 else s.N)
    flops = 4 * s.B * s.H * s.M * keys * s.K
    tensors = HALF * s.B * s.K * (2 * s.H * s.M + 2 * s.heads * s.N) + 4 * 2 * s.heads * s.n * s.K
    return Cost(3.5 * flops, 3 * tensors) if backward else Cost(flops, tensors)


def _head(M: int, N: int, K: int, backward: bool, variant: str) -> Cost:
    """Two products with a frozen weight, the second for dh; a third for a trained one. No logits in memory."""
    products = 1 + backward + variant.startswith("trained")
    gradients = HALF * N * K if variant.startswith("trained") else 0
    return Cost(2 * M * N * K * products, (1 + backward) * HALF * (N * K + M * K) + gradients)
