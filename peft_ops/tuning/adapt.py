"""Putting a method into a model."""

from torch import nn

from .adaptation import Adaptation, adaptation_of, set_adaptation
from .config import MethodConfig
from .fuse import regroup
from .lora import LoRAAdaptation
from .methods import plan
from .named import Named, add, check_new_name, name_active


def adapt(model: nn.Module, config: MethodConfig, adapter_name: str | None = None) -> nn.Module:
    """Make `model` train as `config` says, in place, and return it; what is not trained is frozen.

    The class of the config is the method. LoRAConfig: the layers that it targets are replaced by LoRA layers.
    QLoRAConfig: besides, every linear layer but the output head goes to NF4, one at a time: each dense weight is freed
    before the next is quantised, unless someone else holds it. Where an error is raised the model is left as it was.

    AdapterConfig: bottleneck adapters stand in every block.
    FullConfig, PartialConfig: the model's own parameters are trained.

    Reentrant gradient checkpointing needs an input that requires a gradient: where it is already on,
    model.enable_input_require_grads() is called; where it is turned on later, call that yourself. Full and partial
    fine-tuning need neither.

    adapter_name: with it a model that LoRA has adapted takes further adapters over the same base, each by its name; the
    one that is active stays so (see set_adapter). None is 'default', for the first.

    Raises:
        TypeError: a model or config of another type; a target that the method cannot take.
        ValueError: an adapted model; a config that does not fit the model (the message says what would).

    Source: each config names its paper; fields and matching are those of Hugging Face PEFT 0.21.
    """
    if adapter_name is not None and isinstance(model, nn.Module) and adaptation_of(model) is not None:
        return add(model, adapter_name, lambda: apply(model, _beside(plan(model, config))))
    adaptation = plan(model, config)
    if adapter_name is not None:
        check_new_name(Named(""), adapter_name)
    apply(model, adaptation)
    if adapter_name is not None:
        name_active(model, adapter_name)
    return model


def _beside(adaptation: Adaptation) -> Adaptation:
    """A plan for another adapter beside the first."""
    if not isinstance(adaptation, LoRAAdaptation):
        raise ValueError(f"{adaptation.method} cannot be a second adapter: only LoRA can")
    if adaptation.quantize:
        raise ValueError("adapters share one base, which the first of them quantises: give a LoRAConfig to the others")
    return adaptation


def apply(model: nn.Module, adaptation: Adaptation) -> nn.Module:
    """Carry out a plan."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    adaptation.install(model)
    adaptation.start_training(model)
    set_adaptation(model, adaptation)
    regroup(model)
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        adaptation.prepare_checkpointing(model)
    return model
