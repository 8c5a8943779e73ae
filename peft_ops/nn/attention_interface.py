"""Attention over [prefix; text], and fused attention, in models of Hugging Face transformers, through its
AttentionInterface.

transformers looks up the attention function of a module under `module.config._attn_implementation`. A module with a
prefix, or one that `fuse` found, gets a config of its own, a copy with the name registered here; the model's config,
from which masks are made, stays as it is. No mask, cache or position changes: the prefix lies beside the text, not in
it.
"""

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..ops._attention_arguments import broadcasts
from ..ops.attention import attention
from ..ops.prefix_attention import prefix_attention

WRAPPED = ("sdpa", "eager")  # attention that a prefix can be put before
_NAME = "peft_ops_prefix"
_RECORD = "peft_ops_record"
_FUSED = "peft_ops_attention"
_ORIGINAL = "_peft_ops_attention"  # in a module whose attention is fused


def register() -> None:
    """Make the functions known to transformers; again changes nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _prefix_attention_forward)
    AttentionInterface.register(_RECORD, _record_forward)
    AttentionInterface.register(_FUSED, _attention_forward)


class _Original:
    """The config that a module had before its attention was fused: the model's, whose later changes it follows."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a model pickled by another process
        vars(self).update(state)
        register()


def fuse_attention(module: nn.Module, config: Any) -> None:
    """Let a module's attention go through ops.attention where it can; config: what `with_attention` made of its own."""
    register()
    vars(module)[_ORIGINAL] = _Original(module.config)
    module.config = config


def unfuse_attention(module: nn.Module) -> None:
    """Give a module, and a prefix before its keys, the very config back that it had; one that is not fused stays."""
    if not is_fused(module):
        return
    original = vars(module).pop(_ORIGINAL).config
    owners: list[Any] = [module, module._modules.get("peft_prefix")]
    for owner in owners:
        if owner is not None and owner.config._attn_implementation == _FUSED:
            owner.config = original


def is_fused(module: nn.Module) -> bool:
    return _ORIGINAL in vars(module)


def unfused_config(module: nn.Module, config: Any) -> Any:
    """config, or where it is a fused module's the one that stood in its place."""
    return vars(module)[_ORIGINAL].config if config._attn_implementation == _FUSED else config


def with_attention(config: Any) -> Any:
    """A copy of a model's config that sends attention to ops.attention."""
    return _redirected(config, _FUSED)


def with_prefix(config: Any) -> Any:
    """A copy of a model's config that sends attention here."""
    return _redirected(config, _NAME)


def recording(config: Any) -> tuple[Any, dict[nn.Module, tuple[torch.Tensor, torch.Tensor]]]:
    """(a copy of the config with which attention is as before, what is filled with each module's keys and values)."""
    recorded: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
    copied = _redirected(config, _RECORD)
    vars(copied).update(_peft_ops_recorded=recorded, _peft_ops_original=config)
    return copied, recorded


def _redirected(config: Any, name: str) -> Any:
    copied = copy.copy(config)
    vars(copied)["_attn_implementation_internal"] = name  # the property's setter would reach into shared sub-configs
    return copied


def _wrapped(module: nn.Module, implementation: str | None) -> Callable:
    """The attention function that `module` would have called."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    own = vars(sys.modules[type(module).__module__])  # every file of models has an eager one
    name = "sdpa" if implementation is None else implementation
    return own["eager_attention_forward"] if name not in ALL_ATTENTION_FUNCTIONS else ALL_ATTENTION_FUNCTIONS[name]


def _record_forward(module, query, key, value, attention_mask, **kwargs):
    module.config._peft_ops_recorded[module] = (key.detach(), value.detach())
    original = module.config._peft_ops_original
    return _wrapped(module, original._attn_implementation)(module, query, key, value, attention_mask, **kwargs)


def _attention_forward(module, query, key, value, attention_mask, **kwargs):
    """As below: by ops.attention where the model's config names "sdpa", on a CPU; else by what it names."""
    original = vars(module).get(_ORIGINAL)  # none in a new module that was made from the copy of a config
    implementation = "sdpa" if original is None else original.config._attn_implementation
    if implementation != "sdpa" or not _can_fuse(query, key, value, attention_mask, kwargs):
        return _wrapped(module, implementation or "eager")(module, query, key, value, attention_mask, **kwargs)
    T, is_causal = query.shape[2], kwargs.get("is_causal")
    causal = attention_mask is None and bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if causal:  # a static cache that is being filled is longer than what it holds
        key, value = key[:, :, :T], value[:, :, :T]
    out = attention(query, key, value, kwargs.get("scaling"), attention_mask, causal)
    return out.transpose(1, 2).contiguous(), None


