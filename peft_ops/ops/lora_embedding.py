"""y = c · (E[x] + scaling · A[:, x]ᵀ Bᵀ): rows of an embedding with an adapter, differentiable in E, A and B."""

import torch
from torch.autograd.function import once_differentiable

from .._backend import implementation
from ..reference import formulas
from ._arguments import check_adapter, check_device, functorch_active, without_autocast
from ._exported import kept_by_export


class _LoRAEmbedding(torch.autograd.Function):
    """Saves x and references to parameters: the r numbers of A for each index are gathered again in the backward."""

    @staticmethod
    @without_autocast
    def forward(ctx, x, weight, a, b, scaling, padding_idx, by_frequency, scale):
        ctx.scale, ctx.scaling = scale, scaling
        ctx.rows = weight.shape[0], -1 if padding_idx is None else padding_idx, by_frequency
        ctx.save_for_backward(x, a, b)
        y = torch.embedding(weight, x)
        if scale is not None:
            y, b = y * scale, b * scale
        return implementation("low_rank", y).low_rank_update_(y, _gathered(a, x), b, scaling, 0.0, None)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dy):
        x, a, b = ctx.saved_tensors
        _, need_dw, need_da, need_db = ctx.needs_input_grad[:4]
        scale, ds, db = 1.0 if ctx.scale is None else ctx.scale, None, None
        if need_da or need_db:
            s = _gathered(a, x) if need_db else None
            ds, db = implementation("low_rank", dy).low_rank_gradients(dy, s, b * scale, ctx.scaling)
        dw = torch.ops.aten.embedding_dense_backward(dy * scale, x, *ctx.rows) if need_dw else None
        da = torch.ops.aten.embedding_dense_backward(ds, x, *ctx.rows).t().to(a.dtype) if need_da else None
        return None, dw, da, None if db is None else (db * scale).to(b.dtype), None, None, None, None


def _gathered(a: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A[:, x]ᵀ [M, r], at least float32."""
    return torch.embedding(a.t(), x).to(torch.promote_types(a.dtype, torch.float32))


def lora_embedding(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
    embed_scale: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """Rows of an embedding with a low-rank adapter: what is read and written is those rows, not the [V, d] product.

    Args:
        x: [...], int64 or int32 indices.
        weight: [V, d]. One that requires a gradient gets one.
        lora_a, lora_b: [r, V] and [d, r], any floating dtype.
        scaling: lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA.
        padding_idx: the row whose weight and A get no gradient.
        scale_grad_by_freq: their gradients are divided by how often an index occurs, as in nn.Embedding.
        embed_scale: c, a number or a 0-dim tensor; None is 1.

    Returns: [..., d], the dtype of weight.

    Raises:
        TypeError: x not integer, weight or adapters not floating point, a DTensor.
        ValueError: shapes that do not fit, r < 1, tensors on different devices.
        IndexError: on a CPU, an index outside [0, V).

    Source: Hugging Face PEFT and loralib 0.1, `Embedding`; neither applies dropout here.
    """
    if not isinstance(x, torch.Tensor) or x.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"x must be an int64 or int32 tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.dim() != 2:
        given = (weight.dtype, tuple(weight.shape)) if isinstance(weight, torch.Tensor) else type(weight).__name__
        raise TypeError(f"weight must be a floating-point tensor [V, d], got {given}")
    check_device(x, weight=weight)
    check_adapter(x, weight.t(), lora_a, lora_b)
    if torch.compiler.is_exporting():
        scale = torch.as_tensor(1.0 if embed_scale is None else embed_scale, dtype=weight.dtype, device=weight.device)
        return _exported(x, weight, lora_a, lora_b, float(scaling), scale)
    flat, scaling = x.reshape(-1), float(scaling)
    arguments = flat, weight, lora_a, lora_b, scaling, padding_idx, scale_grad_by_freq, embed_scale
    y = formulas.lora_embedding(*arguments) if functorch_active() else _LoRAEmbedding.apply(*arguments)
    return y.view(*x.shape, weight.shape[1])


_exported = kept_by_export(  # padding_idx and frequencies matter to gradients alone
    "lora_embedding(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, float scaling, Tensor embed_scale) "
    "-> Tensor",
    lambda x, weight, a, b, scaling, scale: lora_embedding(x, weight, a, b, scaling, embed_scale=scale),
    lambda x, weight, a, b, scaling, scale: weight.new_empty(*x.shape, weight.shape[1]),
)
