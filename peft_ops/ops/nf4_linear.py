"""y = x deq(W)ᵀ + bias over a 4-bit weight, differentiable in x and bias."""

from typing import cast

import torch
from torch.autograd.function import once_differentiable

from .._backend import implementation
from ..nf4 import NF4Weight
from ..reference import formulas
from ._arguments import (
    as_rows,
    autocast_input,
    check_linear,
    functorch_active,
    recorded,
    shaped_as,
    without_autocast,
)
from ._exported import kept_by_export, restored_weight, rows_of, stored_weight

OP = "nf4_linear"


class _NF4Linear(torch.autograd.Function):
    """Saves nothing but a reference to the packed weight, which is decoded again in the backward."""

    @staticmethod
    def forward(ctx, x, bias, weight):
        ctx.weight, ctx.bias_dtype = weight, None if bias is None else bias.dtype
        return _computed(x, weight, bias)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dy):
        need_dx, need_dbias, _ = ctx.needs_input_grad
        dx = implementation(OP, dy).nf4_linear_dx(dy, ctx.weight) if need_dx else None
        return dx, dy.sum(0, dtype=ctx.bias_dtype) if need_dbias else None, None


def nf4_linear(x: torch.Tensor, weight: NF4Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """A linear layer over an NF4 weight, which is frozen: gradients flow to x and bias.

    Args:
        x: [..., K], floating point; under autocast it is cast first, as by nn.Linear.
        weight: [N, K] as peft_ops.nf4.quantize gives it; used in the dtype of x, whatever its own.
        bias: [N] or None.

    Returns: [..., N], the dtype of x.

    Raises:
        TypeError: x not floating point, weight not an NF4Weight, a DTensor.
        ValueError: shapes that do not fit, tensors on different devices.

    Source: Dettmers et al., "QLoRA", 2023, equation 5 without its adapter.
    """
    if not isinstance(weight, NF4Weight):
        raise TypeError(f"weight must be an NF4Weight, got {type(weight).__name__}")
    x = autocast_input(x) if isinstance(x, torch.Tensor) else x
    check_linear(x, weight, bias)
    if torch.compiler.is_exporting():
        return _exported(x, *stored_weight(weight), bias)
    flat = as_rows(x)
    if functorch_active():
        y = formulas.nf4_linear(flat, weight, bias)
    elif recorded(flat, bias):
        y = _NF4Linear.apply(flat, bias, weight)
    else:
        y = _computed(flat, weight, bias)
    return shaped_as(x, y)


@without_autocast
def _computed(x, weight, bias):
    return implementation(OP, x).nf4_linear(x, weight, bias)


_exported = kept_by_export(
    "nf4_linear(Tensor x, Tensor[] weight, int[] nf4, Tensor? bias) -> Tensor",
    lambda x, weight, nf4, bias: nf4_linear(x, cast(NF4Weight, restored_weight(weight, nf4, x.dtype)), bias),
    lambda x, weight, nf4, bias: rows_of(x, weight, nf4),
)
