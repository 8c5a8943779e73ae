"""The attention modules of a transformers model whose attention on a CPU can be one op."""

import inspect
from typing import Any

from torch import nn

from ..nn import attention_interface
from .attention_plan import config_of, uses_interface


def fuse_attentions(model: nn.Module) -> list[str]:
    """Paths of the modules whose scaled_dot_product_attention is ops.attention from now on, or was already.

    Those are modules that look their function up in transformers' AttentionInterface under the name "sdpa"; not ones
    with a prefix, which have an op of their own, nor those that do something else for that name.
    """
    copies: dict[int, Any] = {}  # layers that shared a config share its copy
    found = []
    for path, module in model.named_modules():
        if not attention_interface.is_fused(module):
            if not _takes_sdpa(module):
                continue
            config = config_of(module)
            copied = copies.setdefault(id(config), attention_interface.with_attention(config))
            attention_interface.fuse_attention(module, copied)
        found.append(path)
    return found


def unfuse_attentions(model: nn.Module) -> None:
    """Give every module the very config back that it had."""
    for module in model.modules():
        attention_interface.unfuse_attention(module)


def _takes_sdpa(module: nn.Module) -> bool:
    if not uses_interface(module) or getattr(getattr(module, "config", None), "_attn_implementation", None) != "sdpa":
        return False
    constants = inspect.unwrap(type(module).forward).__code__.co_consts  # some make other masks for that name
    return not any(c == "sdpa" or (isinstance(c, tuple | frozenset) and "sdpa" in c) for c in constants)
