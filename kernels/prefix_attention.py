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
    """(unit, batch row, head in its group, position, inside) of a block's rows: `rows` to a unit, in order b, g, t.

    Rows are counted in 32 bits, what they address in 64.
    """
    unit = block // blocks
    m = block % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    bg = m // T
    b, g = unit + bg // G, bg % G
    return unit.to(tl.int64), b.to(tl.int64), g.to(tl.int64), (m % T).to(tl.int64), m < rows


@triton.jit
def _tile(ptr, rows, stride_column, inside, first, D, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] from column `first` of D; `rows` are offsets of their first elements; zeros outside."""
    d = first + tl.arange(0, BLOCK_D)
    return tl.load(ptr + rows[:, None] + d[None, :].to(tl.int64) * stride_column,
                   mask=inside[:, None] & (d[None, :] < D), other=0.0)  # fmt: skip


@triton.jit
def _prefix_tile(ptr, rows, stride_column, inside, first, D, seed_ptr, mask_rows, width, threshold,
                 BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DROPOUT: tl.constexpr):  # fmt: skip
    """Of keys or values, after their dropout but for its scale."""
    p = _tile(ptr, rows, stride_column, inside, first, D, BLOCK_D)
    if DROPOUT:
        p = tl.where(dropout_keep(tl.load(seed_ptr), mask_rows, first, width, threshold, BLOCK_N, BLOCK_D), p, 0.0)
    return p


@triton.jit
def _product(x_ptr, x_rows, stride_xd, x_inside, p_ptr, p_rows, stride_pd, p_inside, D, seed_ptr, mask_rows, width,
             threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, DROPOUT: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    """float32 [BLOCK_M, BLOCK_N] = x pᵀ, BLOCK_C columns at a time so that neither operand stays in registers."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, D, BLOCK_C):
        x = _tile(x_ptr, x_rows, stride_xd, x_inside, first, D, BLOCK_C)
        p = _prefix_tile(p_ptr, p_rows, stride_pd, p_inside, first, D, seed_ptr, mask_rows, width, threshold,
                         BLOCK_N, BLOCK_C, DROPOUT)  # fmt: skip
        acc = mixed_dot(x, tl.trans(p), acc, PRECISION)
    return acc


@triton.jit
def _biased(s, bias_ptr, rows, j, stride_bn, inside, n, scale, BIAS: tl.constexpr):
    """scale · s + bias, -inf behind the prefix."""
    s = s * scale
    if BIAS:
        s += tl.load(bias_ptr + rows[:, None] + (j * stride_bn)[None, :],
                     mask=inside[:, None] & (j < n)[None, :], other=0.0).to(tl.float32)  # fmt: skip
    return tl.where((j < n)[None, :], s, float("-inf"))


@triton.jit
def _row_dots(x_ptr, x_rows, stride_xd, y_ptr, y_rows, inside, D, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """float32 [BLOCK_M] = rowsum(x ∘ y); y is dense in its last dimension."""
    acc = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, D, BLOCK_C):
        x = _tile(x_ptr, x_rows, stride_xd, inside, first, D, BLOCK_C).to(tl.float32)
        acc += tl.sum(x * _tile(y_ptr, y_rows, 1, inside, first, D, BLOCK_C).to(tl.float32), 1)
    return acc


