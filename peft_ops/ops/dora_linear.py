"""y = g ∘ (x Wᵀ + scaling · drop(x) Aᵀ Bᵀ) + bias with g = magnitude / ‖W + scaling · B A‖, over a dense or 4-bit W."""

import torch
from torch.autograd.function import once_differentiable

from .._backend import implementation
from ..nf4 import NF4Weight
from ..reference import formulas
from ._arguments import (
    autocast_input,
    check_adapter,
    check_device,
    check_linear,
    check_magnitude,
    check_weight,
    functorch_active,
    mask_seed,
    stored,
    without_autocast,
)
from ._exported import kept_by_export, restored_weight, rows_of, stored_weight


class _DoRALinear(torch.autograd.Function):
    """Saves x, S = drop(x) Aᵀ [M, r], u = x Wᵀ [M, N] where the magnitude is trained, g and norm [N], the seed, and
    references to parameters."""

    @staticmethod
    @without_autocast
    def forward(ctx, x, dense, bias, a, b, magnitude, seed, nf4, scaling, p):
        _, need_dw, _, need_da, need_db, need_dm = ctx.needs_input_grad[:6]
        weight, dora = dense if nf4 is None else nf4, implementation("dora", x)
        norm = dora.dora_norm(weight, a, b, scaling)
        g = magnitude / norm
        s = implementation("down_project", x).down_project(x, a, p, seed)
        y, u = dora.dora_linear(x, weight, bias, s, b, scaling, g, need_dm)
        kept = x if need_dw or need_da else None, s if need_db or need_dm else None, u, norm if need_dm else None
        ctx.save_for_backward(*kept, dense, a, b, g, seed)
        ctx.nf4, ctx.scaling, ctx.p, ctx.bias_dtype = nf4, scaling, p, None if bias is None else bias.dtype
        ctx.magnitude_dtype = magnitude.dtype
        return y

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dy):
        x, s, u, norm, dense, a, b, g, seed = ctx.saved_tensors
        need_dx, need_dw, need_dbias, need_da, need_db, need_dm = ctx.needs_input_grad[:6]
        ds = db = dx = dw = da = dm = None
        if need_dx or need_da or need_db or need_dm:  # of the unscaled output: g ∘ b scales ds, and db is scaled last
            ds, db = implementation("low_rank", dy).low_rank_gradients(dy, s, g[:, None] * b, ctx.scaling)
        dz, dg = implementation("dora", dy).dora_gradients(dy, u, g, need_dx or need_dw)
        if need_dx:
            weight = dense if ctx.nf4 is None else ctx.nf4
            dx = implementation("linear_low_rank", dy).linear_low_rank_dx(dz, weight, ds, a, ctx.p, seed)
        if need_dw:
            dw = (dz.t() @ x).to(dense.dtype)
        if need_da:
            da = implementation("down_project", dy).down_project_da(ds, x, ctx.p, seed).to(a.dtype)
        if need_dm:
            dm = ((db * b).sum(1) + dg).div_(norm).to(ctx.magnitude_dtype)
        if db is not None:
            db = (g[:, None] * db).to(b.dtype)
        dbias = dy.sum(0, dtype=ctx.bias_dtype) if need_dbias else None
        return dx, dw, dbias, da, db if need_db else None, dm, None, None, None, None


