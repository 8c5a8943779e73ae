"""adapter_config.json of Hugging Face PEFT, from and to a LoRAConfig."""

from collections.abc import Collection
from dataclasses import fields
from typing import Any

from torch import nn

from ..tuning.config import MethodConfig
from ..tuning.lora_config import UNSUPPORTED, LoRAConfig

_PEFT_VERSION = "0.21.2"  # whose format this is
# Initialisations that draw the adapter only; others (pissa, olora, corda, loftq, lora_ga) also change the base weights.
_HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal")


def config_to_peft(config: LoRAConfig, model: nn.Module) -> dict[str, Any]:
    """The fields that PEFT writes; a QLoRAConfig's own are left out: PEFT keeps quantisation with the base model."""
    saved = {f.name: jsonable(getattr(config, f.name)) for f in fields(LoRAConfig)}
    return saved | common_fields(config, model, "LORA")


def common_fields(config: MethodConfig, model: nn.Module, peft_type: str) -> dict[str, Any]:
    """What PEFT writes for every method."""
    origin = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    return {
        "auto_mapping": origin if config.task_type is None else None,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        "peft_type": peft_type,
        "peft_version": _PEFT_VERSION,
        "revision": None,
    }


def config_from_peft(saved: dict[str, Any]) -> LoRAConfig:
    """The config of a checkpoint; unknown fields are ignored, as in PEFT.

    Raises:
        TypeError, ValueError: another method than LoRA, a feature that is not supported, a value out of its range.
    """
    if saved.get("peft_type") != "LORA":
        raise ValueError(f"peft_type must be 'LORA', got {saved.get('peft_type')!r}")
    unsupported = [name for name in UNSUPPORTED if saved.get(name)]
    if unsupported:
        raise ValueError(f"the checkpoint uses {', '.join(unsupported)}, which is not supported")
    init = saved.get("init_lora_weights", True)
    if init not in _HARMLESS_INITS:
        raise ValueError(f"init_lora_weights={init!r} changes the base weights too, which is not supported")
    known = {f.name: saved[f.name] for f in fields(LoRAConfig) if saved.get(f.name) is not None}
    return LoRAConfig(**known | {"init_lora_weights": True})


def jsonable(value: Any) -> Any:
    """Sets and tuples as lists, sorted where they hold names."""
    if isinstance(value, Collection) and not isinstance(value, str | dict):
        return sorted(value) if all(isinstance(v, str) for v in value) else list(value)
    return value