@triton.jit
def _add_dq(dq_ptr, rows, stride_column, inside, first, D, part, BLOCK_D: tl.constexpr):
    d = first + tl.arange(0, BLOCK_D)
    tile = dq_ptr + rows[:, None] + d[None, :].to(tl.int64) * stride_column
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
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, PREFIX_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out, lse of [prefix; text] from those of the text, in place: an online softmax that starts from (lse, 1, out).

    Scores, sums and out are accumulated in fp32; weights and values meet in the dtype of query.
    """
    head = tl.program_id(1).to(tl.int64)
    unit, b, g, t, inside = _rows(tl.program_id(0), blocks, rows, G, T, BLOCK_M)
    h, width = head * G + g, tl.maximum(D, DV)
    q_rows, out_rows = b * stride_qb + h * stride_qh + t * stride_qt, b * stride_ob + h * stride_oh + t * stride_ot
    lse_rows = b * stride_lb + h * stride_lh + t * stride_lt
    top = tl.load(lse_ptr + lse_rows, mask=inside, other=0.0)
    total = tl.full((BLOCK_M,), 1.0, tl.float32)
    acc = _tile(out_ptr, out_rows, 1, inside, 0, DV, BLOCK_DV).to(tl.float32)
    for start in range(0, n, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N).to(tl.int64)
        key_mask, value_mask = (unit * heads + head) * n + j, ((units + unit) * heads + head) * n + j
        s = _product(q_ptr, q_rows, stride_qd, inside, key_ptr, head * stride_kh + j * stride_kn, stride_kd, j < n, D,
                     prefix_seed_ptr, key_mask, width, prefix_threshold, BLOCK_M, BLOCK_N, BLOCK_C, PREFIX_DROPOUT,
                     PRECISION)  # fmt: skip
        s = _biased(s, bias_ptr, h * stride_bh + t * stride_bt, j, stride_bn, inside, n, score_scale, BIAS)
        higher = tl.maximum(top, tl.max(s, 1))
        w, old = tl.exp(s - higher[:, None]), tl.exp(top - higher)
        top, total = higher, total * old + tl.sum(w, 1)
        if DROPOUT:
            row = (b * heads * G + h) * T + t
            w = tl.where(dropout_keep(tl.load(seed_ptr), row, start, n, threshold, BLOCK_M, BLOCK_N), w, 0.0)
        v = _prefix_tile(value_ptr, head * stride_vh + j * stride_vn, stride_vd, j < n, 0, DV,
                         prefix_seed_ptr, value_mask, width, prefix_threshold, BLOCK_N, BLOCK_DV,
                         PREFIX_DROPOUT).to(q_ptr.dtype.element_ty)  # fmt: skip
        acc = tl.dot((w * value_scale).to(v.dtype), v, acc * old[:, None], input_precision=PRECISION)
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
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    BIAS: tl.constexpr, DROPOUT: tl.constexpr, PREFIX_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq += ds k, in place, for ds = score_scale · w ∘ (value_scale · keep ∘ (dout vᵀ) − rowsum(dout ∘ out)) and
    w = exp(scores − lse); fp32 sums, ds and k meet in the dtype of query."""
    head = tl.program_id(1).to(tl.int64)
    unit, b, g, t, inside = _rows(tl.program_id(0), blocks, rows, G, T, BLOCK_M)
    h, width = head * G + g, tl.maximum(D, DV)
    q_rows, dout_rows = b * stride_qb + h * stride_qh + t * stride_qt, b * stride_db + h * stride_dh + t * stride_dt
    out_rows = b * stride_ob + h * stride_oh + t * stride_ot
    delta = _row_dots(dout_ptr, dout_rows, stride_dd, out_ptr, out_rows, inside, DV, BLOCK_M, BLOCK_C)
    lse = tl.load(lse_ptr + b * stride_lb + h * stride_lh + t * stride_lt, mask=inside, other=float("inf"))
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, n, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N).to(tl.int64)
        key_rows, value_rows = head * stride_kh + j * stride_kn, head * stride_vh + j * stride_vn
        key_mask, value_mask = (unit * heads + head) * n + j, ((units + unit) * heads + head) * n + j
        s = _product(q_ptr, q_rows, stride_qd, inside, key_ptr, key_rows, stride_kd, j < n, D, prefix_seed_ptr,
                     key_mask, width, prefix_threshold, BLOCK_M, BLOCK_N, BLOCK_C, PREFIX_DROPOUT,
                     PRECISION)  # fmt: skip
        s = _biased(s, bias_ptr, h * stride_bh + t * stride_bt, j, stride_bn, inside, n, score_scale, BIAS)
        dw = _product(dout_ptr, dout_rows, stride_dd, inside, value_ptr, value_rows, stride_vd, j < n, DV,
                      prefix_seed_ptr, value_mask, width, prefix_threshold, BLOCK_M, BLOCK_N, BLOCK_C, PREFIX_DROPOUT,
                      PRECISION) * value_scale  # fmt: skip
        if DROPOUT:
            row = (b * heads * G + h) * T + t
            dw = tl.where(dropout_keep(tl.load(seed_ptr), row, start, n, threshold, BLOCK_M, BLOCK_N), dw, 0.0)
        ds = tl.exp(s - lse[:, None]) * (dw - delta[:, None]) * score_scale
        k = _prefix_tile(key_ptr, key_rows, stride_kd, j < n, 0, D, prefix_seed_ptr, key_mask, width, prefix_threshold,
                         BLOCK_N, BLOCK_D, PREFIX_DROPOUT).to(q_ptr.dtype.element_ty)  # fmt: skip
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
    _add_dq(dq_ptr, b * stride_gb + h * stride_gh + t * stride_gt, stride_gd, inside, 0, D, acc, BLOCK_D)


