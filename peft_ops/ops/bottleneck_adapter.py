"""y = residual + scaling · (act(x W_downᵀ + b_down) W_upᵀ + b_up), differentiable in everything trainable."""

import torch
from torch.autograd.function import once_differentiable

from .._backend import implementation
from ..reference import formulas
from ..reference.activations import ACTIVATIONS, ALIASES
from ._arguments import autocast_input, check_bottleneck, functorch_active, without_autocast
from ._exported import kept_by_export

OP = "bottleneck_adapter"


class _BottleneckAdapter(torch.autograd.Function):
    """Saves x where W_down is trained, s = x W_downᵀ [M, m], and references to parameters.

    Where the residual is x itself (`add_x`, residual None) its gradient joins dx in the pass that makes dx.
    """

    @staticmethod
    @without_autocast
    def forward(ctx, x, down_weight, down_bias, up_weight, up_bias, residual, activation, scaling, add_x):
        s = implementation("down_project", x).down_project(x, down_weight, 0.0, None)
        ctx.activation, ctx.scaling, ctx.add_x, ctx.x_dtype = activation, scaling, add_x, x.dtype
        ctx.up_bias_dtype, ctx.residual_dtype = (None if t is None else t.dtype for t in (up_bias, residual))
        need_s = any(ctx.needs_input_grad[:5])
        ctx.save_for_backward(
            x if ctx.needs_input_grad[1] else None, s if need_s else None, down_weight, down_bias, up_weight
        )
        onto = x if add_x else residual
        like = x if onto is None or x.dtype.itemsize > onto.dtype.itemsize else onto
        dtype = x.dtype if onto is None else torch.promote_types(x.dtype, onto.dtype)
        up_project = implementation(OP, like).up_project
        return up_project(s, down_bias, up_weight, up_bias, activation, scaling, onto, dtype)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dy):
        x, s, down_weight, down_bias, up_weight = ctx.saved_tensors
        need_dx, need_dw, need_db, need_duw, need_dub, need_dresidual = ctx.needs_input_grad[:6]
        dx, dw, db, duw, dub, dz = (None,) * 6
        if s is not None:
            dz, duw, dub = implementation(OP, dy).up_project_gradients(
                dy, s, down_bias, up_weight, ctx.activation, ctx.scaling, need_duw, need_dub
            )
        if need_dx:
            onto, w = dy if ctx.add_x else None, down_weight.t()
            dx = implementation(OP, dy).up_project(dz, None, w, None, "linear", 1.0, onto, ctx.x_dtype)
        if need_dw:
            dw = implementation("down_project", dy).down_project_da(dz, x, 0.0, None).to(down_weight.dtype)
        if need_db and dz is not None:
            db = dz.sum(0).to(down_bias.dtype)
        duw = None if duw is None else duw.to(up_weight.dtype)
        dub = None if dub is None else dub.to(ctx.up_bias_dtype)
        return dx, dw, db, duw, dub, dy.to(ctx.residual_dtype) if need_dresidual else None, None, None, None


def bottleneck_adapter(
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    activation: str = "gelu",
    scaling: float = 1.0,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """A bottleneck adapter: down to m features, a nonlinearity, up again, added to a residual.

    Args:
        x: [..., K], floating point. Under autocast it is cast first, as by nn.Linear, unless it is the residual too:
            then it keeps its precision, and is read as it lies.
        down_weight, down_bias: [m, K] and [m] or None, any floating dtype: float32 parameters on a 16-bit x are used as
            they are, with no float32 copy of x.
        up_weight, up_bias: [N, m] and [N] or None.
        activation: "relu", "leakyrelu" (slope 0.01), "gelu" (by erf), "gelu_new" (by tanh), "silu" or "swish", "tanh",
            "linear".
        scaling: of all that is added to the residual.
        residual: [..., N] or None for none; x itself for y = x + ..., whose two gradients then take one pass. It is not
            written to.

    Returns: [..., N], the dtype of x, or what it and residual promote to.

    Raises:
        TypeError: x, residual or a parameter that is not floating point, a DTensor.
        ValueError: shapes that do not fit, m < 1, an unknown activation, tensors on different devices.

    Source: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", 2019, section 2.1; scaling and another
    residual than x as in He et al., "Towards a Unified View of Parameter-Efficient Transfer Learning", 2022.
    """
    add_x = residual is x
    x = autocast_input(x) if isinstance(x, torch.Tensor) and not add_x else x
    check_bottleneck(x, down_weight, down_bias, up_weight, up_bias, residual)
    activation, scaling = known_activation(activation), float(scaling)
    if torch.compiler.is_exporting():
        return _exported(x, down_weight, down_bias, up_weight, up_bias, activation, scaling, residual)
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    onto = None if residual is None or add_x else residual.reshape(flat.shape[0], residual.shape[-1])
    weights = down_weight, down_bias, up_weight, up_bias
    if functorch_active():
        y = formulas.bottleneck_adapter(flat, *weights, activation, scaling, flat if add_x else onto)
    else:
        y = _BottleneckAdapter.apply(flat, *weights, onto, activation, scaling, add_x)
    return y.view(*x.shape[:-1], up_weight.shape[0])


def known_activation(activation: str) -> str:
    """The canonical name of an activation.

    Raises:
        ValueError: an unknown one.
    """
    canonical = ALIASES.get(activation, activation) if isinstance(activation, str) else activation
    if canonical not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join((*ACTIVATIONS, *ALIASES))}, got {activation!r}")
    return canonical


_exported = kept_by_export(
    "bottleneck_adapter(Tensor x, Tensor down_weight, Tensor? down_bias, Tensor up_weight, Tensor? up_bias, "
    "str activation, float scaling, Tensor? residual) -> Tensor",
    bottleneck_adapter,
    lambda x, down_weight, down_bias, up_weight, up_bias, activation, scaling, residual: x.new_empty(
        *x.shape[:-1],
        up_weight.shape[0],
        dtype=torch.promote_types(x.dtype, (x if residual is None else residual).dtype),
    ),
)
