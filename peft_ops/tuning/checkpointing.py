"""Gradient checkpointing of layers that are trained over frozen ones: the backward ends at the lowest trained layer.

torch.utils.checkpoint with use_reentrant=True gives a layer's parameters no gradient where none of its inputs requires
one. transformers therefore lets the output of the embeddings require one wherever checkpointing is turned on, in either
mode, and the backward computes every frozen layer again to get there. Here the input of the lowest trained layer
requires one instead, and transformers' way is closed.
"""

from collections.abc import Iterable

import torch
from torch import nn

_THEIRS = "enable_input_require_grads"


def open_inputs(model: nn.Module, layers: Iterable[str]) -> bool:
    """Hang the hook on the layers; it does nothing without reentrant checkpointing, which may be turned on later.

    False, and nothing is done, where it cannot work: there are no layers, or they are checkpointed with their hooks
    inside (those of transformers 5.0, which have a `__call__` of their own).
    """
    modules = [model.get_submodule(path) for path in layers]
    if not modules or any(type(module).__call__ is not nn.Module.__call__ for module in modules):
        return False
    for module in modules:
        module.register_forward_pre_hook(_open_input)
    for module in model.modules():
        if hasattr(module, _THEIRS):
            vars(module)[_THEIRS] = _not_needed
    return True


def close_embeddings(model: nn.Module) -> None:
    """Undo what transformers did when checkpointing was turned on before."""
    for module in model.modules():
        if getattr(module, "_require_grads_hooks", None):
            module.disable_input_require_grads()  # type: ignore[operator]


def close_inputs(model: nn.Module) -> None:
    """Undo `open_inputs`."""
    for module in model.modules():
        vars(module).pop(_THEIRS, None)
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _open_input]:
            del module._forward_pre_hooks[key]


def _not_needed() -> None:
    """In the place of a model's enable_input_require_grads."""


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
    return tuple(x.detach().requires_grad_() if x is tensors[0] else x for x in args)