def _can_fuse(query, key, value, mask, options: dict[str, Any]) -> bool:
    """Whether it is what ops.attention takes: a text on a CPU, not one token; SDPA, unlike it, also broadcasts batches.

    A traced call, sharded tensors, a bias that is learned and what else may be asked of attention are left to
    transformers.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or query.device.type != "cpu" or query.shape[2] < 2:
        return False
    if any(type(t) not in (torch.Tensor, nn.Parameter) for t in (query, key, value)):
        return False
    if options.get("dropout") or any(
        options.get(name) is not None for name in ("position_bias", "softcap", "s_aux", "cache")
    ):
        return False
    if len({t.dtype for t in (query, key, value)}) > 1 or key.shape[0] != query.shape[0]:
        return False
    if query.shape[1] % key.shape[1] or query.shape[3] != value.shape[3]:
        return False
    if mask is None:
        return True
    plain = isinstance(mask, torch.Tensor) and (mask.dtype.is_floating_point or mask.dtype == torch.bool)
    return plain and not mask.requires_grad and broadcasts(mask, (*query.shape[:3], key.shape[2]))


def _prefix_attention_forward(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, scaling: float | None = None, dropout: float = 0.0,
    is_causal: bool | None = None, position_bias: torch.Tensor | None = None, **kwargs,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """What transformers calls: query [B, H, T, D], key [B, Hkv, S, D], value [B, Hkv, S, Dv] -> [B, T, H, Dv], None.

    attention_mask: bool or additive, [B or 1, H or 1, T, S]. position_bias: [1, H, T, S] of T5; where nn.positions made
    it, [1, H, T, n + S].

    Raises:
        ValueError: an argument that the op has no place for; an attention implementation that cannot be wrapped.
    """
    prefix: Any = module.peft_prefix
    for name in ("softcap", "s_aux", "cache"):
        if kwargs.get(name) is not None:
            raise ValueError(f"attention with a prefix does not support {name}, which {type(module).__name__} passes")
    implementation = unfused_config(module, prefix.config)._attn_implementation or "eager"
    if implementation not in WRAPPED:
        wanted = ", ".join(WRAPPED)
        raise ValueError(f"attn_implementation must be one of {wanted} under a prefix, got {implementation!r}")
    causal = implementation == "sdpa" and attention_mask is None and query.shape[2] > 1
    causal = causal and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    prefix_bias = None
    if position_bias is not None:
        beside = position_bias.shape[-1] - key.shape[2]
        prefix_bias, position_bias = position_bias.detach().split([beside, key.shape[2]], dim=-1)
    if causal:  # a static cache that is being filled is longer than what it holds
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    if position_bias is not None:
        attention_mask = _biased_mask(position_bias[..., : key.shape[2]], attention_mask, causal)
        causal = False
    prefix_key, prefix_value = prefix()
    out = prefix_attention(
        query, key, value, prefix_key, prefix_value, scaling, attention_mask, causal,
        prefix_bias=prefix_bias if prefix_bias is not None and prefix_bias.shape[-1] else None,
        dropout_p=dropout, prefix_dropout_p=prefix.dropout if prefix.training else 0.0,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def _biased_mask(bias: torch.Tensor, mask: torch.Tensor | None, causal: bool) -> torch.Tensor:
    """bias [1, H, T, S], with -inf where the mask does not attend."""
    if causal:
        mask = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).tril()
    if mask is None:
        return bias
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else bias + mask
