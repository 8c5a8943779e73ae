"""`fuse` for attention: modules of a transformers model whose scaled dot-product attention goes to our op on a CPU."""

from typing import Any

from torch import nn

from ..nn.attention_interface import plain, register, with_attention
from .attention_plan import uses_interface


def fuse_attention(model: nn.Module) -> list[str]:
    """Paths of the modules that attend through our op now, or did already; on a GPU it is torch's own attention.

    They get a copy of their config, one for each that they share; the model's own, `set_attn_implementation` and masks
    stay as they are.
    """
    found: list[str] = []
    copies: dict[int, Any] = {}
    for path, module in model.named_modules():
        config: Any = vars(module).get("config")
        if config is None or not uses_interface(module):
            continue
        if plain(config) is config and getattr(config, "_attn_implementation", None) == "sdpa":
            register()
            module.config = copies.setdefault(id(config), with_attention(config))
        if plain(module.config) is not module.config:
            found.append(path)
    return found


def unfuse_attention(model: nn.Module) -> None:
    for module in model.modules():
        config: Any = vars(module).get("config")
        if config is not None and plain(config) is not config:
            module.config = plain(config)
