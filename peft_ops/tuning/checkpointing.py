"""Reentrant gradient checkpointing of layers that are trained over frozen ones.

torch.utils.checkpoint with use_reentrant=True gives a layer's parameters no gradient where none of its inputs requires
one. What transformers does about it, to let the embeddings' output require one, takes the backward through every frozen
layer. Here the input of the lowest trained layer requires one, and the backward ends there.
"""

from collections.abc import Iterable

import torch
from torch import nn


def open_inputs(model: nn.Module, layers: Iterable[str]) -> bool:
    """Hang the hook on the layers; it does nothing without reentrant checkpointing, which may be turned on later.

    False where it cannot work: there are no layers, or they are checkpointed with their hooks inside (transformers
    before 5.23 or so, whose layers have a `__call__` of their own).
    """
    modules = [model.get_submodule(path) for path in layers]
    for module in modules:
        module.register_forward_pre_hook(_open_input)
    return bool(modules) and all(type(module).__call__ is nn.Module.__call__ for module in modules)


def close_inputs(model: nn.Module) -> None:
    """Take the hooks away."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _open_input]:
            del module._forward_pre_hooks[key]


def _open_input(layer: nn.Module, args: tuple) -> tuple | None:
    """The input detached and requiring a gradient, where a trained layer is checkpointed over one that does not."""
    if not (getattr(layer, "gradient_checkpointing", False) and layer.training and torch.is_grad_enabled()):
        return None
    options = getattr(getattr(layer, "_gradient_checkpointing_func", None), "keywords", {})
    tensors = [x for x in args if isinstance(x, torch.Tensor)]
    if not options.get("use_reentrant", True) or not tensors or any(x.requires_grad for x in tensors):
        return None
    if not any(p.requires_grad for p in layer.parameters()):
        return None
    return tuple(_opened(x) if x is tensors[0] else x for x in args)


def _opened(x: torch.Tensor) -> torch.Tensor:
    return x.detach().requires_grad_(x.is_floating_point())