def dora_linear(
    x: torch.Tensor,
    weight: torch.Tensor | NF4Weight,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    magnitude: torch.Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear layer whose adapted weight is split into magnitude and direction.

    y = g ∘ (x Wᵀ + scaling · drop(x) Aᵀ Bᵀ) + bias with g = magnitude / ‖W + scaling · B A‖, the norm of each row of
    the [N, K] sum, which is never built. It is a constant to the backward, as section 4.3 of the paper proposes.

    Args:
        x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed: as for lora_linear.
        magnitude: [N], any floating dtype; starts as dora_norm(weight, lora_a, lora_b, scaling).

    At dropout_p = 0 this is what Hugging Face PEFT computes. With dropout PEFT computes
    x Wᵀ + (g - 1) ∘ drop(x) Wᵀ + g ∘ scaling · drop(x) Aᵀ Bᵀ: a second product with W, whose dropout adds noise to the
    frozen path. Here drop(x) goes into lora_a alone, as in LoRA; the expectation over masks is the same.

    Beside lora_linear, forward: one read of W (the norm), and the update scales and adds the bias as it passes y.
    Backward: one pass reads dy and u = x Wᵀ and writes g ∘ dy. u [M, N] is saved, in the dtype of x, only where the
    magnitude is trained: rebuilding it would cost the product with W again, and taking it from y would lose it where
    the bias is large or the magnitude zero, and forbid in-place operations on y.

    Returns: [..., N], the dtype of x.

    Raises:
        TypeError: x not floating point, a dense weight of another dtype, a DTensor.
        ValueError: shapes that do not fit, r < 1, dropout_p outside [0, 1], tensors on different devices.

    Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, arXiv 2402.09353, equations 5, 6 and 11.
    """
    x = autocast_input(x) if isinstance(x, torch.Tensor) else x
    check_linear(x, weight, bias)
    check_adapter(x, weight, lora_a, lora_b)
    check_magnitude(x, weight, magnitude)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be in [0, 1], got {dropout_p}")
    seed = mask_seed(seed, x.device) if 0.0 < dropout_p < 1.0 else None
    if torch.compiler.is_exporting():
        terms = bias, lora_a, lora_b, magnitude, float(scaling), float(dropout_p), seed
        return _exported(x, *stored_weight(weight), *terms)
    flat, scaling, p = x.reshape(x.shape[:-1].numel(), x.shape[-1]), float(scaling), float(dropout_p)
    dense, nf4 = (None, weight) if isinstance(weight, NF4Weight) else (weight, None)
    if functorch_active():
        y = formulas.dora_linear(flat, weight, bias, lora_a, lora_b, magnitude, scaling, p, seed)
    else:
        y = _DoRALinear.apply(flat, dense, bias, lora_a, lora_b, magnitude, seed, nf4, scaling, p)
    return y.view(*x.shape[:-1], weight.shape[0])


@torch.no_grad()
def dora_norm(
    weight: torch.Tensor | NF4Weight, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """‖W + scaling · B A‖ of each row, without the [N, K] sum in memory; no gradient flows.

    W, an NF4 one too, is read once, a tile at a time, and each element of the sum is squared as it is made. So the
    error is that of the sum written out, also where B A nearly cancels W; the expansion into ‖W‖² + 2 W·BA + ‖BA‖²
    reads W as often and loses half of the digits there.

    Args:
        weight: [N, K], dense with any strides or an NF4Weight, which is decoded in float32.
        lora_a, lora_b: [r, K] and [N, r].
        scaling: as for lora_linear.

    Returns: [N], float32 (float64 where an argument is), at least 1e-18, so that a row of zeros can be divided by.

    Raises:
        TypeError, ValueError: as dora_linear.

    Source: Liu et al., "DoRA", 2024, equation 5.
    """
    check_weight(weight)
    check_device(lora_a, "lora_a", weight=stored(weight), lora_b=lora_b)
    check_adapter(lora_a, weight, lora_a, lora_b)
    return implementation("dora", lora_a).dora_norm(weight, lora_a, lora_b, float(scaling))


_exported = kept_by_export(
    "dora_linear(Tensor x, Tensor[] weight, int[] nf4, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor magnitude, "
    "float scaling, float dropout_p, Tensor? seed) -> Tensor",
    lambda x, weight, nf4, *rest: dora_linear(x, restored_weight(weight, nf4, x.dtype), *rest),
    lambda x, weight, nf4, *rest: rows_of(x, weight, nf4),
)
