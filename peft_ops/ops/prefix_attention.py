"""Attention over [prefix; text] without concatenating keys and values, differentiable in all five."""

import torch
from torch.autograd.function import once_differentiable

from .._backend import implementation
from ..reference import formulas
from . import _text_attention as text
from ._arguments import autocast_input, check_device, check_probability, functorch_active, mask_seed, without_autocast
from ._attention_arguments import broadcasts, check_attention, check_constant, check_floating, check_mask
from ._exported import kept_by_export

OP = "prefix_attention"


class _PrefixAttention(torch.autograd.Function):
    """Saves references to its inputs, out, the log-sum-exp [B, H, T] and seeds: no joined keys, no weights, no mask.

    The text's gradients are those of its own kernel, called with the merged out and log-sum-exp.
    """

    @staticmethod
    @without_autocast
    def forward(ctx, query, key, value, prefix_key, prefix_value, mask, bias, seed, prefix_seed, kernel, scaling,
                is_causal, p, prefix_p):  # fmt: skip
        out, lse, state = text.attention(kernel, query, key, value, mask, is_causal, scaling, p)
        out, _ = implementation(OP, query).prefix_merge_(
            out, lse[..., : query.shape[2]], query, prefix_key, prefix_value, bias, scaling,
            p, seed, prefix_p, prefix_seed,
        )  # fmt: skip
        of_text = any(ctx.needs_input_grad[:3])
        saved = (key, value, mask) if of_text else (None, None, None)
        ctx.save_for_backward(query, *saved, prefix_key, prefix_value, bias, seed, prefix_seed, out, lse, *state)
        ctx.of_text, ctx.kernel, ctx.scalars = of_text, kernel, (scaling, is_causal, p, prefix_p)
        return out

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dout):
        query, key, value, mask, pk, pv, bias, seed, prefix_seed, out, lse, *state = ctx.saved_tensors
        scaling, is_causal, p, prefix_p = ctx.scalars
        needed, (dq, dk, dv) = ctx.needs_input_grad[:5], (None, None, None)
        if ctx.of_text:
            dq, dk, dv = text.attention_gradients(
                ctx.kernel, dout, query, key, value, mask, out, lse, tuple(state), is_causal, scaling, p
            )
        dq, dpk, dpv = implementation(OP, query).prefix_gradients(
            dout, out, lse[..., : query.shape[2]], query, pk, pv, bias, dq if needed[0] else None, any(needed[3:]),
            scaling, p, seed, prefix_p, prefix_seed,
        )  # fmt: skip
        dpk, dpv = (None if d is None else d.to(t.dtype) for d, t in ((dpk, pk), (dpv, pv)))
        gradients = (d if need else None for d, need in zip((dq, dk, dv, dpk, dpv), needed, strict=True))
        return *gradients, *(None,) * 9


