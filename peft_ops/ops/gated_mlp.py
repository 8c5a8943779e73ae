"""y = down(act(gate(x)) · up(x)): the MLP of a Llama-like block in one op, which recomputes what it can."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .._backend import implementation
from ..reference import formulas
from ..reference.activations import ACTIVATIONS, activate
from ._arguments import autocast_input, functorch_active, without_autocast
from ._grouped import (
    Backward,
    batch_seeds,
    joined,
    kept_s,
    mask_seeds,
    masked,
    needs_of,
    needs_x,
    plan_of,
    project_down,
    project_up,
    seeds_of_each,
    tensors_of,
)
from .bottleneck_adapter import known_activation
from .lora_projections import lora_projections
from .projection import Projection, check_projection

OP = "gated"


class _GatedMLP(torch.autograd.Function):
    """Saves x, S of gate and up, S of down, g = gate(x), u = up(x), the seeds, and references to parameters; h is
    computed again. first: the plan of gate and up; last: of down. The tensors are the seeds of first and last, then
    tensors_of gate, up and down."""

    @staticmethod
    @without_autocast
    def forward(ctx, x, activation, first, last, *tensors):
        seeds_1, seeds_2, (gate, up, down) = _parts(first, last, tensors)
        s = project_down(x, first, (gate, up), seeds_1)
        g, u = project_up(x, first, (gate, up), s)
        h = implementation(OP, g).gated(g, u, activation)
        s_2 = project_down(h, last, (down,), seeds_2)
        (y,) = project_up(h, last, (down,), s_2)
        need_dx, needs_1, needs_2 = _needs(ctx, first, last)
        need_dh = need_dx or any(map(any, needs_1))
        kept = [*kept_s(first, s, needs_1), *kept_s(last, s_2, needs_2)]
        kept += [x if needs_x(needs_1) else None, *((g, u) if need_dh or needs_x(needs_2) else (None, None))]
        ctx.save_for_backward(
            *kept, *tensors[: len(seeds_1) + len(seeds_2)], *tensors_of((gate, up, down), with_bias=False)
        )
        ctx.activation, ctx.plans = activation, (first, last)
        return y

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dy):
        (first, last), saved = ctx.plans, ctx.saved_tensors
        n, m = len(first.batches), len(last.batches)
        s, s_2, (x, g, u) = saved[:n], saved[n : n + m], saved[n + m : n + m + 3]
        seeds_1, seeds_2, (gate, up, down) = _parts(first, last, saved[n + m + 3 :])
        need_dx, needs_1, needs_2 = _needs(ctx, first, last)
        need_dh, h, dx = need_dx or any(map(any, needs_1)), None, None
        outer = Backward((dy,), last, (down,), seeds_2, s_2, needs_2, need_dh)
        if need_dh:
            h, dg, du = implementation(OP, g).gated_gradients(outer.dx(), g, u, ctx.activation)
        elif g is not None:
            h = implementation(OP, g).gated(g, u, ctx.activation)
        of_down = outer.parameters(h)
        if not need_dh:
            return None, None, None, None, *[None] * (n + m + 8), *of_down
        h = None
        inner = Backward((dg, du), first, (gate, up), seeds_1, s, needs_1, need_dx)
        dx = inner.dx() if need_dx else None
        return dx, None, None, None, *[None] * (n + m), *inner.parameters(x), *of_down


def _parts(first, last, tensors):
    """(seeds of gate and up, seeds of down, the three projections)."""
    n, m = len(first.batches), len(last.batches)
    rest = tensors[n + m :]
    return tensors[:n], tensors[n : n + m], [*joined(first, rest[:8]), *joined(last, rest[8:])]


def _needs(ctx, first, last):
    """(whether x needs a gradient, the Needs of gate and up, those of down)."""
    flags = ctx.needs_input_grad[4 + len(first.batches) + len(last.batches) :]
    return ctx.needs_input_grad[0], needs_of(flags[:8]), needs_of(flags[8:])


def gated_mlp(
    x: torch.Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    activation: str = "silu",
    seeds: Sequence[int | torch.Tensor] | torch.Tensor | None = None,
) -> torch.Tensor:
    """The gated MLP of a Llama-like block, each of its three linear layers with or without an adapter.

    For the backward x, gate(x), up(x) and the low-rank S are kept; act(gate(x)) and its product are computed again,
    in the pass that makes their gradients. gate and up share x as in `lora_projections`.

    Args:
        x: [..., K], floating point; under autocast it is cast first, as by nn.Linear.
        gate, up: [I, K] each, down: [N, I]; each what `lora_linear` takes. Gradients go to all of their tensors that
            require one.
        activation: "silu" (SwiGLU), "gelu" or "gelu_new" (GeGLU, by erf or tanh), "relu" (ReGLU), or another of
            `bottleneck_adapter`'s.
        seeds: of the dropout masks of gate, up and down; see `lora_projections`.

    Returns: [..., N], the dtype of x. act(gate(x)) · up(x) is computed in float32 and rounded once.

    Raises:
        TypeError, ValueError: what `lora_linear` raises, the projection named; an unknown activation.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020, section 2.
    """
    x = autocast_input(x) if isinstance(x, torch.Tensor) else x
    gate, up, down = projections = [Projection(*q) for q in (gate, up, down)]
    check_gated(x, gate, up, down)
    activation, flat = known_activation(activation), x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if torch.compiler.is_exporting():  # its layers are nodes of their own, and nothing is kept for a backward
        wide = torch.promote_types(x.dtype, torch.float32)
        g, u = lora_projections(x, (gate, up), None if seeds is None else seeds[:2])
        h = (activate(g.to(wide), activation) * u.to(wide)).to(x.dtype)
        return lora_projections(h, (down,), None if seeds is None else seeds[2:])[0]
    drawn = mask_seeds(projections, seeds, x.device)
    if functorch_active():
        y = formulas.gated_mlp(flat, gate, up, down, activation, seeds_of_each(projections, drawn))
    else:
        first, last = plan_of(projections[:2]), plan_of(projections[2:])
        k = len(masked(projections[:2]))
        seeds_1 = batch_seeds(first, projections[:2], None if drawn is None else drawn[:k])
        seeds_2 = batch_seeds(last, projections[2:], None if drawn is None else drawn[k:])
        y = _GatedMLP.apply(flat, activation, first, last, *seeds_1, *seeds_2, *tensors_of(projections))
    return y.view(*x.shape[:-1], y.shape[-1])


def check_gated(x: torch.Tensor, gate: Projection, up: Projection, down: Projection) -> None:
    """The three fit x and one another."""
    check_projection("gate", x, gate)
    check_projection("up", x, up)
    if up.weight.shape != gate.weight.shape:
        raise ValueError(f"up.weight must be {tuple(gate.weight.shape)} as gate.weight, got {tuple(up.weight.shape)}")
    check_projection("down", x.new_empty(0, gate.weight.shape[0]), down)


def activation_of(function: Any) -> str | None:
    """The name of an elementwise function among `gated_mlp`'s activations, found by what it computes; None if it is
    none of them, or has parameters."""
    if isinstance(function, torch.nn.Module) and next(function.parameters(), None) is not None:
        return None
    far = torch.tensor([-1e4, -50.0, 50.0, 1e4], device="cpu")  # where clipped ones differ
    z = torch.cat((torch.linspace(-6.0, 6.0, 97, device="cpu"), far))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            values = function(z.clone())
    except Exception:  # whatever another's function raises of such an argument, it is none of ours
        return None
    if not isinstance(values, torch.Tensor) or values.shape != z.shape:
        return None
    fitting = (name for name in ACTIVATIONS if torch.allclose(values, activate(z, name), rtol=1e-5, atol=1e-6))
    return next(fitting, None)
