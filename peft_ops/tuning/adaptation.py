"""What `adapt` did to a model: one object on it, which copies and pickles with it."""

from dataclasses import dataclass, field

import torch
from torch import nn

from .config import LoRAConfig

_ATTRIBUTE = "_peft_ops"


@dataclass
class Adaptation:
    """config: as resolved for the model (target_modules and modules_to_save written out).
    targets: paths of the LoRA layers. quantize: paths of the layers put into NF4 (among them most targets).
    trained: names of the parameters and buffers that are trained whole or with their module: biases, modules_to_save.
    originals: what stood at those names before (a tied tensor itself, not a copy); while `disabled`, the two are
        exchanged.
    """

    config: LoRAConfig
    targets: list[str]
    quantize: list[str]
    trained: list[str]
    originals: dict[str, torch.Tensor] = field(default_factory=dict)
    disabled: bool = False


def adaptation_of(model: nn.Module) -> Adaptation | None:
    """The adaptation of a model, or None."""
    return vars(model).get(_ATTRIBUTE)


def require_adaptation(model: nn.Module) -> Adaptation:
    """Raises ValueError where the model is not adapted."""
    adaptation = adaptation_of(model)
    if adaptation is None:
        raise ValueError(
            f"model ({type(model).__name__}) is not adapted: call peft_ops.adapt on this very module first"
        )
    return adaptation


def require_enabled(model: nn.Module) -> None:
    """Raises ValueError inside adapters_disabled(model), where the model's tensors are not the adapted ones."""
    adaptation = adaptation_of(model)
    if adaptation is not None and adaptation.disabled:
        raise ValueError("adapters are disabled: do this outside adapters_disabled(model)")


def set_adaptation(model: nn.Module, adaptation: Adaptation | None) -> None:
    if adaptation is None:
        vars(model).pop(_ATTRIBUTE, None)
    else:
        vars(model)[_ATTRIBUTE] = adaptation


def owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the parameter, buffer or child `name`, and its name there."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Puts `new` where the module at `path` is, with the forward and backward hooks that users hung on that."""
    hooks = ("_forward", "_backward", "_is_full_backward")
    vars(new).update({k: v for k, v in vars(model.get_submodule(path)).items() if k.startswith(hooks)})
    parent, name = owner(model, path)
    setattr(parent, name, new)


def get_tensor(model: nn.Module, name: str) -> torch.Tensor:
    """The parameter or buffer called `name`."""
    module, leaf = owner(model, name)
    return getattr(module, leaf)


def set_tensor(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Puts `tensor` in the place of the parameter or buffer called `name`."""
    module, leaf = owner(model, name)
    setattr(module, leaf, tensor)
