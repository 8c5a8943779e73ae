"""log softmax of chosen logits of a linear head, its entropy and gradients: logits exist as tiles in registers.

Forward: a program walks its share of the vocabulary for a block of rows and keeps four numbers per row; the shares are
joined afterwards. Backward: tiles of logits are made again, and their gradients go in the dtype of x to a workspace of
some columns of the vocabulary (`configs.LOGPROB_WORKSPACE`), from which dx, dW, ds and db are products. dx is summed in
float32. An NF4 head is decoded in slabs that stay in the L2 cache; blocks of rows that are all ignored are skipped.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import configs
from .activations import _tanh
from .down_project import down_project, down_project_da
from .launch import device_guard
from .nf4_linear import _decoded_slabs
from .tiles import grouped_order, low_rank_tile

LEAST = tl.constexpr(-3.4028234663852886e38)  # below every logit, and finite: its difference to itself is 0


@triton.jit
def _logits_tile(
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


@triton.jit
def _logprob_kernel(
    x_ptr, w_ptr, bias_ptr, s_ptr, b_ptr, targets_ptr, parts_ptr,
    M, N, K, R, first_column, ignore_index, split_n,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_sm, stride_bn, stride_br,
    scaling, inner, outer,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    BIAS: tl.constexpr, LOW_RANK: tl.constexpr, CAP: tl.constexpr, ENTROPY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """parts[p] [4, M] over split_n columns each of N: the largest logit, Σ e^(z - largest), Σ e^(z - largest) z, and
    the logit of the target where it is one of them, else 0. Column 0 is first_column of the vocabulary."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(1)
    y = tl.load(targets_ptr + m, mask=m < M, other=ignore_index)
    largest = tl.full((BLOCK_M,), LEAST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    moment = tl.zeros((BLOCK_M,), tl.float32)
    chosen = tl.zeros((BLOCK_M,), tl.float32)
    counted = tl.max((y != ignore_index).to(tl.int32), 0)
    last = tl.minimum((part + 1) * split_n, N) * counted
    for first_n in range(part * split_n, last, BLOCK_N):
        z, _ = _logits_tile(
            x_ptr, w_ptr, bias_ptr, s_ptr, b_ptr, m, first_n, M, N, K, R,
            stride_xm, stride_xk, stride_wn, stride_wk, stride_sm, stride_bn, stride_br, scaling, inner, outer,
            BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, BIAS, LOW_RANK, CAP, PRECISION,
        )  # fmt: skip
        n = first_column + first_n + tl.arange(0, BLOCK_N)
        chosen += tl.sum(tl.where(n[None, :] == y[:, None], z, 0.0), 1)
        new = tl.maximum(largest, tl.max(z, 1))
        decay = tl.exp(largest - new)
        p = tl.exp(z - new[:, None])
        total = total * decay + tl.sum(p, 1)
        if ENTROPY:
            moment = moment * decay + tl.sum(tl.where(p == 0.0, 0.0, p * z), 1)
        largest = new
    out = parts_ptr + part.to(tl.int64) * 4 * M + m
    tl.store(out, largest, mask=m < M)
    tl.store(out + M, total, mask=m < M)
    if ENTROPY:
        tl.store(out + 2 * M, moment, mask=m < M)
    tl.store(out + 3 * M, chosen, mask=m < M)


@triton.jit
def _logprob_gradient_kernel(
    x_ptr, w_ptr, bias_ptr, s_ptr, b_ptr, targets_ptr, lse_ptr, entropy_ptr, dlogp_ptr, dentropy_ptr, du_ptr, dbias_ptr,
    M, N, K, R, first_column, ignore_index,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_sm, stride_bn, stride_br, stride_dum, stride_part,
    scaling, inner, outer, rate,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    BIAS: tl.constexpr, LOW_RANK: tl.constexpr, CAP: tl.constexpr, ENTROPY: tl.constexpr, NEED_DBIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """du [M, N] = ∂z/∂u ∘ (dlogp · (onehot - p) - dentropy · p · (log p + entropy)), zero in ignored rows, and its sums
    over every block of rows, dbias [blocks, N], in float32."""
    block_m, block_n = grouped_order(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    m = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    y = tl.load(targets_ptr + m, mask=m < M, other=ignore_index)
    last = K * tl.max((y != ignore_index).to(tl.int32), 0)
    z, t = _logits_tile(
        x_ptr, w_ptr, bias_ptr, s_ptr, b_ptr, m, block_n * BLOCK_N, M, N, last, R,
        stride_xm, stride_xk, stride_wn, stride_wk, stride_sm, stride_bn, stride_br, scaling, inner, outer,
        BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, BIAS, LOW_RANK, CAP, PRECISION,
    )  # fmt: skip
    n = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    logp = z - tl.load(lse_ptr + m, mask=m < M, other=0.0)[:, None]
    dlogp = tl.load(dlogp_ptr + m, mask=m < M, other=0.0)[:, None]
    p, weight = tl.exp(logp), dlogp
    if ENTROPY:
        h = tl.load(entropy_ptr + m, mask=m < M, other=0.0)[:, None]
        weight += tl.load(dentropy_ptr + m, mask=m < M, other=0.0)[:, None] * (logp + h)
    du = tl.where(p == 0.0, 0.0, -p * weight) + tl.where((first_column + n)[None, :] == y[:, None], dlogp, 0.0)
    if CAP:
        du *= 1.0 - t * t
    du = tl.where((y != ignore_index)[:, None], du * rate, 0.0)
    tl.store(du_ptr + m[:, None] * stride_dum + n[None, :], du.to(du_ptr.dtype.element_ty),
             mask=(m[:, None] < M) & (n[None, :] < N))  # fmt: skip
    if NEED_DBIAS:
        tl.store(dbias_ptr + block_m.to(tl.int64) * stride_part + n, tl.sum(du, 0), mask=n < N)


@triton.jit
def _add_product_kernel(
    du_ptr, w_ptr, dx_ptr,
    M, N, K,
    stride_dum, stride_wn, stride_wk, stride_dxm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx [M, K] += du [M, N] w [N, K], in float32; BLOCK_N columns of dx a program, BLOCK_K of the sum a step."""
    block_m, block_n = grouped_order(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N), GROUP_M)
    m = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, N, BLOCK_K):
        n = start + tl.arange(0, BLOCK_K).to(tl.int64)
        du = tl.load(du_ptr + m[:, None] * stride_dum + n[None, :],
                     mask=(m[:, None] < M) & (n[None, :] < N), other=0.0)  # fmt: skip
        w = tl.load(w_ptr + n[:, None] * stride_wn + k[None, :] * stride_wk,
                    mask=(n[:, None] < N) & (k[None, :] < K), other=0.0)  # fmt: skip
        acc = tl.dot(du, w.to(du.dtype), acc, input_precision=PRECISION)
    out, inside = dx_ptr + m[:, None] * stride_dxm + k[None, :], (m[:, None] < M) & (k[None, :] < K)
    tl.store(out, acc + tl.load(out, mask=inside, other=0.0), mask=inside)


def linear_logprob(
    x: torch.Tensor, weight, bias: torch.Tensor | None, s: torch.Tensor | None, b: torch.Tensor | None, scaling: float,
    targets: torch.Tensor, ignore_index: int, inner: float | None, outer: float, need_entropy: bool, slope_rows: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """See peft_ops.reference.linear_logprob. No slope is made: the sum that it takes is a row of W wide, which no
    program can hold."""
    head, found = _Head(x, weight, bias, s, b, scaling, inner, outer), []
    M, config, targets = x.shape[0], head.config("logprob"), targets.contiguous()
    blocks = triton.cdiv(M, config["BLOCK_M"])
    for columns, w in head.slabs(weight.shape[0]):
        N = w.shape[0]
        steps = triton.cdiv(N, config["BLOCK_N"])
        each = triton.cdiv(steps, configs.splits(blocks, steps)) * config["BLOCK_N"]
        parts = x.new_empty(triton.cdiv(N, each), 4, M, dtype=torch.float32)
        if M:
            with device_guard(x):
                _logprob_kernel[blocks, parts.shape[0]](
                    *head.operands(columns, w), targets, parts, *head.sizes(w), columns.start, ignore_index, each,
                    *head.strides(w), *head.scalars, ENTROPY=need_entropy, **head.flags, **config,
                )  # fmt: skip
        found.append(parts)
    results = _joined(found[0] if len(found) == 1 else torch.cat(found), targets != ignore_index, need_entropy)
    outside = (targets != ignore_index) & ((targets < 0) | (targets >= weight.shape[0]))
    return results[0].masked_fill(outside, float("nan")), *results[1:], None


def _joined(
    parts: torch.Tensor, counted: torch.Tensor, need_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(logp, lse, entropy or None) from parts [P, 4, M] of the vocabulary, in a fixed order; 0 where not counted."""
    largest = parts[:, 0].amax(0)
    decay = torch.exp(parts[:, 0] - largest)
    total = (parts[:, 1] * decay).sum(0)
    lse = largest + total.log()
    entropy = lse - (parts[:, 2] * decay).sum(0) / total if need_entropy else None
    zero = lse.new_zeros(())
    logp = torch.where(counted, parts[:, 3].sum(0) - lse, zero)
    return logp, torch.where(counted, lse, zero), None if entropy is None else torch.where(counted, entropy, zero)


def linear_logprob_gradients(
    x: torch.Tensor, weight, bias: torch.Tensor | None, s: torch.Tensor | None, b: torch.Tensor | None, scaling: float,
    targets: torch.Tensor, ignore_index: int, inner: float | None, outer: float, lse: torch.Tensor,
    entropy: torch.Tensor | None, dlogp: torch.Tensor, dentropy: torch.Tensor | None,
    need_dx: bool, need_dw: bool, need_dbias: bool,
) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
    """See peft_ops.reference.linear_logprob. What ignored rows hold, NaN too, is multiplied by nothing."""
    head, ignored = _Head(x, weight, bias, s, b, scaling, inner, outer), (targets == ignore_index)[:, None]
    M, V, wide = x.shape[0], weight.shape[0], torch.float32
    dx = x.new_zeros(x.shape, dtype=wide) if need_dx else None
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format) if need_dw else None
    dbias = x.new_zeros(V, dtype=wide) if need_dbias else None
    ds, db = (None, None) if s is None or b is None else (torch.zeros_like(s), b.new_empty(b.shape, dtype=wide))
    clean_x = x.masked_fill(ignored, 0.0) if need_dw else None
    clean_s = None if s is None else s.masked_fill(ignored, 0.0)
    rows = tuple(t if t is None else t.contiguous() for t in (targets, lse, entropy, dlogp, dentropy))
    for columns, w in head.slabs(configs.logprob_columns(M, x.element_size())):
        du, sums = _logit_gradients(head, columns, w, ignore_index, need_dbias, *rows)
        if dx is not None:
            _add_product(head, dx, du, w)
        if dw is not None and clean_x is not None:
            dw[columns] = du.t() @ clean_x
        if dbias is not None and sums is not None:
            dbias[columns] = sums
        if ds is not None and db is not None and b is not None and clean_s is not None:
            ds += down_project(du, b[columns].t(), 0.0, None)
            db[columns] = down_project_da(clean_s, du, 0.0, None).t()
    ds, db = (None if t is None else t.mul_(scaling) for t in (ds, db))
    return None if dx is None else dx.to(x.dtype), dw, dbias, ds, db


def _logit_gradients(
    head, columns, w, ignore_index, need_sums, targets, lse, entropy, dlogp, dentropy
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(du [M, N] in the dtype of x for the N columns of a slab, and their sums [N] over rows where needed)."""
    (M, _), N, x = head.x.shape, w.shape[0], head.x
    config = head.config("logprob_gradient")
    blocks = triton.cdiv(M, config["BLOCK_M"])
    du, sums = x.new_empty(M, N), x.new_empty(blocks, N, dtype=torch.float32) if need_sums else None
    if du.numel():
        with device_guard(x):
            _logprob_gradient_kernel[(blocks * triton.cdiv(N, config["BLOCK_N"]),)](
                *head.operands(columns, w), targets, lse, lse if entropy is None else entropy, dlogp,
                dlogp if dentropy is None else dentropy, du, lse if sums is None else sums, *head.sizes(w),
                columns.start, ignore_index, *head.strides(w), N, N, *head.scalars, head.rate,
                ENTROPY=dentropy is not None, NEED_DBIAS=need_sums, **head.flags, **config,
            )  # fmt: skip
    return du, None if sums is None else sums.sum(0)


def _add_product(head, dx: torch.Tensor, du: torch.Tensor, w: torch.Tensor) -> None:
    """dx [M, K] += du [M, N] w [N, K]; dx is float32 and contiguous, du contiguous."""
    (M, K), N, config = dx.shape, w.shape[0], head.config("add_product")
    if dx.numel():
        with device_guard(dx):
            _add_product_kernel[(triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(K, config["BLOCK_N"]),)](
                du, w, dx, M, N, K, N, *w.stride(), K, PRECISION=configs.fp32_precision(head.arch), **config
            )


class _Head(NamedTuple):
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
        return configs.logprob(kernel, self.arch, self.x.dtype, low_rank, self.x.shape[1] % 16 == 0)

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
