"""The prefix's part of attention over [prefix; text], merged with the text's by log-sum-exp, and its gradients.

The prefix is shared by the batch, so a program takes rows of any batch row and of every head that shares its key head:
at one row of query a whole batch fills one tile. With dropout of the prefix every batch row has its own, and a program
keeps to one; the mask is recomputed from the seed, no dropped prefix is ever in memory.
"""

import torch
import triton
import triton.language as tl

from . import configs
from .launch import device_guard, dropout_arguments
from .tiles import dropout_keep, mixed_dot


@triton.jit
def _rows(block, blocks, rows, G, T, BLOCK_M: tl.constexpr):
    """(unit, batch row, head in its group, position, inside) of a block's rows: `rows` to a unit, in order b, g, t."""
    unit = (block // blocks).to(tl.int64)
    m = (block % blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    return unit, unit + m // (G * T), (m // T) % G, m % T, m < rows


@triton.jit
def _tile(ptr, first, stride_row, stride_column, inside, D, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] of a tensor whose last dimension is D, from `first` elements on; zeros outside."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(ptr + (first + stride_row)[:, None] + d[None, :].to(tl.int64) * stride_column,
                   mask=inside[:, None] & (d[None, :] < D), other=0.0)  # fmt: skip


@triton.jit
def _keep(seed_ptr, unit, units, head, heads, j, n, width, threshold,
          BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """Which elements of a block of keys, and of values, this unit sees (peft_ops.reference.prefix_attention)."""
    seed = tl.load(seed_ptr)
    of_key, of_value = (unit * heads + head) * n + j, ((units + unit) * heads + head) * n + j
    keep_key = dropout_keep(seed, of_key, 0, width, threshold, BLOCK_N, BLOCK_D)
    return keep_key, dropout_keep(seed, of_value, 0, width, threshold, BLOCK_N, BLOCK_DV)


@triton.jit
def _scores(q, k, bias_ptr, h, t, j, n, stride_bh, stride_bt, stride_bn, scale,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """float32 [BLOCK_M, BLOCK_N] = scale · q kᵀ + bias, -inf behind the prefix."""
    s = mixed_dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION) * scale
    if BIAS:
        s += tl.load(bias_ptr + (h * stride_bh + t * stride_bt)[:, None] + (j * stride_bn)[None, :],
                     mask=(j < n)[None, :], other=0.0).to(tl.float32)  # fmt: skip
    return tl.where((j < n)[None, :], s, float("-inf"))


@triton.jit
def _add_dq(dq_ptr, stride_row, stride_column, inside, D, part, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    tile = dq_ptr + stride_row[:, None] + d[None, :].to(tl.int64) * stride_column
    within = inside[:, None] & (d[None, :] < D)
    dq = tl.load(tile, mask=within, other=0.0).to(tl.float32) + part
    tl.store(tile, dq.to(dq_ptr.dtype.element_ty), mask=within)


@triton.jit
def _prefix_merge_kernel(
    out_ptr, lse_ptr, q_ptr, key_ptr, value_ptr, bias_ptr, seed_ptr, prefix_seed_ptr,
    units, rows, blocks, heads, G, T, n, D, DV,
    stride_ob, stride_oh, stride_ot, stride_lb, stride_lh, stride_lt, stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kh, stride_kn, stride_kd, stride_vh, stride_vn, stride_vd, stride_bh, stride_bt, stride_bn,
    score_scale, value_scale, threshold, prefix_threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BIAS: tl.constexpr, DROPOUT: tl.constexpr, PREFIX_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out, lse of [prefix; text] from those of the text, in place: an online softmax that starts from (lse, 1, out).

    Scores, sums and out are accumulated in fp32; weights meet values in the dtype of query.
    """
    head = tl.program_id(1).to(tl.int64)
    unit, b, g, t, inside = _rows(tl.program_id(0), blocks, rows, G, T, BLOCK_M)
    h = head * G + g
    q = _tile(q_ptr, 0, b * stride_qb + h * stride_qh + t * stride_qt, stride_qd, inside, D, BLOCK_D)
    out_rows, lse_rows = b * stride_ob + h * stride_oh + t * stride_ot, b * stride_lb + h * stride_lh + t * stride_lt
    top = tl.load(lse_ptr + lse_rows, mask=inside, other=0.0)
    total = tl.full((BLOCK_M,), 1.0, tl.float32)
    acc = _tile(out_ptr, 0, out_rows, 1, inside, DV, BLOCK_DV).to(tl.float32)
    for start in range(0, n, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N).to(tl.int64)
        k = _tile(key_ptr, head * stride_kh, j * stride_kn, stride_kd, j < n, D, BLOCK_D)
        v = _tile(value_ptr, head * stride_vh, j * stride_vn, stride_vd, j < n, DV, BLOCK_DV)
        if PREFIX_DROPOUT:
            keep_key, keep_value = _keep(prefix_seed_ptr, unit, units, head, heads, j, n, tl.maximum(D, DV),
                                         prefix_threshold, BLOCK_N, BLOCK_D, BLOCK_DV)  # fmt: skip
            k, v = tl.where(keep_key, k, 0.0), tl.where(keep_value, v, 0.0)
        s = _scores(q, k, bias_ptr, h, t, j, n, stride_bh, stride_bt, stride_bn, score_scale,
                    BLOCK_M, BLOCK_N, BIAS, PRECISION)  # fmt: skip
        higher = tl.maximum(top, tl.max(s, 1))
        w, old = tl.exp(s - higher[:, None]), tl.exp(top - higher)
        top, total = higher, total * old + tl.sum(w, 1)
        if DROPOUT:
            row = (b * heads * G + h) * T + t
            w = tl.where(dropout_keep(tl.load(seed_ptr), row, start, n, threshold, BLOCK_M, BLOCK_N), w, 0.0)
        acc = mixed_dot((w * value_scale).to(q.dtype), v, acc * old[:, None], PRECISION)
    dv = tl.arange(0, BLOCK_DV)
    tl.store(out_ptr + out_rows[:, None] + dv[None, :], (acc / total[:, None]).to(out_ptr.dtype.element_ty),
             mask=inside[:, None] & (dv[None, :] < DV))  # fmt: skip
    tl.store(lse_ptr + lse_rows, top + tl.log(total), mask=inside)


@triton.jit
def _prefix_dq_kernel(
    dq_ptr, dout_ptr, out_ptr, lse_ptr, q_ptr, key_ptr, value_ptr, bias_ptr, seed_ptr, prefix_seed_ptr,
    units, rows, blocks, heads, G, T, n, D, DV,
    stride_gb, stride_gh, stride_gt, stride_gd, stride_db, stride_dh, stride_dt, stride_dd,
    stride_ob, stride_oh, stride_ot, stride_lb, stride_lh, stride_lt, stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kh, stride_kn, stride_kd, stride_vh, stride_vn, stride_vd, stride_bh, stride_bt, stride_bn,
    score_scale, value_scale, threshold, prefix_threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BIAS: tl.constexpr, DROPOUT: tl.constexpr, PREFIX_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq += score_scale · (w ∘ (dout vᵀ − rowsum(dout ∘ out))) k with w = exp(scores − lse), in place, fp32 sums."""
    head = tl.program_id(1).to(tl.int64)
    unit, b, g, t, inside = _rows(tl.program_id(0), blocks, rows, G, T, BLOCK_M)
    h = head * G + g
    q = _tile(q_ptr, 0, b * stride_qb + h * stride_qh + t * stride_qt, stride_qd, inside, D, BLOCK_D)
    dout = _tile(dout_ptr, 0, b * stride_db + h * stride_dh + t * stride_dt, stride_dd, inside, DV, BLOCK_DV)
    out = _tile(out_ptr, 0, b * stride_ob + h * stride_oh + t * stride_ot, 1, inside, DV, BLOCK_DV)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    lse = tl.load(lse_ptr + b * stride_lb + h * stride_lh + t * stride_lt, mask=inside, other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, n, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N).to(tl.int64)
        k = _tile(key_ptr, head * stride_kh, j * stride_kn, stride_kd, j < n, D, BLOCK_D)
        v = _tile(value_ptr, head * stride_vh, j * stride_vn, stride_vd, j < n, DV, BLOCK_DV)
        if PREFIX_DROPOUT:
            keep_key, keep_value = _keep(prefix_seed_ptr, unit, units, head, heads, j, n, tl.maximum(D, DV),
                                         prefix_threshold, BLOCK_N, BLOCK_D, BLOCK_DV)  # fmt: skip
            k, v = tl.where(keep_key, k, 0.0), tl.where(keep_value, v, 0.0)
        s = _scores(q, k, bias_ptr, h, t, j, n, stride_bh, stride_bt, stride_bn, score_scale,
                    BLOCK_M, BLOCK_N, BIAS, PRECISION)  # fmt: skip
        dw = mixed_dot(dout, tl.trans(v), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION) * value_scale
        if DROPOUT:
            row = (b * heads * G + h) * T + t
            dw = tl.where(dropout_keep(tl.load(seed_ptr), row, start, n, threshold, BLOCK_M, BLOCK_N), dw, 0.0)
        ds = tl.exp(s - lse[:, None]) * (dw - delta[:, None]) * score_scale
        acc = mixed_dot(ds.to(q.dtype), k, acc, PRECISION)
    _add_dq(dq_ptr, b * stride_gb + h * stride_gh + t * stride_gt, stride_gd, inside, D, acc, BLOCK_D)


@triton.jit
def _prefix_gradients_kernel(
    dkey_ptr, dvalue_ptr,
    dq_ptr, dout_ptr, out_ptr, lse_ptr, q_ptr, key_ptr, value_ptr, bias_ptr, seed_ptr, prefix_seed_ptr,
    units, rows, blocks, heads, G, T, n, D, DV,
    stride_gb, stride_gh, stride_gt, stride_gd, stride_db, stride_dh, stride_dt, stride_dd,
    stride_ob, stride_oh, stride_ot, stride_lb, stride_lh, stride_lt, stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kh, stride_kn, stride_kd, stride_vh, stride_vn, stride_vd, stride_bh, stride_bt, stride_bn,
    score_scale, value_scale, threshold, prefix_threshold, steps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BIAS: tl.constexpr, DROPOUT: tl.constexpr, PREFIX_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, DQ: tl.constexpr,
):  # fmt: skip
    """dkey[part] [heads, n, D] = score_scale · dsᵀ q and dvalue[part] [heads, n, DV] = value_scale · wᵀ dout, fp32, of
    `steps` blocks of rows; w and ds as in _prefix_dq_kernel. A program owns a block of one head's prefix; where that is
    all of it (DQ), dq += ds k in the same pass."""
    head, part = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    start = tl.program_id(0) * BLOCK_N
    j = start + tl.arange(0, BLOCK_N).to(tl.int64)
    key = _tile(key_ptr, head * stride_kh, j * stride_kn, stride_kd, j < n, D, BLOCK_D)
    value = _tile(value_ptr, head * stride_vh, j * stride_vn, stride_vd, j < n, DV, BLOCK_DV)
    dkey, dvalue = tl.zeros((BLOCK_D, BLOCK_N), tl.float32), tl.zeros((BLOCK_DV, BLOCK_N), tl.float32)
    for step in range(0, steps):
        unit, b, g, t, inside = _rows(tl.program_id(2) * steps + step, blocks, rows, G, T, BLOCK_M)
        h, inside = head * G + g, inside & (unit < units)
        k, v = key, value
        if PREFIX_DROPOUT:
            keep_key, keep_value = _keep(prefix_seed_ptr, unit, units, head, heads, j, n, tl.maximum(D, DV),
                                         prefix_threshold, BLOCK_N, BLOCK_D, BLOCK_DV)  # fmt: skip
            k, v = tl.where(keep_key, key, 0.0), tl.where(keep_value, value, 0.0)
        q = _tile(q_ptr, 0, b * stride_qb + h * stride_qh + t * stride_qt, stride_qd, inside, D, BLOCK_D)
        dout = _tile(dout_ptr, 0, b * stride_db + h * stride_dh + t * stride_dt, stride_dd, inside, DV, BLOCK_DV)
        out = _tile(out_ptr, 0, b * stride_ob + h * stride_oh + t * stride_ot, 1, inside, DV, BLOCK_DV)
        delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
        lse = tl.load(lse_ptr + b * stride_lb + h * stride_lh + t * stride_lt, mask=inside, other=float("inf"))
        s = _scores(q, k, bias_ptr, h, t, j, n, stride_bh, stride_bt, stride_bn, score_scale,
                    BLOCK_M, BLOCK_N, BIAS, PRECISION)  # fmt: skip
        w = tl.exp(s - lse[:, None])
        dw = mixed_dot(dout, tl.trans(v), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION) * value_scale
        kept = w * value_scale
        if DROPOUT:
            row = (b * heads * G + h) * T + t
            keep = dropout_keep(tl.load(seed_ptr), row, start, n, threshold, BLOCK_M, BLOCK_N)
            dw, kept = tl.where(keep, dw, 0.0), tl.where(keep, kept, 0.0)
        ds = w * (dw - delta[:, None]) * score_scale
        if DQ:
            dq = mixed_dot(ds.to(q.dtype), k, tl.zeros((BLOCK_M, BLOCK_D), tl.float32), PRECISION)
            _add_dq(dq_ptr, b * stride_gb + h * stride_gh + t * stride_gt, stride_gd, inside, D, dq, BLOCK_D)
        if PREFIX_DROPOUT:
            of_key, of_value = tl.zeros_like(dkey), tl.zeros_like(dvalue)
            dkey += tl.where(tl.trans(keep_key), mixed_dot(tl.trans(q), ds, of_key, PRECISION), 0.0)
            dvalue += tl.where(tl.trans(keep_value), mixed_dot(tl.trans(dout), kept, of_value, PRECISION), 0.0)
        else:
            dkey = mixed_dot(tl.trans(q), ds, dkey, PRECISION)
            dvalue = mixed_dot(tl.trans(dout), kept, dvalue, PRECISION)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    rows_of = (part * heads + head) * n + j
    tl.store(dkey_ptr + rows_of[None, :] * D + d[:, None], dkey, mask=(j < n)[None, :] & (d < D)[:, None])
    tl.store(dvalue_ptr + rows_of[None, :] * DV + dv[:, None], dvalue, mask=(j < n)[None, :] & (dv < DV)[:, None])


def prefix_merge_(
    out: torch.Tensor, lse: torch.Tensor, query: torch.Tensor, prefix_key: torch.Tensor, prefix_value: torch.Tensor,
    bias: torch.Tensor | None, scaling: float,
    dropout_p: float, dropout_seed: torch.Tensor | None, prefix_p: float, prefix_seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """See peft_ops.reference.prefix_attention; D and Dv up to 256, the last dimension of out dense."""
    dropouts = dropout_p, dropout_seed, prefix_p, prefix_seed
    sizes, strides, seeds, scalars, flags, config = _prepared(
        "prefix_merge", out, lse, query, prefix_key, prefix_value, bias, scaling, *dropouts
    )
    with device_guard(query):
        _prefix_merge_kernel[sizes[0] * sizes[2], prefix_key.shape[0]](
            out, lse, query, prefix_key, prefix_value, query if bias is None else bias, *seeds,
            *sizes, *strides, *scalars, **flags, **config,
        )  # fmt: skip
    return out, lse


def prefix_gradients(
    dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, query: torch.Tensor, prefix_key: torch.Tensor,
    prefix_value: torch.Tensor, bias: torch.Tensor | None, dq: torch.Tensor | None, need_dprefix: bool, scaling: float,
    dropout_p: float, dropout_seed: torch.Tensor | None, prefix_p: float, prefix_seed: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """See peft_ops.reference.prefix_attention; partial sums over the batch's rows are added in a fixed order."""
    given = out, lse, query, prefix_key, prefix_value, bias, scaling, dropout_p, dropout_seed, prefix_p, prefix_seed
    inputs = dout, out, lse, query, prefix_key, prefix_value, query if bias is None else bias
    (heads, n, D), Dv = prefix_key.shape, prefix_value.shape[2]
    sizes, strides, seeds, scalars, flags, config = _prepared("prefix_gradients", *given)
    one_pass = need_dprefix and n <= config["BLOCK_N"]
    with device_guard(query):
        if dq is not None and not one_pass:
            of_dq = _prepared("prefix_dq", *given)
            _prefix_dq_kernel[of_dq[0][0] * of_dq[0][2], heads](
                dq, *inputs, *seeds, *of_dq[0], *dq.stride(), *dout.stride(), *strides, *scalars, **flags, **of_dq[5]
            )
        if not need_dprefix:
            return dq, None, None
        blocks, blocks_n = sizes[0] * sizes[2], triton.cdiv(n, config["BLOCK_N"])
        steps = triton.cdiv(blocks, configs.splits(blocks_n * heads, blocks))
        parts = triton.cdiv(blocks, steps)
        dkey, dvalue = (query.new_empty(parts, heads, n, d, dtype=torch.float32) for d in (D, Dv))
        dq_or_not = query if dq is None else dq
        _prefix_gradients_kernel[blocks_n, heads, parts](
            dkey, dvalue, dq_or_not, *inputs, *seeds, *sizes, *dq_or_not.stride(), *dout.stride(), *strides, *scalars,
            steps, DQ=one_pass and dq is not None, **flags, **config,
        )  # fmt: skip
    return dq, dkey[0] if parts == 1 else dkey.sum(0), dvalue[0] if parts == 1 else dvalue.sum(0)


def _prepared(kernel, out, lse, query, prefix_key, prefix_value, bias, scaling, p, seed, prefix_p, prefix_seed):
    """(sizes, strides, seeds, scalars, flags, config) that the kernels share."""
    (B, H, T, D), (heads, n, _), Dv = query.shape, prefix_key.shape, prefix_value.shape[2]
    arch, units = configs.arch_of(query.device), B if prefix_p else 1
    rows = B // units * (H // heads) * T
    config = configs.prefix_attention(kernel, arch, query.dtype, rows, n, max(D, Dv))
    sizes = units, rows, triton.cdiv(rows, config["BLOCK_M"]), heads, H // heads, T, n, D, Dv
    strides = *out.stride()[:3], *lse.stride(), *query.stride(), *prefix_key.stride(), *prefix_value.stride()
    seed, threshold, keep_scale = dropout_arguments(p, seed, query)
    prefix_seed, prefix_threshold, prefix_scale = dropout_arguments(prefix_p, prefix_seed, query)
    scalars = scaling * prefix_scale, keep_scale * prefix_scale, threshold, prefix_threshold
    flags = dict(
        BIAS=bias is not None, DROPOUT=p > 0.0, PREFIX_DROPOUT=prefix_p > 0.0, PRECISION=configs.fp32_precision(arch),
        BLOCK_D=max(16, triton.next_power_of_2(D)), BLOCK_DV=max(16, triton.next_power_of_2(Dv)),
    )  # fmt: skip
    bias_strides = (0, 0, 0) if bias is None else bias.stride()
    return sizes, (*strides, *bias_strides), (seed, prefix_seed), scalars, flags, config
