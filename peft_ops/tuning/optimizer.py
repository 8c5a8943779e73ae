"""An optimizer of everything that a method trains."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .adaptation import require_adaptation, require_enabled
from .in_place import InPlaceConfig
from .masters import MasterWeights
from .trained import get_tensor


def optimizer_for(model: nn.Module, make: Callable[..., Optimizer], **settings: Any) -> Optimizer:
    """`make(parameters, **settings)` over what the model's method trains; with float32 masters where its config asks.

    Among them are layers that a LayerwiseSchedule has frozen for now: an optimizer passes over a parameter without a
    gradient, and makes its state when the first one comes.

    Raises:
        ValueError: the model is not adapted, or its adapters are disabled.
    """
    adaptation = require_adaptation(model)
    require_enabled(model)
    optimizer = make(list(trained_parameters(model).values()), **settings)
    masters = isinstance(adaptation.config, InPlaceConfig) and adaptation.config.fp32_masters
    return MasterWeights(optimizer) if masters else optimizer


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name: parameter} of what the method of an adapted model trains, whether it requires a gradient now or not."""
    tensors = {name: get_tensor(model, name) for name in require_adaptation(model).shapes(model)}
    return {name: t for name, t in tensors.items() if isinstance(t, nn.Parameter) and t.is_floating_point()}
