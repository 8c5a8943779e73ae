"""Full and partial fine-tuning: the trained tensors by the names that the model has for them."""

from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..tuning.adaptation import Adaptation
from ..tuning.config import MethodConfig
from ..tuning.full import FullConfig
from ..tuning.in_place import InPlaceConfig
from ..tuning.partial import PartialConfig
from ..tuning.trained import get_tensor
from .files import json_writer, read_safetensors, tensor_writer
from .format import CONFIG_NAME, WEIGHTS_NAME, Tensors, Writers, existing

_METHOD = "peft_ops_method"
_CONFIGS: dict[str, type[InPlaceConfig]] = {"FULL": FullConfig, "PARTIAL": PartialConfig}


class InPlace:
    """A checkpoint.format.Format of this project's own: adapter_config.json without a peft_type."""

    def writes(self, config: MethodConfig) -> bool:
        return isinstance(config, InPlaceConfig)

    def recognises(self, saved: dict[str, Any]) -> bool:
        return str(saved.get(_METHOD)) in _CONFIGS

    def files(self, model: nn.Module, adaptation: Adaptation) -> Writers:
        config = adaptation.config
        saved = {f.name: _jsonable(getattr(config, f.name)) for f in fields(config)}
        saved |= {_METHOD: _name(config), "base_model_name_or_path": getattr(model, "name_or_path", None) or None}
        return {
            WEIGHTS_NAME: tensor_writer({name: get_tensor(model, name) for name in adaptation.trained}),
            CONFIG_NAME: json_writer(saved),
        }

    def read(self, folder: Path, saved: dict[str, Any]) -> tuple[MethodConfig, Tensors]:
        kind = _CONFIGS[saved[_METHOD]]
        try:
            config = kind(**{f.name: saved[f.name] for f in fields(kind) if f.name in saved})
        except (TypeError, ValueError) as error:
            raise type(error)(f"{folder / CONFIG_NAME}: {error}") from error
        return config, read_safetensors(existing(folder / WEIGHTS_NAME))

    def fit(self, model: nn.Module, adaptation: Adaptation, config: MethodConfig, tensors: Tensors) -> Tensors:
        """The names of the tensors say the rest."""
        if _name(config) != _name(adaptation.config):
            raise ValueError(f"the checkpoint is of {_METHOD} {_name(config)}; the model was adapted otherwise")
        return tensors

    def expected(self, model: nn.Module, adaptation: Adaptation, config: MethodConfig) -> dict[str, torch.Size]:
        return adaptation.shapes(model)

    def assign(self, model: nn.Module, adaptation: Adaptation, tensors: Tensors) -> None:
        for name in adaptation.trained:
            get_tensor(model, name).copy_(tensors[name])


def _name(config: MethodConfig) -> str:
    return next(name for name, kind in _CONFIGS.items() if isinstance(config, kind))


def _jsonable(value: Any) -> Any:
    return list(value) if isinstance(value, Collection) and not isinstance(value, str) else value
