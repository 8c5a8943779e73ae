"""Every fine-tuning method under its name on the command line: its config, its options, its learning rates."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .. import LoRAConfig, QLoRAConfig, adapt
from ..tuning.config import MethodConfig
from .errors import UserError, as_user_error


@dataclass(frozen=True)
class Settings:
    """What the options of a method say.

    r, lora_alpha, lora_dropout, target_modules: of the LoRA family; lora_alpha None is 2 r.
    """

    r: int = 8
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    target_modules: list[str] | str | None = None


LORA_OPTIONS = ("r", "lora_alpha", "lora_dropout", "target_modules")


@dataclass(frozen=True)
class Method:
    """name, label: on the command line, and in tables and charts. family: methods that are compared with each other.

    config: of the settings and the model, which it may read. lr, embedded_lr: peak learning rates for a model of the
    user's and for the embedded one. options: the fields of Settings that it takes. trains_base: weights of the base are
    trained, which are then held in float32.
    """

    name: str
    label: str
    family: str
    config: Callable[[Settings, nn.Module], MethodConfig]
    lr: float
    embedded_lr: float
    options: tuple[str, ...] = ()
    trains_base: bool = False

    def apply(self, model: nn.Module, settings: Settings) -> nn.Module:
        """Adapt `model` in place; UserError where the settings do not fit it."""
        with as_user_error():
            return adapt(model, self.config(settings, model))

    def base_dtype(self, compute: torch.dtype) -> torch.dtype:
        """A frozen base is held in the dtype that is computed in; weights that are trained, in float32."""
        return torch.float32 if self.trains_base else compute


def _lora(settings: Settings, kind: type[LoRAConfig] = LoRAConfig, **fields: Any) -> LoRAConfig:
    alpha = 2 * settings.r if settings.lora_alpha is None else settings.lora_alpha
    return kind(
        r=settings.r, lora_alpha=alpha, lora_dropout=settings.lora_dropout,
        target_modules=settings.target_modules or "all-linear", task_type="CAUSAL_LM", **fields,
    )  # fmt: skip


_ALL = (
    Method("lora", "LoRA", "LoRA", lambda s, m: _lora(s), 2e-4, 7e-3, LORA_OPTIONS),
    Method("qlora", "QLoRA", "LoRA", lambda s, m: _lora(s, QLoRAConfig), 2e-4, 7e-3, LORA_OPTIONS),
)
METHODS = {method.name: method for method in _ALL}


def settings_of(method: Method, given: dict[str, Any], defaults: Settings) -> Settings:
    """The options that were given (None: not given), else the defaults.

    Raises UserError: an option that the method does not take.
    """
    for name, value in given.items():
        if value is not None and name not in method.options:
            takes = ", ".join(flag(option) for option in method.options) or "none of its own"
            raise UserError(f"{flag(name)} is no option of --method {method.name} (it takes {takes})")
    return replace(defaults, **{name: value for name, value in given.items() if value is not None})


def flag(name: str) -> str:
    """An option as it is written: lora_alpha -> --lora-alpha."""
    return f"--{name.replace('_', '-')}"
