"""Our attention in models of Hugging Face transformers, through its AttentionInterface: over text, or [prefix; text].

transformers looks up the attention function of a module under `module.config._attn_implementation`. A module that
attends here gets a config of its own, a copy with a name registered here; the model's config, of which masks are made,
stays as it is. No mask, cache or position changes: a prefix lies beside the text, not in it.
"""

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..ops.attention import attention
from ..ops.prefix_attention import prefix_attention

WRAPPED = ("sdpa", "eager")  # attention that a prefix can be put before
_NAME = "peft_ops_prefix"
_RECORD = "peft_ops_record"
_ATTENTION = "peft_ops_attention"
_LEAST_QUERIES = 16  # of a batch row, that repay laying its keys out


def register() -> None:
    """Make the functions known to transformers; again changes nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _prefix_attention_forward)
    AttentionInterface.register(_RECORD, _record_forward)
    AttentionInterface.register(_ATTENTION, _attention_forward)


def with_prefix(config: Any) -> Any:
    """A copy of a model's config that sends attention here."""
    return _redirected(config, _NAME)


class _Model:
    """The config of a model, held by a copy that `with_attention` made."""

    def __init__(self, config: Any):
        self.config = config

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a model pickled by another process
        vars(self).update(state)
        register()


def with_attention(config: Any) -> Any:
    """A copy of a model's config that sends attention over text here, for as long as the model's says "sdpa"."""
    copied = _redirected(config, _ATTENTION)
    vars(copied)["_peft_ops_model"] = _Model(config)
    return copied


def plain(config: Any) -> Any:
    """The config of which `with_attention` made this copy, or config itself."""
    model = vars(config).get("_peft_ops_model") if hasattr(config, "__dict__") else None
    return config if model is None else model.config


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

    name = "sdpa" if implementation is None else implementation
    if name in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[name]
    return vars(sys.modules[type(module).__module__])["eager_attention_forward"]  # every file of models has one


def _record_forward(module, query, key, value, attention_mask, **kwargs):
    module.config._peft_ops_recorded[module] = (key.detach(), value.detach())
    original = module.config._peft_ops_original
    return _wrapped(module, original._attn_implementation)(module, query, key, value, attention_mask, **kwargs)


def _attention_forward(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, scaling: float | None = None, dropout: float = 0.0,
    is_causal: bool | None = None, **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """As `_prefix_attention_forward`, without a prefix; what our op does not cover goes to what the model asks for."""
    implementation = plain(module.config)._attn_implementation
    unknown = any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "s_aux", "cache"))
    here = implementation == "sdpa" and query.device.type == "cpu" and query.shape[2] >= _LEAST_QUERIES
    if unknown or not here or dropout > 0.0 or torch.compiler.is_compiling():
        return _wrapped(module, implementation)(
            module, query, key, value, attention_mask,
            scaling=scaling, dropout=dropout, is_causal=is_causal, **kwargs,
        )  # fmt: skip
    causal = attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if causal:  # a static cache that is being filled is longer than what it holds
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    out = attention(query, key, value, scaling, attention_mask, causal)
    return out.transpose(1, 2).contiguous(), None


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
    implementation = prefix.config._attn_implementation or "eager"
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
