"""Tiles of logits, in registers, and how the launches that make them pass a head."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import configs
from .activations import _tanh
from .nf4_linear import _decoded_slabs
from .tiles import low_rank_tile


@triton.jit
def logits_tile(
    x_ptr, w_ptr, bias_ptr, s_ptr, b_ptr, m, first_n, M, N, K, R,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_sm, stride_bn, stride_br,
    scaling, inner, outer,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    BIAS: tl.constexpr, LOW_RANK: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(z, tanh(inner · u) where CAP) for rows m (int64) and BLOCK_N columns from first_n; z is -inf behind column N.

    u = x [M, K] w [N, K]ᵀ + bias [N] + scaling · s [M, R] b [N, R]ᵀ, fp32 accumulate; z = outer · tanh(inner · u), or
    outer · u.
    """
    n = first_n + tl.arange(0, BLOCK_N).to(tl.int64)
    if LOW_RANK:
        acc = low_rank_tile(s_ptr, b_ptr, s_ptr, m, first_n, M, N, R, stride_sm, stride_bn, stride_br, scaling, 0,
                            BLOCK_M, BLOCK_N, BLOCK_R, False, PRECISION)  # fmt: skip
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + m[:, None] * stride_xm + k[None, :].to(tl.int64) * stride_xk,
                    mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)  # fmt: skip
        w = tl.load(w_ptr + n[None, :] * stride_wn + k[:, None].to(tl.int64) * stride_wk,
                    mask=(n[None, :] < N) & (k[:, None] < K), other=0.0)  # fmt: skip
        acc = tl.dot(x, w.to(x.dtype), acc, input_precision=PRECISION)
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    t = _tanh(acc * inner) if CAP else acc
    return tl.where(n[None, :] < N, t * outer, float("-inf")), t


class Head(NamedTuple):
    """Everything that makes logits, and how launches pass it."""

    x: torch.Tensor
    weight: Any
    bias: torch.Tensor | None
    s: torch.Tensor | None
    b: torch.Tensor | None
    scaling: float
    inner: float | None
    outer: float

    @property
    def arch(self) -> str:
        return configs.arch_of(self.x.device)

    @property
    def rate(self) -> float:
        """∂z/∂u where tanh' is 1."""
        return self.outer if self.inner is None else self.outer * self.inner

    @property
    def scalars(self) -> tuple[float, float, float]:
        return self.scaling, 1.0 if self.inner is None else self.inner, self.outer

    @property
    def flags(self) -> dict[str, Any]:
        return dict(
            BIAS=self.bias is not None, LOW_RANK=self.s is not None, CAP=self.inner is not None,
            BLOCK_R=configs.block_r(1 if self.s is None else self.s.shape[1], self.arch, self.x.dtype),
            PRECISION=configs.fp32_precision(self.arch),
        )  # fmt: skip

    def config(self, kernel: str) -> dict[str, int]:
        """Its launch configuration; the product of du and W has no low-rank part."""
        low_rank = self.s is not None and kernel != "add_product"
        rows, K = self.x.shape
        return configs.logprob(kernel, self.arch, self.x.dtype, low_rank, K % 16 == 0, rows)

    def slabs(self, most: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """(columns, W[columns]), at most `most` columns of the vocabulary at a time."""
        whole = [(slice(0, self.weight.shape[0]), self.weight)]
        decoded = whole if isinstance(self.weight, torch.Tensor) else _decoded_slabs(self.weight, self.x.dtype)
        for columns, w in decoded:
            for start in range(0, w.shape[0], most):
                part = slice(start, min(start + most, w.shape[0]))
                yield slice(columns.start + part.start, columns.start + part.stop), w[part]

    def operands(self, columns: slice, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x, W, bias, s, b of these columns; what there is none of is not read."""
        bias = w if self.bias is None else self.bias[columns].contiguous()
        if self.s is None or self.b is None:
            return self.x, w, bias, w, w
        return self.x, w, bias, self.s, self.b[columns]

    def sizes(self, w: torch.Tensor) -> tuple[int, ...]:
        """M, N, K, R."""
        return self.x.shape[0], w.shape[0], self.x.shape[1], 1 if self.s is None else self.s.shape[1]

    def strides(self, w: torch.Tensor) -> tuple[int, ...]:
        low_rank = (1, 1, 1) if self.s is None or self.b is None else (self.s.stride(0), *self.b.stride())
        return *self.x.stride(), *w.stride(), *low_rank