@triton.jit
def _prefix_gradients_kernel(
    dkey_ptr, dvalue_ptr,
    dq_ptr, dout_ptr, out_ptr, lse_ptr, q_ptr, key_ptr, value_ptr, bias_ptr, seed_ptr, prefix_seed_ptr,
    units, rows, blocks, heads, G, T, n, D, DV,
    stride_gb, stride_gh, stride_gt, stride_gd, stride_db, stride_dh, stride_dt, stride_dd,
    stride_ob, stride_oh, stride_ot, stride_lb, stride_lh, stride_lt, stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kh, stride_kn, stride_kd, stride_vh, stride_vn, stride_vd, stride_bh, stride_bt, stride_bn,
    score_scale, value_scale, threshold, prefix_threshold, steps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    BIAS: tl.constexpr, DROPOUT: tl.constexpr, PREFIX_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, DQ: tl.constexpr,
):  # fmt: skip
    """dkey[part] [heads, n, D] = dsᵀ q and dvalue[part] [heads, n, DV] = value_scale · (keep ∘ w)ᵀ dout, fp32, over
    `steps` blocks of rows; w and ds as in _prefix_dq_kernel. A program owns BLOCK_N keys and BLOCK_D columns; where
    BLOCK_N is all of the prefix (DQ), dq += ds k in the same pass."""
    head, part = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    width = tl.maximum(D, DV)
    columns = tl.cdiv(width, BLOCK_D)
    start, first = tl.program_id(0) // columns * BLOCK_N, tl.program_id(0) % columns * BLOCK_D
    j = start + tl.arange(0, BLOCK_N).to(tl.int64)
    key_rows, value_rows = head * stride_kh + j * stride_kn, head * stride_vh + j * stride_vn
    dkey, dvalue = tl.zeros((BLOCK_D, BLOCK_N), tl.float32), tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    for step in range(0, steps):
        unit, b, g, t, inside = _rows(tl.program_id(2) * steps + step, blocks, rows, G, T, BLOCK_M)
        h, inside = head * G + g, inside & (unit < units)
        key_mask, value_mask = (unit * heads + head) * n + j, ((units + unit) * heads + head) * n + j
        q_rows, dout_rows = b * stride_qb + h * stride_qh + t * stride_qt, b * stride_db + h * stride_dh + t * stride_dt
        s = _product(q_ptr, q_rows, stride_qd, inside, key_ptr, key_rows, stride_kd, j < n, D, prefix_seed_ptr,
                     key_mask, width, prefix_threshold, BLOCK_M, BLOCK_N, BLOCK_C, PREFIX_DROPOUT,
                     PRECISION)  # fmt: skip
        s = _biased(s, bias_ptr, h * stride_bh + t * stride_bt, j, stride_bn, inside, n, score_scale, BIAS)
        dw = _product(dout_ptr, dout_rows, stride_dd, inside, value_ptr, value_rows, stride_vd, j < n, DV,
                      prefix_seed_ptr, value_mask, width, prefix_threshold, BLOCK_M, BLOCK_N, BLOCK_C, PREFIX_DROPOUT,
                      PRECISION) * value_scale  # fmt: skip
        lse = tl.load(lse_ptr + b * stride_lb + h * stride_lh + t * stride_lt, mask=inside, other=float("inf"))
        w = tl.exp(s - lse[:, None])
        kept = w * value_scale
        if DROPOUT:
            row = (b * heads * G + h) * T + t
            keep = dropout_keep(tl.load(seed_ptr), row, start, n, threshold, BLOCK_M, BLOCK_N)
            dw, kept = tl.where(keep, dw, 0.0), tl.where(keep, kept, 0.0)
        out_rows = b * stride_ob + h * stride_oh + t * stride_ot
        delta = _row_dots(dout_ptr, dout_rows, stride_dd, out_ptr, out_rows, inside, DV, BLOCK_M, BLOCK_C)
        dout = _tile(dout_ptr, dout_rows, stride_dd, inside, first, DV, BLOCK_D)
        ds = w * (dw - delta[:, None]) * score_scale
        if PREFIX_DROPOUT:
            part_of_value = mixed_dot(tl.trans(dout), kept, tl.zeros_like(dvalue), PRECISION)
            keep = dropout_keep(tl.load(prefix_seed_ptr), value_mask, first, width, prefix_threshold, BLOCK_N, BLOCK_D)
            dvalue += tl.where(tl.trans(keep), part_of_value, 0.0)
        else:
            dvalue = mixed_dot(tl.trans(dout), kept, dvalue, PRECISION)
        q = _tile(q_ptr, q_rows, stride_qd, inside, first, D, BLOCK_D)
        if PREFIX_DROPOUT:
            part_of_key = mixed_dot(tl.trans(q), ds, tl.zeros_like(dkey), PRECISION)
            keep = dropout_keep(tl.load(prefix_seed_ptr), key_mask, first, width, prefix_threshold, BLOCK_N, BLOCK_D)
            dkey += tl.where(tl.trans(keep), part_of_key, 0.0)
        else:
            dkey = mixed_dot(tl.trans(q), ds, dkey, PRECISION)
        if DQ:
            k = _prefix_tile(key_ptr, key_rows, stride_kd, j < n, first, D, prefix_seed_ptr, key_mask, width,
                             prefix_threshold, BLOCK_N, BLOCK_D, PREFIX_DROPOUT).to(q.dtype)  # fmt: skip
            dq = tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
            _add_dq(dq_ptr, b * stride_gb + h * stride_gh + t * stride_gt, stride_gd, inside, first, D, dq, BLOCK_D)
    d, sums = first + tl.arange(0, BLOCK_D), (part * heads + head) * n + j
    tl.store(dkey_ptr + sums[None, :] * D + d[:, None], dkey, mask=(j < n)[None, :] & (d < D)[:, None])
    tl.store(dvalue_ptr + sums[None, :] * DV + d[:, None], dvalue, mask=(j < n)[None, :] & (d < DV)[:, None])


