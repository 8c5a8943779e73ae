"""Linear layers with adapters that share x, in one op: x is read once for all adapters, dx is made once."""

from collections.abc import Sequence

import torch
from torch.autograd.function import once_differentiable

from ..nf4 import NF4Weight
from ..reference import formulas
from ._arguments import autocast_input, functorch_active, without_autocast
from ._grouped import (
    Backward,
    batch_seeds,
    joined,
    kept_s,
    mask_seeds,
    needs_of,
    needs_x,
    plan_of,
    project_down,
    project_up,
    seeds_of_each,
    tensors_of,
)
from .lora_linear import lora_linear
from .nf4_linear import nf4_linear
from .projection import Projection, check_projection


class _LoRAProjections(torch.autograd.Function):
    """Saves x, S = drop(x) [A; ...]ᵀ [M, ΣR], the seeds, and references to parameters; never a decoded weight or a
    mask. The tensors are the seeds of every batch, then tensors_of(projections)."""

    @staticmethod
    @without_autocast
    def forward(ctx, x, plan, *tensors):
        n = len(plan.batches)
        seeds, projections = tensors[:n], joined(plan, tensors[n:])
        s = project_down(x, plan, projections, seeds)
        needs = needs_of(ctx.needs_input_grad[2 + n :])
        kept = kept_s(plan, s, needs)
        ctx.save_for_backward(x if needs_x(needs) else None, *kept, *seeds, *tensors_of(projections, with_bias=False))
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        return tuple(project_up(x, plan, projections, s))

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, *dys):
        plan, (x, *tensors) = ctx.plan, ctx.saved_tensors
        n = len(plan.batches)
        s, seeds, projections = tensors[:n], tensors[n : 2 * n], joined(plan, tensors[2 * n :])
        need_dx, needs = ctx.needs_input_grad[0], needs_of(ctx.needs_input_grad[2 + n :])
        gradients = Backward(dys, plan, projections, seeds, s, needs, need_dx)
        dx = gradients.dx() if need_dx else None
        return dx, None, *[None] * n, *gradients.parameters(x)


def lora_projections(
    x: torch.Tensor,
    projections: Sequence[Projection],
    seeds: Sequence[int | torch.Tensor] | torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Linear layers that share x, each with or without an adapter: query, key and value, or gate and up.

    The results are those of `lora_linear` for each. x is read once for the down-projections of all adapters and once
    for their gradients, and the gradients of x are added up in one buffer; with dropout this holds for adapters of one
    rank and one p, which have a mask each.

    Args:
        x: [..., K], floating point; under autocast it is cast first, as by nn.Linear.
        projections: of in_features K each; what `lora_linear` takes. Gradients go to all of their tensors that require
            one.
        seeds: of the dropout masks, one for each projection: ints, 0-dim int64 tensors, or an int64 [len(projections)]
            on the device of x; None draws them from torch's generator of that device, as a call of `lora_linear` for
            each would on a CPU.

    Returns: [..., N] of each, the dtype of x.

    Raises:
        TypeError, ValueError: what `lora_linear` raises, the projection named by its index; a number of seeds that is
            not that of the projections.

    Source: Hu et al., "LoRA", 2021, section 4.1.
    """
    x = autocast_input(x) if isinstance(x, torch.Tensor) else x
    projections = [Projection(*projection) for projection in projections]
    for i, projection in enumerate(projections):
        check_projection(f"projections[{i}]", x, projection)
    if not projections:
        return ()
    if torch.compiler.is_exporting():
        return tuple(_alone(x, q, None if seeds is None else seeds[i]) for i, q in enumerate(projections))
    plan, flat = plan_of(projections), x.reshape(x.shape[:-1].numel(), x.shape[-1])
    drawn = mask_seeds(projections, seeds, x.device)
    if functorch_active():
        ys = formulas.lora_projections(flat, projections, seeds_of_each(projections, drawn))
    else:
        ys = _LoRAProjections.apply(flat, plan, *batch_seeds(plan, projections, drawn), *tensors_of(projections))
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)


def _alone(x: torch.Tensor, q: Projection, seed: int | torch.Tensor | None) -> torch.Tensor:
    """One of them, as an op that torch.export keeps."""
    if q.lora_a is not None and q.lora_b is not None:
        return lora_linear(x, q.weight, q.bias, q.lora_a, q.lora_b, q.scaling, q.dropout_p, seed)
    if isinstance(q.weight, NF4Weight):
        return nf4_linear(x, q.weight, q.bias)
    return torch.nn.functional.linear(x, q.weight, q.bias)
