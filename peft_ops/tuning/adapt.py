"""Putting adapters into a model."""

import torch
from torch import nn

from ..nn import LoRALinear, NF4Linear
from .adaptation import Adaptation, get_tensor, replace_module, set_adaptation, set_tensor
from .config import LoRAConfig, QLoRAConfig
from .plan import plan


def adapt(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """Replace the layers that `config` targets by LoRA layers; only adapters (and what the config adds) stay trainable.

    With a QLoRAConfig every linear layer but the output head goes to NF4, one at a time: each dense weight is freed
    before the next is quantised, unless someone else holds it. The model is changed in place; where an error is raised
    it is left as it was.

    Reentrant gradient checkpointing needs an input that requires a gradient: where it is already on,
    model.enable_input_require_grads() is called; where it is turned on later, call that yourself.

    Raises:
        TypeError: a target that is not linear, a weight that NF4 cannot hold.
        ValueError: nothing matched (the message has near names), an adapted model, NaN or infinite weights to quantise.

    Source: Hu et al., "LoRA", 2021; Dettmers et al., "QLoRA", 2023; fields and matching of Hugging Face PEFT 0.21.
    """
    return apply(model, plan(model, config))


def apply(model: nn.Module, adaptation: Adaptation) -> nn.Module:
    """Carry out a plan."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    targets, quantize = set(adaptation.targets), set(adaptation.quantize)
    for path in [path for path, _ in model.named_modules() if path in targets or path in quantize]:
        replace_module(model, path, _replacement(model.get_submodule(path), path, adaptation))
    for name in adaptation.trained:
        original = get_tensor(model, name)
        adaptation.originals[name] = original
        set_tensor(model, name, _trainable_copy(original))
    set_adaptation(model, adaptation)
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        getattr(model, "enable_input_require_grads", lambda: None)()
    return model


def _replacement(layer: nn.Module, path: str, adaptation: Adaptation) -> nn.Module:
    config = adaptation.config
    if path in adaptation.quantize:
        assert isinstance(config, QLoRAConfig)
        layer = NF4Linear.from_linear(layer, config.blocksize, config.double_quant)
    if path not in adaptation.targets:
        return layer
    return LoRALinear.from_linear(
        layer, config.rank(path), config.alpha(path), config.lora_dropout, config.use_rslora, config.init_lora_weights
    )


def _trainable_copy(tensor: torch.Tensor) -> torch.Tensor:
    copy = tensor.detach().clone()
    return nn.Parameter(copy, requires_grad=copy.is_floating_point()) if isinstance(tensor, nn.Parameter) else copy