def prefix_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    scaling: float | None = None,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    prefix_bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    prefix_dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of query over the keys and values of a prefix, which all of the batch shares, and of the text.

    The text goes through torch's own attention kernel and the prefix, n keys, through one launch more, which merges the
    two by their log-sum-exp: two launches for a decoding step without a mask. Concatenation writes, and keeps for the
    backward, B Hkv (n + S) (D + Dv) elements more. The merge reads query and out and writes out; up to 32 keys (16 in
    float32) cost the backward one pass over query, out, dout and dq, more keys two.

    Where torch has no kernel that gives the log-sum-exp (dropout_p > 0 or D != Dv on a CPU, head dimensions that are no
    multiple of 8 on a GPU, functorch transforms) scores are held side by side, in memory as SDPA's own fall-back.

    Args:
        query: [B, H, T, D], floating point; under autocast query, key and value are cast first, as by SDPA.
        key, value: [B, Hkv, S, D] and [B, Hkv, S, Dv], the dtype of query; H is a multiple of Hkv; S may be 0.
        prefix_key, prefix_value: [Hkv, n, D] and [Hkv, n, Dv], n >= 1, any floating dtype: a float32 prefix beside a
            16-bit text is used as it is and gets gradients summed in float32; what limits them is out, which is kept in
            16 bits as by any flash attention.
        scaling: of scores; D ** -0.5 by default.
        mask: over the text alone, broadcastable to [B, H, T, S]: bool (True attends) or floating point to be added, in
            which -inf and the lowest number of its dtype mean the same. A row that sees no text attends to the prefix.
            On a GPU numbers are taken in the dtype of query, which is how torch's kernels want them.
        is_causal: row t sees the text up to t, from the top left as in SDPA; not with a mask.
        prefix_bias: added to the prefix's scores, finite, broadcastable to [H, T, n], or to that behind a leading 1.
        dropout_p: of attention weights, of prefix and text alike.
        prefix_dropout_p: of the prefix's keys and values, each its own mask in every batch row, in [0, 1], in steps of
            2**-16 (P-tuning v2).
        seed: of that mask, an int or a 0-dim int64 tensor on the device of query; None draws one from torch's generator
            of that device. One seed gives one mask on every backend.

    Returns: [B, H, T, Dv], the dtype of query.

    Raises:
        TypeError: a tensor that is not floating point (mask: or bool), of another dtype than query, or a DTensor.
        ValueError: shapes that do not fit, a mask with is_causal, a mask or bias that requires a gradient, a
            probability outside [0, 1], tensors on different devices.

    Source: Li & Liang, "Prefix-Tuning", 2021, section 4; Liu et al., "P-Tuning v2", 2021; the gradient from out and
        log-sum-exp: Dao et al., "FlashAttention", 2022, appendix B.
    """
    query, key, value = (autocast_input(t) if isinstance(t, torch.Tensor) else t for t in (query, key, value))
    _check_tensors(query, key, value, prefix_key, prefix_value)
    mask, bias = _check_masks(query, key, prefix_key, mask, is_causal, prefix_bias)
    p, prefix_p = check_probability("dropout_p", dropout_p), check_probability("prefix_dropout_p", prefix_dropout_p)
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    prefix_seed = mask_seed(seed, query.device) if prefix_p > 0.0 else None
    tensors, is_causal = (query, key, value, prefix_key, prefix_value), bool(is_causal)
    if torch.compiler.is_exporting():
        return _exported(*tensors, scaling, mask, is_causal, bias, p, prefix_p, prefix_seed)
    kernel = text.kernel_for(query, key, value, mask, is_causal, p)
    if kernel is None or functorch_active():
        return formulas.prefix_attention(*tensors, scaling, mask, is_causal, bias, p, prefix_p, prefix_seed)
    weights_seed = mask_seed(None, query.device) if p > 0.0 else None
    return _PrefixAttention.apply(
        *tensors, mask, bias, weights_seed, prefix_seed, kernel, scaling, is_causal, p, prefix_p
    )  # fmt: skip


def _check_tensors(query, key, value, prefix_key, prefix_value) -> None:
    check_floating(query=query, key=key, value=value, prefix_key=prefix_key, prefix_value=prefix_value)
    check_attention(query, key, value)
    D, heads = query.shape[-1], key.shape[1]
    if prefix_key.dim() != 3 or prefix_key.shape[::2] != (heads, D) or prefix_key.shape[1] < 1:
        raise ValueError(f"prefix_key must be [{heads}, n, {D}] with n >= 1 to fit key, got {tuple(prefix_key.shape)}")
    expected = (heads, prefix_key.shape[1], value.shape[3])
    if prefix_value.shape != expected:
        raise ValueError(
            f"prefix_value must be {expected} to fit prefix_key and value, got {tuple(prefix_value.shape)}"
        )
    check_device(query, "query", prefix_key=prefix_key, prefix_value=prefix_value)


def _check_masks(query, key, prefix_key, mask, is_causal, bias) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The mask, and the bias as [H, T, n]."""
    H, T, n = query.shape[1], query.shape[2], prefix_key.shape[1]
    check_mask(OP, query, key, mask, is_causal)
    if bias is None:
        return mask, None
    check_constant(OP, "prefix_bias", bias)
    check_device(query, "query", prefix_bias=bias)
    if not broadcasts(bias, (1, H, T, n)):
        raise ValueError(f"prefix_bias must be broadcastable to {(H, T, n)}, got {tuple(bias.shape)}")
    return mask, (bias[0] if bias.dim() == 4 else bias).expand(H, T, n)


_exported = kept_by_export(
    "prefix_attention(Tensor query, Tensor key, Tensor value, Tensor prefix_key, Tensor prefix_value, float scaling, "
    "Tensor? mask, bool is_causal, Tensor? prefix_bias, float dropout_p, float prefix_dropout_p, Tensor? seed) "
    "-> Tensor",
    prefix_attention,
    lambda query, key, value, *rest: query.new_empty(*query.shape[:3], value.shape[3]),
)
