"""Each op whole, as its formula reads, differentiable by plain autograd: the truth in tests, and the path inside
torch.vmap and torch.func transforms. x [M, K]; float32 adapters on a 16-bit x are computed in float32."""

import torch

from .activations import activate
from .dora import NORM_FLOOR
from .dropout import dropout
from .nf4 import nf4_dequantize
from .prefix_attention import dropped_prefix


def nf4_linear(x: torch.Tensor, weight, bias: torch.Tensor | None) -> torch.Tensor:
    """x deq(W)ᵀ + bias."""
    w = nf4_dequantize(weight, x.dtype).view(weight.shape)
    return torch.nn.functional.linear(x, w, None if bias is None else bias.to(x.dtype))


def lora_linear(
    x: torch.Tensor, weight, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor,
    scaling: float, p: float, seed: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """x Wᵀ + bias + scaling · drop(x) aᵀ bᵀ."""
    if isinstance(weight, torch.Tensor):
        base = torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    else:
        base = nf4_linear(x, weight, bias)
    low_rank = dropout(x.to(torch.promote_types(x.dtype, a.dtype)), p, seed) @ a.t() @ b.t().to(a.dtype)
    return base + (scaling * low_rank).to(base.dtype)


def projection(x: torch.Tensor, projection, seed: torch.Tensor | None) -> torch.Tensor:
    """A layer with or without an adapter: `projection` has the other arguments of lora_linear, by their names there."""
    weight, bias, a, b, scaling, p = projection
    if a is not None:
        return lora_linear(x, weight, bias, a, b, scaling, p, seed)
    if isinstance(weight, torch.Tensor):
        return torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return nf4_linear(x, weight, bias)


def lora_projections(x: torch.Tensor, projections, seeds) -> tuple[torch.Tensor, ...]:
    """Each of the layers that share x."""
    return tuple(projection(x, q, seed) for q, seed in zip(projections, seeds, strict=True))


def gated_mlp(x: torch.Tensor, gate, up, down, activation: str, seeds) -> torch.Tensor:
    """down(act(gate(x)) · up(x))."""
    g, u = lora_projections(x, (gate, up), seeds[:2])
    return projection(activate(g, activation) * u, down, seeds[2])


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, mask: torch.Tensor | None,
    is_causal: bool,
) -> torch.Tensor:  # fmt: skip
    """softmax(scaling · q kᵀ + mask) v; softmax in float32. Each row sees a key."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    scores = query @ key.mT * scaling
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return weights.to(value.dtype) @ value


def prefix_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, prefix_key: torch.Tensor, prefix_value: torch.Tensor,
    scaling: float, mask: torch.Tensor | None, is_causal: bool, prefix_bias: torch.Tensor | None,
    dropout_p: float, prefix_p: float, prefix_seed: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """softmax([scaling · q pkᵀ + bias; scaling · q kᵀ + mask]) [pv; v], scores side by side; softmax in float32.

    The heads of query that share a key head are rows of one product, so that no key is repeated.
    """
    (B, H, T, _), (heads, n, _), S = query.shape, prefix_key.shape, key.shape[2]
    prefix_key, prefix_value = dropped_prefix(prefix_key, prefix_value, slice(0, B), B, prefix_p, prefix_seed)
    wide = torch.promote_types(query.dtype, prefix_key.dtype)
    rows = H // heads * T
    grouped = query.reshape(B, heads, rows, query.shape[-1])
    of_prefix = (grouped.to(wide) @ prefix_key.mT.to(wide) * scaling).view(B, H, T, n)
    of_text = (grouped @ key.mT * scaling).view(B, H, T, S)
    if prefix_bias is not None:
        of_prefix = of_prefix + prefix_bias
    if is_causal:
        mask = torch.ones(T, S, dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        of_text = of_text.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else of_text + mask
    scores = torch.cat((of_prefix, of_text), -1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    weights = torch.nn.functional.dropout(weights, dropout_p).view(B, heads, rows, n + S)
    out = weights[..., :n].to(wide) @ prefix_value.to(wide) + weights[..., n:].to(value.dtype) @ value
    return out.view(B, H, T, value.shape[-1]).to(query.dtype)


def dora_linear(
    x: torch.Tensor, weight, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, magnitude: torch.Tensor,
    scaling: float, p: float, seed: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """(magnitude / ‖W + scaling · b a‖) ∘ (x Wᵀ + scaling · drop(x) aᵀ bᵀ) + bias, the norm of each row detached."""
    g = magnitude / dora_norm(weight, a, b, scaling)
    y = g * lora_linear(x, weight, None, a, b, scaling, p, seed)
    return (y if bias is None else y + bias).to(x.dtype)


def dora_norm(weight, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """‖W + scaling · b a‖ of each row, a constant to autograd."""
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    if isinstance(weight, torch.Tensor):
        w = weight.to(torch.promote_types(wide, weight.dtype))
    else:
        w = nf4_dequantize(weight, wide).view(weight.shape)
    w = w.detach() + scaling * (b.detach().to(w.dtype) @ a.detach().to(w.dtype))
    return torch.linalg.vector_norm(w, dim=1).clamp_min(NORM_FLOOR)


def lora_embedding(
    x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float,
    padding_idx: int | None = None, scale_grad_by_freq: bool = False, embed_scale: float | torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """embed_scale · (weight[x] + scaling · a[:, x]ᵀ bᵀ)."""

    def rows(table: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(x, table, padding_idx, scale_grad_by_freq=scale_grad_by_freq)

    base, low_rank = rows(weight), scaling * (rows(a.t()) @ b.t().to(a.dtype))
    if embed_scale is not None:
        base, low_rank = base * embed_scale, low_rank * embed_scale
    return base + low_rank.to(base.dtype)


def bottleneck_adapter(
    x: torch.Tensor, down_weight: torch.Tensor, down_bias: torch.Tensor | None, up_weight: torch.Tensor,
    up_bias: torch.Tensor | None, activation: str, scaling: float, residual: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """residual + scaling · (act(x W_downᵀ + b_down) W_upᵀ + b_up), in the dtype that x and residual promote to."""
    wide = torch.promote_types(x.dtype, down_weight.dtype)
    down_bias, up_bias = (None if t is None else t.to(wide) for t in (down_bias, up_bias))
    z = torch.nn.functional.linear(x.to(wide), down_weight.to(wide), down_bias)
    term = scaling * torch.nn.functional.linear(activate(z, activation), up_weight.to(wide), up_bias)
    if residual is None:
        return term.to(x.dtype)
    return (residual + term).to(torch.promote_types(x.dtype, residual.dtype))


def linear_logprob(
    x: torch.Tensor, weight, bias: torch.Tensor | None, a: torch.Tensor | None, b: torch.Tensor | None,
    targets: torch.Tensor, scaling: float, p: float, seed: torch.Tensor | None,
    logit_scale: float, softcap: float | None, temperature: float, ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(log softmax(z) of each target, entropy of softmax(z)), [M] each, with z = cap(logit_scale · (x Wᵀ + bias +
    scaling · drop(x) aᵀ bᵀ)) / temperature, cap(z) = softcap · tanh(z / softcap); logits [M, V] in float32. 0 where
    the target is ignore_index."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if a is None or b is None:
        dense = weight if isinstance(weight, torch.Tensor) else nf4_dequantize(weight, x.dtype).view(weight.shape)
        z = torch.nn.functional.linear(x, dense.to(x.dtype), None if bias is None else bias.to(x.dtype))
    else:
        z = lora_linear(x, weight, bias, a, b, scaling, p, seed)
    z = z.to(wide) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    logp = torch.log_softmax(z / temperature, -1)
    counted = targets != ignore_index
    chosen = logp.gather(-1, targets.masked_fill(~counted, 0)[:, None])[:, 0]
    entropy = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0)).sum(-1)
    return torch.where(counted, chosen, 0), torch.where(counted, entropy, 0)
