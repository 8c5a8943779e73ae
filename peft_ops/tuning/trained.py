"""Tensors of the base model that a method trains whole: heads, biases, LayerNorms.

Copies of them are trained and the originals kept, so that the base model can be had back.
"""

from collections.abc import Collection

import torch
from torch import nn

from .config import TASK_HEADS, MethodConfig
from .matching import is_within, near_names


def saved_modules(model: nn.Module, config: MethodConfig) -> tuple[list[str], list[str]]:
    """(the names of modules_to_save with those of the task's head, the paths that they match).

    Raises:
        ValueError: there are names beside the task's, and none of all matches.
    """
    heads = TASK_HEADS.get(config.task_type or "", ())
    names = list(dict.fromkeys([*(config.modules_to_save or ()), *heads]))
    return names, saved_paths(model, names, optional=heads)


def saved_paths(model: nn.Module, names: Collection[str], optional: Collection[str]) -> list[str]:
    """Paths that end with one of modules_to_save (PEFT compares ends of strings, not path components).

    Raises:
        ValueError: there are names beside the optional ones, and none of all matches.
    """
    paths = [path for path, _ in model.named_modules() if path and path.endswith(tuple(names))]
    if set(names) - set(optional) and not paths:
        raise ValueError(f"modules_to_save={list(names)} matches no module; {near_names(model, names)}")
    return [path for path in paths if not is_within(path.rpartition(".")[0], paths)]


def tensors_within(model: nn.Module, paths: Collection[str]) -> list[str]:
    """Names of the parameters of the modules at `paths`, and of their buffers that a state_dict keeps."""
    names = []
    for path in paths:
        module = model.get_submodule(path)
        kept = module.state_dict()
        names += [f"{path}.{name}" for name, _ in module.named_parameters(remove_duplicate=False)]
        names += [f"{path}.{name}" for name, _ in module.named_buffers() if name in kept]
    return names


def trainable_copy(tensor: torch.Tensor) -> torch.Tensor:
    copy = tensor.detach().clone()
    return nn.Parameter(copy, requires_grad=copy.is_floating_point()) if isinstance(tensor, nn.Parameter) else copy


def owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the parameter, buffer or child `name`, and its name there."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def get_tensor(model: nn.Module, name: str) -> torch.Tensor:
    """The parameter or buffer called `name`."""
    module, leaf = owner(model, name)
    return getattr(module, leaf)


def set_tensor(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Puts `tensor` in the place of the parameter or buffer called `name`."""
    module, leaf = owner(model, name)
    setattr(module, leaf, tensor)


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Puts `new` where the module at `path` is, with the forward and backward hooks that users hung on that."""
    hooks = ("_forward", "_backward", "_is_full_backward")
    vars(new).update({k: v for k, v in vars(model.get_submodule(path)).items() if k.startswith(hooks)})
    parent, name = owner(model, path)
    setattr(parent, name, new)
