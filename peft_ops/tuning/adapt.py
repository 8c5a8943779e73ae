"""Putting a method into a model."""

from torch import nn

from .adaptation import Adaptation, set_adaptation
from .config import MethodConfig
from .methods import plan


def adapt(model: nn.Module, config: MethodConfig) -> nn.Module:
    """Make `model` train as `config` says, in place, and return it; what is not trained is frozen.

    The class of the config is the method. LoRAConfig: the layers that it targets are replaced by LoRA layers.
    QLoRAConfig: besides, every linear layer but the output head goes to NF4, one at a time: each dense weight is freed
    before the next is quantised, unless someone else holds it. Where an error is raised the model is left as it was.

    AdapterConfig: bottleneck adapters stand in every block.
    FullConfig, PartialConfig: the model's own parameters are trained.

    Reentrant gradient checkpointing needs an input that requires a gradient: where it is already on,
    model.enable_input_require_grads() is called; where it is turned on later, call that yourself. Full and partial
    fine-tuning need neither.

    Raises:
        TypeError: a model or config of another type; a target that the method cannot take.
        ValueError: an adapted model; a config that does not fit the model (the message says what would).

    Source: each config names its paper; fields and matching are those of Hugging Face PEFT 0.21.
    """
    return apply(model, plan(model, config))


def apply(model: nn.Module, adaptation: Adaptation) -> nn.Module:
    """Carry out a plan."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    adaptation.install(model)
    adaptation.start_training(model)
    set_adaptation(model, adaptation)
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        adaptation.prepare_checkpointing(model)
    return model