def prefix_merge_(
    out: torch.Tensor, lse: torch.Tensor, query: torch.Tensor, prefix_key: torch.Tensor, prefix_value: torch.Tensor,
    bias: torch.Tensor | None, scaling: float,
    dropout_p: float, dropout_seed: torch.Tensor | None, prefix_p: float, prefix_seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """See peft_ops.reference.prefix_attention; D and Dv up to 256, the last dimension of out dense."""
    sizes, strides, scalars, flags, config = _prepared(
        "prefix_merge", out, lse, query, prefix_key, prefix_value, bias, scaling, dropout_p, prefix_p
    )
    D, Dv = prefix_key.shape[2], prefix_value.shape[2]
    with device_guard(query):
        _prefix_merge_kernel[sizes[0] * sizes[2], prefix_key.shape[0]](
            out, lse, query, prefix_key, prefix_value, *_or_any(query, bias, dropout_seed, prefix_seed),
            *sizes, *strides, *scalars, BLOCK_D=configs.covering(D), BLOCK_DV=configs.covering(Dv), **flags, **config,
        )  # fmt: skip
    return out, lse


def prefix_gradients(
    dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, query: torch.Tensor, prefix_key: torch.Tensor,
    prefix_value: torch.Tensor, bias: torch.Tensor | None, dq: torch.Tensor | None, need_dprefix: bool, scaling: float,
    dropout_p: float, dropout_seed: torch.Tensor | None, prefix_p: float, prefix_seed: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """See peft_ops.reference.prefix_attention; partial sums over the batch's rows are added in a fixed order."""
    given = out, lse, query, prefix_key, prefix_value, bias, scaling, dropout_p, prefix_p
    tensors = dout, out, lse, query, prefix_key, prefix_value, *_or_any(query, bias, dropout_seed, prefix_seed)
    (heads, n, D), Dv = prefix_key.shape, prefix_value.shape[2]
    sizes, strides, scalars, flags, config = _prepared("prefix_gradients", *given)
    one_pass = need_dprefix and n <= config["BLOCK_N"]
    with device_guard(query):
        if dq is not None and not one_pass:
            dq_sizes, *_, dq_config = _prepared("prefix_dq", *given)
            _prefix_dq_kernel[dq_sizes[0] * dq_sizes[2], heads](
                dq, *tensors, *dq_sizes, *dq.stride(), *dout.stride(), *strides, *scalars,
                BLOCK_D=configs.covering(D), **flags, **dq_config,
            )  # fmt: skip
        if not need_dprefix:
            return dq, None, None
        blocks, block_d = sizes[0] * sizes[2], min(configs.PREFIX_COLUMNS, configs.covering(max(D, Dv)))
        owned = triton.cdiv(n, config["BLOCK_N"]) * triton.cdiv(max(D, Dv), block_d)
        steps = triton.cdiv(blocks, configs.splits(owned * heads, blocks))
        parts = triton.cdiv(blocks, steps)
        dkey, dvalue = (query.new_empty(parts, heads, n, d, dtype=torch.float32) for d in (D, Dv))
        any_dq = query if dq is None else dq
        _prefix_gradients_kernel[owned, heads, parts](
            dkey, dvalue, any_dq, *tensors, *sizes, *any_dq.stride(), *dout.stride(), *strides, *scalars, steps,
            BLOCK_D=block_d, DQ=one_pass and dq is not None, **flags, **config,
        )  # fmt: skip
    return dq, dkey[0] if parts == 1 else dkey.sum(0), dvalue[0] if parts == 1 else dvalue.sum(0)


def _or_any(like: torch.Tensor, *tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """A tensor for every pointer: one that is not read where there is none."""
    return tuple(like if t is None else t for t in tensors)


def _prepared(kernel, out, lse, query, prefix_key, prefix_value, bias, scaling, p, prefix_p):
    """(sizes, strides, scalars, flags, config) in the order that the kernels share."""
    (B, H, T, D), (heads, n, _), Dv = query.shape, prefix_key.shape, prefix_value.shape[2]
    arch, units = configs.arch_of(query.device), B if prefix_p else 1
    rows = B // units * (H // heads) * T
    config = configs.prefix_attention(kernel, arch, query.dtype, rows, n, max(D, Dv))
    sizes = units, rows, triton.cdiv(rows, config["BLOCK_M"]), heads, H // heads, T, n, D, Dv
    strides = *out.stride()[:3], *lse.stride(), *query.stride(), *prefix_key.stride(), *prefix_value.stride()
    (_, threshold, keep_scale), (_, prefix_threshold, prefix_scale) = (
        dropout_arguments(x, None, query) for x in (p, prefix_p)
    )
    scalars = scaling * prefix_scale, keep_scale * prefix_scale, threshold, prefix_threshold
    flags = dict(
        BIAS=bias is not None, DROPOUT=p > 0.0, PREFIX_DROPOUT=prefix_p > 0.0, PRECISION=configs.fp32_precision(arch)
    )
    return sizes, (*strides, *((0, 0, 0) if bias is None else bias.stride())), scalars, flags, config
