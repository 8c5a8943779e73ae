"""log softmax(head(hidden)) of chosen tokens, entropy and cross-entropy, without the [tokens, vocabulary] logits."""

from typing import NamedTuple

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
    check_positive,
    check_probability,
    functorch_active,
    mask_seed,
    without_autocast,
)

OP = "linear_logprob"


class TokenLogProbs(NamedTuple):
    """Of every token, shaped as targets, float32 (float64 for float64 hidden states); 0 where the target is ignored.

    logp: of the target. entropy: of the whole distribution, in nats; None where not asked for. reference: as logp, of
    the reference hidden states and without a gradient; None where there are none.
    """

    logp: torch.Tensor
    entropy: torch.Tensor | None = None
    reference: torch.Tensor | None = None


class _LinearLogProb(torch.autograd.Function):
    """Saves references to parameters and, [M, ...] each: with a frozen dense or NF4 head the slope ∂logp/∂hidden, which
    is all that the backward of logp needs; else hidden, lse, and S = drop(hidden) Aᵀ. Both where entropy is asked for.
    """

    @staticmethod
    @without_autocast
    def forward(ctx, x, dense, bias, a, b, targets, seed, nf4, scaling, p, reference, logits, need_entropy, training):
        need_dx, *need_head = ctx.needs_input_grad[:5]
        M, s = x.shape[0], None
        if a is not None:
            s = implementation("down_project", x).down_project(x, a, p, seed)
        rows, all_s, all_targets = x, s, targets
        if reference is not None:  # one pass over the head; the reference's rows have no low-rank term
            rows, all_targets = torch.cat((x, reference)), targets.repeat(2)
            all_s = None if s is None else torch.cat((s, torch.zeros_like(s)))
        weight, frozen = dense if nf4 is None else nf4, a is None and not any(need_head)
        logp, lse, entropy, slope = implementation(OP, x).linear_logprob(
            rows, weight, bias, all_s, b, scaling, all_targets, *logits, need_entropy,
            M if training and need_dx and frozen else 0,
        )  # fmt: skip
        again = training and (slope is None or need_entropy)
        kept = (x, s, lse[:M], None if entropy is None else entropy[:M]) if again else (None,) * 4
        ctx.save_for_backward(*kept, slope, dense, bias, a, b, targets, seed)
        ctx.nf4, ctx.scaling, ctx.p, ctx.logits = nf4, scaling, p, logits
        ctx.set_materialize_grads(False)
        other = logp[M:] if reference is not None else None
        if other is not None:
            ctx.mark_non_differentiable(other)
        return logp[:M], None if entropy is None else entropy[:M], other

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dlogp, dentropy, _):
        x, s, lse, entropy, slope, dense, bias, a, b, targets, seed = ctx.saved_tensors
        dx = dw = dbias = ds = da = db = None
        need_dx, need_dw, need_dbias, need_da, need_db = ctx.needs_input_grad[:5]
        if slope is not None and dentropy is None:
            dx = None if dlogp is None else (dlogp[:, None] * slope).to(slope.dtype)
        elif dlogp is not None or dentropy is not None:
            weight, wide = dense if ctx.nf4 is None else ctx.nf4, torch.zeros_like(lse) if dlogp is None else dlogp
            dx, dw, dbias, ds, db = implementation(OP, x).linear_logprob_gradients(
                x, weight, bias, s, b, ctx.scaling, targets, *ctx.logits, lse, entropy, wide, dentropy,
                need_dx, need_dw, need_dbias,
            )  # fmt: skip
        if dx is not None and ds is not None:
            dx = implementation("low_rank", dx).low_rank_update_(dx, ds, a.t(), 1.0, ctx.p, seed)
        if need_da and ds is not None:
            da = implementation("down_project", x).down_project_da(ds, x, ctx.p, seed).to(a.dtype)
        dbias = None if dbias is None else dbias.to(bias.dtype)
        db = db.to(b.dtype) if need_db and db is not None else None
        return dx, dw, dbias, da, db, *(None,) * 9


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor | NF4Weight,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    lora_a: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
    reference_hidden: torch.Tensor | None = None,
) -> TokenLogProbs:
    """log softmax(z) of one logit per token, for z = cap(logit_scale · u) / temperature, u = hidden Wᵀ + bias +
    scaling · drop(hidden) Aᵀ Bᵀ and cap(v) = softcap · tanh(v / softcap).

    Logits are computed in tiles and never stored: beyond hidden states and what is returned, memory does not grow with
    the vocabulary. They are float32 sums, not rounded to the dtype of hidden, and so is everything that follows.

    Differentiable in hidden and in whatever of the head requires a gradient. With a frozen head and no low-rank term
    the forward makes the gradient of hidden as well, in the same pass (where gradients are enabled), and the backward
    is a product by element. Else tiles of logits are computed again.

    Args:
        hidden: [..., K], floating point: what the head is given, after the final norm.
        weight: [V, K], dense in the dtype of hidden (any strides) or an NF4Weight, as for lora_linear.
        bias: [V] or None; -inf masks a token out.
        targets: [...] int64, the token that follows each hidden state: shift them before.
        lora_a, lora_b, scaling, dropout_p, seed: as for lora_linear; both None: a head without an adapter.
        logit_scale: of Cohere's models; 1 / logits_scaling of Granite's.
        softcap: of Gemma 2's (final_logit_softcapping); None: not capped.
        temperature: above 0; divides the logits last, as in sampling.
        ignore_index: the target of tokens that do not count: their results and gradients are 0, whatever their hidden
            states hold, and cost nothing.
        entropy: also return the entropy of every distribution.
        reference_hidden: [..., K] of another model with the same weight and bias and without the low-rank term, such as
            the base of an adapted model: its log-probabilities come from the same pass over the head.

    Returns: TokenLogProbs, each in the shape of targets.

    A NaN or an infinity in a hidden state makes the results of its token NaN and leaves the others as they are; the
    gradient of a trained head is a sum over tokens and becomes NaN with it.

    Raises:
        TypeError: hidden not floating point, targets not integers, a dense weight of another dtype, a DTensor.
        ValueError: shapes that do not fit, one of lora_a and lora_b alone, a scale, softcap or temperature that is not
            positive and finite, tensors on different devices; on a CPU a target outside [0, V) other than ignore_index
            (elsewhere the results of that token are NaN).

    Source: Rafailov et al., "Direct Preference Optimization", 2023, equation 7 (the log-probabilities); Milakov and
    Gimelshein, "Online normalizer calculation for softmax", 2018 (one pass over the logits).
    """
    hidden = autocast_input(hidden) if isinstance(hidden, torch.Tensor) else hidden
    check_linear(hidden, weight, bias, "hidden")
    if (lora_a is None) != (lora_b is None):
        raise ValueError("lora_a and lora_b go together: one of them is None")
    if lora_a is not None and lora_b is not None:
        check_adapter(hidden, weight, lora_a, lora_b)
    _check_targets(hidden, weight.shape[0], targets, ignore_index)
    p = check_probability("dropout_p", dropout_p)
    scale, temperature = check_positive("logit_scale", logit_scale), check_positive("temperature", temperature)
    cap = None if softcap is None else check_positive("softcap", softcap)
    inner, outer = (None, scale / temperature) if cap is None else (scale / cap, cap / temperature)
    flat, y, K = hidden.reshape(targets.numel(), hidden.shape[-1]), targets.reshape(-1), hidden.shape[-1]
    reference = None
    if reference_hidden is not None:
        _check_reference(hidden, reference_hidden)
        reference = autocast_input(reference_hidden).detach().to(flat.dtype).reshape(-1, K)
    seed = mask_seed(seed, hidden.device) if lora_a is not None and 0.0 < p < 1.0 else None
    if functorch_active() or (torch.compiler.is_compiling() and not flat.is_cuda):  # tiles depend on what counts
        logits = scale, cap, temperature, ignore_index
        results = _formula(flat, weight, bias, lora_a, lora_b, y, float(scaling), p, seed, reference, logits)
    else:
        dense, nf4 = (None, weight) if isinstance(weight, NF4Weight) else (weight, None)
        results = _LinearLogProb.apply(
            flat, dense, bias, lora_a, lora_b, y, seed, nf4, float(scaling), p, reference,
            (ignore_index, inner, outer), entropy, torch.is_grad_enabled(),
        )  # fmt: skip
    logp, h, other = results
    return TokenLogProbs(
        logp.view(targets.shape), h.view(targets.shape) if entropy else None,
        None if other is None else other.view(targets.shape),
    )  # fmt: skip


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor | NF4Weight,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    lora_a: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    *,
    reduction: str = "mean",
    num_items: int | torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> torch.Tensor:
    """Cross-entropy of a linear head, in nats, without its logits in memory.

    Args:
        reduction: "mean" over the targets that count, "sum", or "none", which has the shape of targets.
        num_items: what "mean" divides by instead, for sums over several batches (transformers' num_items_in_batch).
        The others: as for linear_logprob.

    Returns: [] or, unreduced, the shape of targets; float32 (float64 for float64). The mean over no target is 0.

    Raises:
        ValueError: an unknown reduction; num_items without "mean"; and as linear_logprob.
        TypeError: as linear_logprob.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items divides a mean, got reduction={reduction!r}")
    logp = linear_logprob(
        hidden, weight, bias, targets, lora_a, lora_b, scaling, dropout_p, seed, logit_scale=logit_scale,
        softcap=softcap, temperature=temperature, ignore_index=ignore_index,
    ).logp  # fmt: skip
    if reduction == "none":
        return -logp
    if reduction == "sum":
        return -logp.sum()
    return -logp.sum() / ((targets != ignore_index).sum().clamp(min=1) if num_items is None else num_items)


def _check_targets(hidden: torch.Tensor, size: int, targets: torch.Tensor, ignore_index: int) -> None:
    if not isinstance(targets, torch.Tensor) or targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"targets must be an int64 tensor, got {getattr(targets, 'dtype', type(targets).__name__)}")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets must be {tuple(hidden.shape[:-1])} to fit hidden, got {tuple(targets.shape)}")
    check_device(hidden, "hidden", targets=targets)
    if targets.device.type != "cpu" or torch.compiler.is_compiling() or functorch_active():
        return
    outside = ((targets < 0) | (targets >= size)) & (targets != ignore_index)
    if outside.any():
        worst = targets[outside][0].item()
        raise ValueError(f"targets must be in [0, {size}) or ignore_index {ignore_index}, got {worst}")


def _check_reference(hidden: torch.Tensor, reference: torch.Tensor) -> None:
    if not isinstance(reference, torch.Tensor) or not reference.dtype.is_floating_point:
        given = getattr(reference, "dtype", type(reference).__name__)
        raise TypeError(f"reference_hidden must be a floating-point tensor, got {given}")
    if reference.shape != hidden.shape:
        raise ValueError(f"reference_hidden must be {tuple(hidden.shape)} as hidden, got {tuple(reference.shape)}")
    check_device(hidden, "hidden", reference_hidden=reference)


def _formula(x, weight, bias, a, b, y, scaling, p, seed, reference, logits):
    logp, entropy = formulas.linear_logprob(x, weight, bias, a, b, y, scaling, p, seed, *logits)
    if reference is None:
        return logp, entropy, None
    other, _ = formulas.linear_logprob(reference, weight, bias, None, None, y, 1.0, 0.0, None, *logits)
    return logp, entropy, other.detach()
