"""The way up from a bottleneck and back: activation on load, residual and biases in the same pass, out of place."""

import torch
import triton
import triton.language as tl

from . import configs
from .activations import activate, derivative
from .down_project import down_project
from .launch import device_guard
from .tiles import mixed_dot


@triton.jit
def _up_project_kernel(
    s_ptr, bias_ptr, w_ptr, up_bias_ptr, residual_ptr, y_ptr,
    M, N, R,
    stride_sm, stride_wn, stride_wr, stride_resm, stride_resn, stride_ym,
    scaling,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    ACTIVATION: tl.constexpr, BIAS: tl.constexpr, UP_BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y [M, N] = residual + scaling · (act(s [M, R] + bias) w [N, R]ᵀ + up_bias), fp32 accumulate, one rounding."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        z = tl.load(s_ptr + m[:, None] * stride_sm + r[None, :],
                    mask=(m[:, None] < M) & (r[None, :] < R), other=0.0)  # fmt: skip
        if BIAS:
            z += tl.load(bias_ptr + r, mask=r < R, other=0.0).to(tl.float32)[None, :]
        w = tl.load(w_ptr + n[None, :] * stride_wn + r[:, None] * stride_wr,
                    mask=(n[None, :] < N) & (r[:, None] < R), other=0.0)  # fmt: skip
        acc = tl.dot(activate(z, ACTIVATION), w.to(tl.float32), acc, input_precision=PRECISION)
    if UP_BIAS:
        acc += tl.load(up_bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    acc *= scaling
    inside = (m[:, None] < M) & (n[None, :] < N)
    if RESIDUAL:
        acc += tl.load(residual_ptr + m[:, None] * stride_resm + n[None, :] * stride_resn,
                       mask=inside, other=0.0).to(tl.float32)  # fmt: skip
    tl.store(y_ptr + m[:, None] * stride_ym + n[None, :], acc.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _bottleneck_gradient_kernel(
    dh_ptr, s_ptr, bias_ptr,
    SIZE, R,
    scaling,
    BLOCK: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """dh [M · R] becomes dz = scaling · dh ∘ act'(s + bias)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < SIZE
    z = tl.load(s_ptr + i, mask=inside, other=0.0)
    if BIAS:
        z += tl.load(bias_ptr + i % R, mask=inside, other=0.0).to(tl.float32)
    dh = tl.load(dh_ptr + i, mask=inside, other=0.0)
    tl.store(dh_ptr + i, scaling * dh * derivative(z, ACTIVATION), mask=inside)


@triton.jit
def _up_project_gradients_kernel(
    dy_ptr, s_ptr, bias_ptr, dw_ptr, dbias_ptr,
    M, N, R,
    stride_dym, stride_dyn, stride_sm, stride_part, stride_dwn,
    scaling,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, SPLITS: tl.constexpr,
    ACTIVATION: tl.constexpr, BIAS: tl.constexpr, NEED_DW: tl.constexpr, NEED_DBIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dw[p] [N, R] = scaling · dy [M, N]ᵀ act(s [M, R] + bias) and dbias[p] [N] = scaling · Σ dy over every SPLITS-th
    block of M, fp32 accumulate."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    part = tl.program_id(2).to(tl.int64)
    if BIAS:
        bias = tl.load(bias_ptr + r, mask=r < R, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    dbias = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(tl.program_id(2) * BLOCK_M, M, BLOCK_M * SPLITS):
        m = start + tl.arange(0, BLOCK_M).to(tl.int64)
        dy = tl.load(dy_ptr + m[:, None] * stride_dym + n[None, :].to(tl.int64) * stride_dyn,
                     mask=(m[:, None] < M) & (n[None, :] < N), other=0.0)  # fmt: skip
        if NEED_DW:
            z = tl.load(s_ptr + m[:, None] * stride_sm + r[None, :],
                        mask=(m[:, None] < M) & (r[None, :] < R), other=0.0)  # fmt: skip
            if BIAS:
                z += bias[None, :]
            dw = mixed_dot(tl.trans(dy), activate(z, ACTIVATION), dw, PRECISION)
        if NEED_DBIAS:
            dbias += tl.sum(dy.to(tl.float32), 0)
    if NEED_DW:
        tl.store(dw_ptr + part * stride_part + n[:, None].to(tl.int64) * stride_dwn + r[None, :], dw * scaling,
                 mask=(n[:, None] < N) & (r[None, :] < R))  # fmt: skip
    if NEED_DBIAS:
        tl.store(dbias_ptr + part * stride_part + n, dbias * scaling, mask=(n < N) & (tl.program_id(1) == 0))


def up_project(
    s: torch.Tensor, bias: torch.Tensor | None, weight: torch.Tensor, up_bias: torch.Tensor | None,
    activation: str, scaling: float, residual: torch.Tensor | None, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """See peft_ops.reference.bottleneck_adapter."""
    (M, R), N = s.shape, weight.shape[0]
    y = s.new_empty(M, N, dtype=dtype)
    if y.numel() == 0:
        return y
    arch = configs.arch_of(s.device)
    block_r = configs.block_r(R, arch, dtype)
    config = configs.launch("up_project", arch, dtype, M, block_r)
    bias, up_bias = (None if t is None else t.contiguous() for t in (bias, up_bias))
    res_strides = (0, 0) if residual is None else residual.stride()
    with device_guard(s):
        _up_project_kernel[triton.cdiv(M, config["BLOCK_M"]), triton.cdiv(N, config["BLOCK_N"])](
            s, s if bias is None else bias, weight, s if up_bias is None else up_bias,
            s if residual is None else residual, y, M, N, R, s.stride(0), *weight.stride(), *res_strides, N, scaling,
            BLOCK_R=block_r, ACTIVATION=activation, BIAS=bias is not None,
            UP_BIAS=up_bias is not None, RESIDUAL=residual is not None,
            PRECISION=configs.update_precision(arch, dtype), **config,
        )  # fmt: skip
    return y


def up_project_gradients(
    dy: torch.Tensor, s: torch.Tensor, bias: torch.Tensor | None, weight: torch.Tensor,
    activation: str, scaling: float, need_weight: bool, need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """See peft_ops.reference.bottleneck_adapter; parts are added in a fixed order.

    dy is read twice, for dz and for dweight with dup_bias: in one read dz would need a partial sum from every block of
    N, which for m >= 32 are more bytes than a second read.
    """
    bias = None if bias is None else bias.contiguous()
    dz = _bottleneck_gradient_(down_project(dy, weight.t(), 0.0, None), s, bias, activation, scaling)
    if not (need_weight or need_bias):
        return dz, None, None
    (M, N), R = dy.shape, s.shape[1]
    arch = configs.arch_of(dy.device)
    block_r = configs.block_r(R, arch, dy.dtype)
    config = configs.launch("up_project_gradients", arch, dy.dtype, M, block_r)
    blocks = triton.cdiv(N, config["BLOCK_N"]), triton.cdiv(R, block_r) if need_weight else 1
    parts = configs.splits(blocks[0] * blocks[1], triton.cdiv(M, config["BLOCK_M"]))
    size = N * R if need_weight else 0  # of dweight; dup_bias lies behind it
    sums = dy.new_empty(parts, size + (N if need_bias else 0), dtype=torch.float32)
    if dy.numel() == 0:
        sums.zero_()
    else:
        with device_guard(dy):
            _up_project_gradients_kernel[(*blocks, parts)](
                dy, s, s if bias is None else bias, sums, sums[:, size:], M, N, R, *dy.stride(), s.stride(0),
                sums.stride(0), R, scaling, BLOCK_R=block_r, SPLITS=parts, ACTIVATION=activation,
                BIAS=bias is not None, NEED_DW=need_weight, NEED_DBIAS=need_bias,
                PRECISION=configs.fp32_precision(arch), **config,
            )  # fmt: skip
    total = sums[0] if parts == 1 else sums.sum(0)
    return dz, total[:size].view(N, R) if need_weight else None, total[size:] if need_bias else None


def _bottleneck_gradient_(
    dh: torch.Tensor, s: torch.Tensor, bias: torch.Tensor | None, activation: str, scaling: float
) -> torch.Tensor:
    """dh [M, R] overwritten by dz and returned; both it and s are contiguous."""
    if dh.numel() == 0:
        return dh
    config = configs.launch("bottleneck_gradient", configs.arch_of(dh.device), dh.dtype)
    with device_guard(dh):
        _bottleneck_gradient_kernel[(triton.cdiv(dh.numel(), config["BLOCK"]),)](
            dh, s, s if bias is None else bias, dh.numel(), dh.shape[1], scaling,
            ACTIVATION=activation, BIAS=bias is not None, **config,
        )  # fmt: skip
    return dh
