"""The reference policy inside the policy's own model: its base, or a frozen copy of an adapter."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..tuning import adapter_names, adapters_disabled
from ..tuning.adaptation import require_adaptation, set_adaptation
from ..tuning.lora import LoRAAdaptation
from ..tuning.named import activated, add, layers_by_name
from ..tuning.trained import get_tensor, replace_module


@contextmanager
def reference_policy(model: nn.Module, adapter: str | None = None) -> Iterator[nn.Module]:
    """Within the context the model is the reference: in eval mode, so without dropout, and without gradients.

    adapter: the name of a LoRA adapter, see freeze_adapter_copy; None for the base, without any adapter. Trained biases
        and modules_to_save are the reference's too.

    Afterwards, also by an exception, the same adapter is active as before and every module and parameter has its mode
    and requires_grad again. Nests. Read head_of(model) inside it for the reference's head.

    Raises:
        ValueError: a model without adapters (pass the very module that was adapted, not its DDP wrapper), or fully
            fine-tuned, which keeps no base; no adapter of that name; a merged or disabled active adapter where another
            is asked for.
    """
    other = adapters_disabled(model) if adapter is None else activated(model, adapter)
    with torch.no_grad(), _as_it_was(model), other:
        model.eval()
        yield model


def freeze_adapter_copy(model: nn.Module, adapter_name: str) -> nn.Module:
    """Add a copy of the active LoRA adapter under a new name, frozen; the active one stays active and goes on training.

    That is the reference of a run which goes on with an adapter: with the adapter switched off, the reference would be
    the base, from before what it has learnt. The copy shares the base's tensors and costs the adapter's size. It lies
    beside the model, outside of its parameters and state_dict; activated by set_adapter it trains nothing.

    Returns: the model.

    Raises:
        TypeError: adapter_name is no string.
        ValueError: the model is not adapted, or by a method that takes no second adapter (any but LoRA; LoftQ and PiSSA
            over 4 bits); the name exists; the active adapter is merged or disabled.
    """
    adaptation = require_adaptation(model)

    def install() -> None:
        assert isinstance(adaptation, LoRAAdaptation)
        for path, layer in layers.items():
            shared = {id(t): t for name, t in _tensors(layer) if name not in layer.ADAPTER}  # type: ignore[operator]
            replace_module(model, path, copy.deepcopy(layer, shared).requires_grad_(False))
        twin = LoRAAdaptation(adaptation.config, list(adaptation.trained), targets=list(adaptation.targets))
        twin.start_training(model)
        with torch.no_grad():
            for name, trained in adaptation.originals.items():  # of an adapter that rests these are what it trained
                get_tensor(model, name).requires_grad_(False).copy_(trained)
        set_adaptation(model, twin)

    current = adapter_names(model)[0]
    layers = layers_by_name(model, [current])[current] if isinstance(adaptation, LoRAAdaptation) else {}
    return add(model, adapter_name, install)


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Afterwards every module has its mode and every parameter its requires_grad."""
    modes = [(module, module.training) for module in model.modules()]
    grads = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in grads:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)


def _tensors(layer: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
