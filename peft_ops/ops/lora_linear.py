"""y = x Wᵀ + bias + scaling · drop(x) Aᵀ Bᵀ over a dense or a 4-bit W, differentiable in everything trainable."""

import torch
from torch.autograd.function import once_differentiable

from .._backend import implementation
from ..nf4 import NF4Weight
from ..reference import formulas
from ._arguments import (
    as_rows,
    autocast_input,
    check_adapter,
    check_linear,
    functorch_active,
    mask_seed,
    recorded,
    shaped_as,
    without_autocast,
)
from ._exported import kept_by_export, restored_weight, rows_of, stored_weight


class _LoRALinear(torch.autograd.Function):
    """Saves x, S = drop(x) Aᵀ [M, r], the seed, and references to parameters; never a decoded weight or a mask."""

    @staticmethod
    def forward(ctx, x, dense, bias, a, b, seed, nf4, scaling, p):
        weight = dense if nf4 is None else nf4
        y, s = _computed(x, weight, bias, a, b, scaling, p, seed)
        need_x = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        ctx.save_for_backward(x if need_x else None, s if ctx.needs_input_grad[4] else None, dense, a, b, seed)
        ctx.nf4, ctx.scaling, ctx.p, ctx.bias_dtype = nf4, scaling, p, None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dy):
        x, s, dense, a, b, seed = ctx.saved_tensors
        need_dx, need_dw, need_dbias, need_da, need_db = ctx.needs_input_grad[:5]
        weight, ds, dx, da, db = dense if ctx.nf4 is None else ctx.nf4, None, None, None, None
        if need_dx or need_da or need_db:
            ds, db = implementation("low_rank", dy).low_rank_gradients(dy, s, b, ctx.scaling)
        if need_dx:
            dx = implementation("linear_low_rank", dy).linear_low_rank_dx(dy, weight, ds, a, ctx.p, seed)
        if need_da:
            da = implementation("down_project", dy).down_project_da(ds, x, ctx.p, seed).to(a.dtype)
        dw = (dy.t() @ x).to(dense.dtype) if need_dw else None
        dbias = dy.sum(0, dtype=ctx.bias_dtype) if need_dbias else None
        return dx, dw, dbias, da, None if db is None else db.to(b.dtype), None, None, None, None


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor | NF4Weight,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear layer with a low-rank adapter beside it.

    Args:
        x: [..., K], floating point; under autocast it is cast first, as by nn.Linear.
        weight: [N, K], dense in the dtype of x (any strides: a transposed Conv1D weight is used as it lies), or an
            NF4Weight. A dense weight that requires a gradient gets one.
        bias: [N] or None.
        lora_a, lora_b: [r, K] and [N, r], any floating dtype: float32 adapters on a 16-bit x are used as they are, with
            no float32 copy of x.
        scaling: lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA.
        dropout_p: of x on its way into lora_a, in [0, 1], in steps of 2**-16.
        seed: of the dropout mask, an int or a 0-dim int64 tensor on the device of x; None draws one from torch's
            generator of that device. One seed gives one mask on every backend.

    Returns: [..., N], the dtype of x.

    Raises:
        TypeError: x not floating point, a dense weight of another dtype, a DTensor.
        ValueError: shapes that do not fit, r < 1, dropout_p outside [0, 1], tensors on different devices.

    Source: Hu et al., "LoRA", 2021, section 4.1; dropout and scaling as in Hugging Face PEFT.
    """
    x = autocast_input(x) if isinstance(x, torch.Tensor) else x
    check_linear(x, weight, bias)
    check_adapter(x, weight, lora_a, lora_b)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be in [0, 1], got {dropout_p}")
    seed = mask_seed(seed, x.device) if 0.0 < dropout_p < 1.0 else None
    if torch.compiler.is_exporting():
        return _exported(x, *stored_weight(weight), bias, lora_a, lora_b, float(scaling), float(dropout_p), seed)
    flat, scaling, p = as_rows(x), float(scaling), float(dropout_p)
    dense, nf4 = (None, weight) if isinstance(weight, NF4Weight) else (weight, None)
    if functorch_active():
        y = formulas.lora_linear(flat, weight, bias, lora_a, lora_b, scaling, p, seed)
    elif recorded(flat, dense, bias, lora_a, lora_b):
        y = _LoRALinear.apply(flat, dense, bias, lora_a, lora_b, seed, nf4, scaling, p)
    else:
        y, _ = _computed(flat, weight, bias, lora_a, lora_b, scaling, p, seed)
    return shaped_as(x, y)


@without_autocast
def _computed(x, weight, bias, a, b, scaling, p, seed):
    return implementation("linear_low_rank", x).lora_linear(x, weight, bias, a, b, scaling, p, seed)


_exported = kept_by_export(
    "lora_linear(Tensor x, Tensor[] weight, int[] nf4, Tensor? bias, Tensor lora_a, Tensor lora_b, float scaling, "
    "float dropout_p, Tensor? seed) -> Tensor",
    lambda x, weight, nf4, *rest: lora_linear(x, restored_weight(weight, nf4, x.dtype), *rest),
    lambda x, weight, nf4, *rest: rows_of(x, weight, nf4),
)
