"""Every method: the class of its config, and what carries it out."""

from torch import nn

from ..nn.lora_layer import LoRALayer
from .adaptation import Adaptation, adaptation_of
from .config import MethodConfig
from .full import FullAdaptation, FullConfig
from .lora import LoRAAdaptation
from .lora_config import LoRAConfig
from .partial import PartialAdaptation, PartialConfig
from .prefix import PrefixAdaptation, PTuningV2Adaptation
from .prefix_config import PrefixTuningConfig, PTuningV2Config
from .prompt import PromptAdaptation
from .prompt_config import PromptTuningConfig, PTuningConfig

ADAPTATIONS: dict[type[MethodConfig], type[Adaptation]] = {
    FullConfig: FullAdaptation,
    LoRAConfig: LoRAAdaptation,
    PromptTuningConfig: PromptAdaptation,
    PTuningConfig: PromptAdaptation,
    PartialConfig: PartialAdaptation,
    PrefixTuningConfig: PrefixAdaptation,
    PTuningV2Config: PTuningV2Adaptation,
}


def plan(model: nn.Module, config: MethodConfig) -> Adaptation:
    """What adapt(model, config) will do; the model is only read.

    Raises:
        TypeError: model or config of another type, and what the method's own plan raises.
        ValueError: an adapted model, and what the method's own plan raises.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    for kind in type(config).__mro__:
        if kind in ADAPTATIONS:
            _check_plain(model)
            return ADAPTATIONS[kind].plan(model, config)
    names = ", ".join(kind.__name__ for kind in ADAPTATIONS)
    raise TypeError(f"config must be one of {names}, got {type(config).__name__}")


def _check_plain(model: nn.Module) -> None:
    adapted = [path for path, module in model.named_modules() if isinstance(module, LoRALayer) or adaptation_of(module)]
    if adapted or hasattr(model, "peft_config"):
        raise ValueError(
            "model is already adapted (" + (adapted[0] or "at its root" if adapted else "by peft") + "); merge it first"
        )
