"""log softmax of chosen logits of a linear head, its entropy and gradients: logits exist as tiles in registers.

Forward: a program walks its share of the vocabulary for a block of rows and keeps four numbers per row; the shares are
joined afterwards. Backward: tiles of logits are made again, and their gradients go in the dtype of x to a workspace of
some columns of the vocabulary (`configs.LOGPROB_WORKSPACE`), from which dx, dW, ds and db are products. dx is summed in
float32. An NF4 head is decoded in slabs that stay in the L2 cache; blocks of rows that are all ignored are skipped.
"""

import torch
import triton
import triton.language as tl

from . import configs
from .down_project import down_project, down_project_da
from .launch import device_guard
from .logits import Head, logits_tile
from .tiles import grouped_order

LEAST = tl.constexpr(-3.4028234663852886e38)  # below every logit, and finite: its difference to itself is 0


@triton.jit
def _logprob_kernel(
    x_ptr, w_ptr, bias_ptr, s_ptr, b_ptr, targets_ptr, parts_ptr,
    M, N, K, R, first_column, ignore_index, split_n,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_sm, stride_bn, stride_br,
    scaling, inner, outer,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    BIAS: tl.constexpr, LOW_RANK: tl.constexpr, CAP: tl.constexpr, ENTROPY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """parts[p] [4, M] over split_n columns each of N: the largest logit, Σ e^(z - largest), Σ e^(z - largest)
    (z - largest), and the logit of the target where it is one of them, else 0. Column 0 is first_column of the
    vocabulary."""
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
        z, _ = logits_tile(
            x_ptr, w_ptr, bias_ptr, s_ptr, b_ptr, m, first_n, M, N, K, R,
            stride_xm, stride_xk, stride_wn, stride_wk, stride_sm, stride_bn, stride_br, scaling, inner, outer,
            BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, BIAS, LOW_RANK, CAP, PRECISION,
        )  # fmt: skip
        n = first_column + first_n + tl.arange(0, BLOCK_N)
        chosen += tl.sum(tl.where(n[None, :] == y[:, None], z, 0.0), 1)
        new = tl.maximum(largest, tl.max(z, 1))
        decay = tl.exp(largest - new)
        z -= new[:, None]
        p = tl.exp(z)
        if ENTROPY:
            moment = (moment + (largest - new) * total) * decay + tl.sum(tl.where(p == 0.0, 0.0, p * z), 1)
        total = total * decay + tl.sum(p, 1)
        largest = new
    out = parts_ptr + part.to(tl.int64) * 4 * M + m
    tl.store(out, largest, mask=m < M)
    tl.store(out + M, total, mask=m < M)
    if ENTROPY:
        tl.store(out + 2 * M, moment, mask=m < M)
    tl.store(out + 3 * M, chosen, mask=m < M)


@triton.jit
def _logprob_gradient_kernel(
    x_ptr, w_ptr, bias_ptr, s_ptr, b_ptr, targets_ptr, norm_ptr, entropy_ptr, dlogp_ptr, dentropy_ptr, du_ptr,
    dbias_ptr,
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
    z, t = logits_tile(
        x_ptr, w_ptr, bias_ptr, s_ptr, b_ptr, m, block_n * BLOCK_N, M, N, last, R,
        stride_xm, stride_xk, stride_wn, stride_wk, stride_sm, stride_bn, stride_br, scaling, inner, outer,
        BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, BIAS, LOW_RANK, CAP, PRECISION,
    )  # fmt: skip
    n = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    largest = tl.load(norm_ptr + m, mask=m < M, other=0.0)[:, None]
    logp = (z - largest) - tl.load(norm_ptr + M + m, mask=m < M, other=0.0)[:, None]
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
    head, found = Head(x, weight, bias, s, b, scaling, inner, outer), []
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
    counted, parts = targets != ignore_index, found[0] if len(found) == 1 else torch.cat(found)
    largest = parts[:, 0].amax(0)
    shift = parts[:, 0] - largest
    decay = shift.exp()
    total = (parts[:, 1] * decay).sum(0)
    log_total = total.log()
    logp = (parts[:, 3].sum(0) - largest) - log_total
    logp.masked_fill_((targets < 0) | (targets >= weight.shape[0]), float("nan")).masked_fill_(~counted, 0.0)
    norm = torch.stack((largest, log_total)).masked_fill_(~counted, 0.0)
    if not need_entropy:
        return logp, norm, None, None
    moment = ((parts[:, 2] + shift * parts[:, 1]) * decay).sum(0)
    return logp, norm, (log_total - moment / total).masked_fill_(~counted, 0.0), None


def linear_logprob_gradients(
    x: torch.Tensor, weight, bias: torch.Tensor | None, s: torch.Tensor | None, b: torch.Tensor | None, scaling: float,
    targets: torch.Tensor, ignore_index: int, inner: float | None, outer: float, norm: torch.Tensor,
    entropy: torch.Tensor | None, dlogp: torch.Tensor, dentropy: torch.Tensor | None,
    need_dx: bool, need_dw: bool, need_dbias: bool,
) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
    """See peft_ops.reference.linear_logprob. What ignored rows hold, NaN too, is multiplied by nothing."""
    head, ignored = Head(x, weight, bias, s, b, scaling, inner, outer), (targets == ignore_index)[:, None]
    M, V, wide = x.shape[0], weight.shape[0], torch.float32
    dx = x.new_zeros(x.shape, dtype=wide) if need_dx else None
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format) if need_dw else None
    dbias = x.new_zeros(V, dtype=wide) if need_dbias else None
    ds, db = (None, None) if s is None or b is None else (torch.zeros_like(s), b.new_empty(b.shape, dtype=wide))
    clean_x = x.masked_fill(ignored, 0.0) if need_dw else None
    clean_s = None if s is None else s.masked_fill(ignored, 0.0)
    rows = tuple(t if t is None else t.contiguous() for t in (targets, norm, entropy, dlogp, dentropy))
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
    head: Head, columns, w, ignore_index, need_sums, targets, norm, entropy, dlogp, dentropy
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(du [M, N] in the dtype of x for the N columns of a slab, and their sums [N] over rows where needed)."""
    (M, _), N, x = head.x.shape, w.shape[0], head.x
    config = head.config("logprob_gradient")
    blocks = triton.cdiv(M, config["BLOCK_M"])
    du, sums = x.new_empty(M, N), x.new_empty(blocks, N, dtype=torch.float32) if need_sums else None
    if du.numel():
        with device_guard(x):
            _logprob_gradient_kernel[(blocks * triton.cdiv(N, config["BLOCK_N"]),)](
                *head.operands(columns, w), targets, norm, norm if entropy is None else entropy, dlogp,
                dlogp if dentropy is None else dentropy, du, norm if sums is None else sums, *head.sizes(w),
                columns.start, ignore_index, *head.strides(w), N, N, *head.scalars, head.rate,
                ENTROPY=dentropy is not None, NEED_DBIAS=need_sums, **head.flags, **config,
            )  # fmt: skip
    return du, None if sums is None else sums.sum(0)


def _add_product(head: Head, dx: torch.Tensor, du: torch.Tensor, w: torch.Tensor) -> None:
    """dx [M, K] += du [M, N] w [N, K]; dx is float32 and contiguous, du contiguous."""
    (M, K), N, config = dx.shape, w.shape[0], head.config("add_product")
    if dx.numel():
        with device_guard(dx):
            _add_product_kernel[(triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(K, config["BLOCK_N"]),)](
                du, w, dx, M, N, K, N, *w.stride(), K, PRECISION=configs.fp32_precision(head.arch), **config
            )
