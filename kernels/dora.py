"""What DoRA adds to LoRA: the row norms of W + scaling · b a, the scaled update, and the pass over dy and u.

The norm reads W once: a tile of the sum is made in registers and squared there, so nothing [N, K] is written and
nothing cancels. An NF4 weight is decoded in the same kernel; where its blocks do not end with the rows, in slabs
before it.
"""

import torch
import triton
import triton.language as tl

from . import configs
from .launch import device_guard
from .nf4 import _nf4_lookup, _weight_arguments
from .nf4_linear import _decoded_slabs, _nf4_tile, nf4_linear
from .tiles import low_rank_tile

NORM_FLOOR = 1e-18  # see peft_ops.reference.dora


@triton.jit
def _dora_norm_kernel(
    w_ptr, a_ptr, b_ptr, norm_ptr,
    N, K, R,
    stride_wn, stride_wk, stride_ar, stride_ak, stride_bn,
    scaling, floor,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """norm[p] [N] = ‖w [N, K] + scaling · b [N, R] a [R, K]‖ of each row over every SPLITS-th block of K, float32."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(tl.program_id(1) * BLOCK_K, K, BLOCK_K * SPLITS):
        k = start + tl.arange(0, BLOCK_K)
        w = tl.load(w_ptr + n[:, None] * stride_wn + k[None, :].to(tl.int64) * stride_wk,
                    mask=(n[:, None] < N) & (k[None, :] < K), other=0.0)  # fmt: skip
        w = w.to(tl.float32) + low_rank_tile(
            b_ptr, a_ptr, b_ptr, n, start, N, K, R, stride_bn, stride_ak, stride_ar, scaling, 0,
            BLOCK_N, BLOCK_K, BLOCK_R, False, PRECISION,
        )  # fmt: skip
        acc += tl.sum(w * w, axis=1)
    norm = tl.maximum(tl.sqrt(acc), floor)
    tl.store(norm_ptr + tl.program_id(1).to(tl.int64) * N + n, norm, mask=n < N)


@triton.jit
def _nf4_dora_norm_kernel(
    packed_ptr, absmax_ptr, nested_ptr, offset_ptr, map_ptr, pairs_ptr, a_ptr, b_ptr, norm_ptr,
    N, K, R,
    stride_ar, stride_ak, stride_bn,
    scaling, floor,
    BLOCKSIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    SPLITS: tl.constexpr, NESTED: tl.constexpr, SHUFFLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same for W in NF4 whose rows end with a block, decoded in float32; even and odd columns apart."""
    lookup = _nf4_lookup(pairs_ptr, SHUFFLE)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(tl.program_id(1) * BLOCK_K, K, BLOCK_K * SPLITS):
        even, odd = _nf4_tile(
            packed_ptr, absmax_ptr, nested_ptr, offset_ptr, map_ptr, lookup, n, N, start, K,
            BLOCKSIZE, BLOCK_N, BLOCK_K, NESTED, SHUFFLE, False, tl.float32,
        )  # fmt: skip
        even += low_rank_tile(
            b_ptr, a_ptr, b_ptr, n, start // 2, N, K // 2, R, stride_bn, 2 * stride_ak, stride_ar, scaling, 0,
            BLOCK_N, BLOCK_K // 2, BLOCK_R, False, PRECISION,
        )  # fmt: skip
        odd += low_rank_tile(
            b_ptr, a_ptr + stride_ak, b_ptr, n, start // 2, N, K // 2, R, stride_bn, 2 * stride_ak, stride_ar, scaling,
            0, BLOCK_N, BLOCK_K // 2, BLOCK_R, False, PRECISION,
        )  # fmt: skip
        acc += tl.sum(even * even + odd * odd, axis=1)
    norm = tl.maximum(tl.sqrt(acc), floor)
    tl.store(norm_ptr + tl.program_id(1).to(tl.int64) * N + n, norm, mask=n < N)


@triton.jit
def _dora_update_kernel(
    u_ptr, s_ptr, b_ptr, g_ptr, bias_ptr, y_ptr,
    M, N, R,
    stride_um, stride_un, stride_sm, stride_bn, stride_br,
    scaling,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y [M, N] = g [N] ∘ (u [M, N] + scaling · s [M, R] b [N, R]ᵀ) + bias [N] in float32, rounded once; y lies as u."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_n = tl.program_id(1) * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)
    term = low_rank_tile(
        s_ptr, b_ptr, s_ptr, m, first_n, M, N, R, stride_sm, stride_bn, stride_br, scaling, 0,
        BLOCK_M, BLOCK_N, BLOCK_R, False, PRECISION,
    )  # fmt: skip
    inside = (m[:, None] < M) & (n[None, :] < N)
    tile = m[:, None] * stride_um + n[None, :].to(tl.int64) * stride_un
    g = tl.load(g_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    y = (tl.load(u_ptr + tile, mask=inside, other=0.0).to(tl.float32) + term) * g[None, :]
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + tile, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _dora_gradients_kernel(
    dy_ptr, u_ptr, g_ptr, dz_ptr, dg_ptr,
    M, N,
    stride_dym, stride_dyn, stride_um, stride_un,
    steps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NEED_DZ: tl.constexpr, NEED_DG: tl.constexpr,
):  # fmt: skip
    """dz [M, N] = g [N] ∘ dy, contiguous, and dg[part of M] [N] = Σ_m dy ∘ u, fp32 partial sums. A program owns a block
    of N and `steps` blocks of M."""
    part = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    g = tl.load(g_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    dg = tl.zeros((BLOCK_N,), tl.float32)
    for step in range(0, steps):
        m = (part * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = (m[:, None] < M) & (n[None, :] < N)
        dy = tl.load(dy_ptr + m[:, None] * stride_dym + n[None, :] * stride_dyn, mask=inside, other=0.0).to(tl.float32)
        if NEED_DG:
            u = tl.load(u_ptr + m[:, None] * stride_um + n[None, :] * stride_un, mask=inside, other=0.0)
            dg += tl.sum(dy * u.to(tl.float32), axis=0)
        if NEED_DZ:
            tl.store(dz_ptr + m[:, None] * N + n[None, :], (dy * g[None, :]).to(dz_ptr.dtype.element_ty), mask=inside)
    if NEED_DG:
        tl.store(dg_ptr + part * N + n, dg, mask=n < N)


def dora_norm(weight, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """See peft_ops.reference.dora; the parts of a row are added in a fixed order."""
    (N, K), b = weight.shape, b.float().contiguous()
    if isinstance(weight, torch.Tensor):
        return _dense_norm(weight, a, b, scaling)
    if min(N, K) and K % weight.blocksize == 0:
        return _nf4_norm(weight, a, b, scaling)
    norm = b.new_empty(N)
    for rows, w in _decoded_slabs(weight, torch.float32):
        norm[rows] = _dense_norm(w, a, b[rows], scaling)
    return norm


def _dense_norm(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    (N, K), R, arch = weight.shape, a.shape[0], configs.arch_of(a.device)
    config = configs.launch("dora_norm", arch, weight.dtype, N)
    blocks = triton.cdiv(N, config["BLOCK_N"])
    parts = configs.splits(blocks, triton.cdiv(K, config["BLOCK_K"]))
    norm = b.new_empty(parts, N)
    if N:
        with device_guard(a):
            _dora_norm_kernel[blocks, parts](
                weight, a, b, norm, N, K, R, *weight.stride(), *a.stride(), R, scaling, NORM_FLOOR,
                SPLITS=parts, PRECISION=configs.fp32_precision(arch), **config,
            )  # fmt: skip
    return _total_norm(norm)


def _nf4_norm(weight, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    (N, K), R, arch = weight.shape, a.shape[0], configs.arch_of(a.device)
    config = configs.launch("nf4_dora_norm", arch, torch.float32, N)
    blocks = triton.cdiv(N, config["BLOCK_N"])
    parts = configs.splits(blocks, triton.cdiv(K, config["BLOCK_K"]))
    norm = b.new_empty(parts, N)
    with device_guard(a):
        _nf4_dora_norm_kernel[blocks, parts](
            *_weight_arguments(weight), a, b, norm, N, K, R, *a.stride(), R, scaling, NORM_FLOOR,
            BLOCKSIZE=weight.blocksize, NESTED=weight.absmax is None, SPLITS=parts,
            SHUFFLE=configs.nf4_shuffle(a.device), PRECISION=configs.fp32_precision(arch), enable_fp_fusion=False,
            **config,
        )  # fmt: skip
    return _total_norm(norm)


def _total_norm(parts: torch.Tensor) -> torch.Tensor:
    return parts[0] if parts.shape[0] == 1 else torch.linalg.vector_norm(parts, dim=0)


def dora_linear(
    x: torch.Tensor, weight, bias: torch.Tensor | None, s: torch.Tensor, b: torch.Tensor, scaling: float,
    g: torch.Tensor, keep_u: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """See peft_ops.reference.dora."""
    if isinstance(weight, torch.Tensor):
        u = torch.nn.functional.linear(x, weight.to(x.dtype))
    else:
        u = nf4_linear(x, weight, None)
    y, (M, N), R = torch.empty_like(u) if keep_u else u, u.shape, s.shape[1]
    if y.numel():
        arch = configs.arch_of(x.device)
        block_r = configs.block_r(R, arch, x.dtype)
        config = configs.launch("dora_update", arch, x.dtype, M, block_r)
        with device_guard(x):
            _dora_update_kernel[triton.cdiv(M, config["BLOCK_M"]), triton.cdiv(N, config["BLOCK_N"])](
                u, s, b, g, g if bias is None else bias.contiguous(), y,
                M, N, R, *u.stride(), s.stride(0), *b.stride(), scaling,
                BLOCK_R=block_r, BIAS=bias is not None, PRECISION=configs.update_precision(arch, x.dtype), **config,
            )  # fmt: skip
    return y, u if keep_u else None


def dora_gradients(
    dy: torch.Tensor, u: torch.Tensor | None, g: torch.Tensor, need_dz: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """See peft_ops.reference.dora; partial sums are added in a fixed order."""
    M, N = dy.shape
    config = configs.launch("dora_gradients", configs.arch_of(dy.device), dy.dtype, M)
    dz = dy.new_empty(M, N) if need_dz else None
    if dy.numel() == 0 or (u is None and dz is None):
        return dz, None if u is None else torch.zeros_like(g)
    blocks_m, blocks_n = triton.cdiv(M, config["BLOCK_M"]), triton.cdiv(N, config["BLOCK_N"])
    steps = triton.cdiv(blocks_m, configs.splits(blocks_n, blocks_m, least=1))
    parts = triton.cdiv(blocks_m, steps)
    dg = dy.new_empty(parts, N, dtype=torch.float32)
    with device_guard(dy):
        _dora_gradients_kernel[blocks_n, parts](
            dy, dy if u is None else u, g, dy if dz is None else dz, dg,
            M, N, *dy.stride(), *(0, 0) if u is None else u.stride(), steps,
            NEED_DZ=need_dz, NEED_DG=u is not None, **config,
        )  # fmt: skip
    return dz, None if u is None else dg[0] if parts == 1 else dg.sum(0)
