"""Bottleneck adapters in the layout of AdapterHub's `adapters` package."""

import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..tuning.adaptation import Adaptation
from ..tuning.bottleneck import BottleneckAdaptation
from ..tuning.bottleneck_config import AdapterConfig
from ..tuning.config import TASK_HEADS, MethodConfig
from ..tuning.trained import get_tensor
from .adapterhub_config import HEAD_TASKS, config_from_hub, config_to_hub, differences, head_to_hub
from .files import json_writer, read_json, read_pickle, read_safetensors, tensor_writer
from .format import CONFIG_NAME, TRAINING_NAME, Tensors, Writers, existing, listed

ADAPTER_NAMES = ("adapter.safetensors", "pytorch_adapter.bin")  # the first is written; either is read
HEAD_NAMES = ("model_head.safetensors", "pytorch_model_head.bin")
HEAD_CONFIG_NAME = "head_config.json"
_LEAVES = {
    "adapter_down.0.weight": "down_weight", "adapter_down.0.bias": "down_bias",
    "adapter_up.weight": "up_weight", "adapter_up.bias": "up_bias",
}  # fmt: skip


class AdapterHub:
    """A checkpoint.format.Format.

    A trained head of a task (TASK_HEADS) is written as AdapterHub writes that of a transformers model. LayerNorms and
    other modules trained whole go to adapter_training.safetensors, and which they are to the config's 'peft_ops'.
    """

    def writes(self, config: MethodConfig) -> bool:
        return isinstance(config, AdapterConfig)

    def recognises(self, saved: dict[str, Any]) -> bool:
        return "peft_type" not in saved and isinstance(saved.get("config"), dict)

    def files(self, model: nn.Module, adaptation: Adaptation) -> Writers:
        assert isinstance(adaptation, BottleneckAdaptation)
        config = adaptation.config
        adapters = {key: get_tensor(model, name) for key, name in _names(adaptation, f".{config.name}").items()}
        whole = {name: get_tensor(model, name) for name in adaptation.trained}
        heads = {name: whole.pop(name) for name in list(whole) if _is_head(config, name)}
        width = adapters[next(iter(adapters))].shape[1]
        return {
            ADAPTER_NAMES[0]: tensor_writer(adapters),
            ADAPTER_NAMES[1]: None,  # AdapterHub would read it first
            HEAD_NAMES[0]: tensor_writer(heads) if heads else None,
            HEAD_NAMES[1]: None,
            HEAD_CONFIG_NAME: json_writer(head_to_hub(model)) if heads else None,
            TRAINING_NAME: tensor_writer(whole) if whole else None,
            CONFIG_NAME: json_writer(config_to_hub(config, model, width)),
        }

    def read(self, folder: Path, saved: dict[str, Any]) -> tuple[MethodConfig, Tensors]:
        head, head_tensors = _read_head(folder, saved)
        try:
            config = config_from_hub(saved, head, head_tensors)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{folder / CONFIG_NAME}: {error}") from error
        tensors = _plain(_read_either(folder, ADAPTER_NAMES), config.name)
        integers = [key for key, tensor in tensors.items() if not tensor.is_floating_point()]
        if integers:
            raise ValueError(f"{folder}: not floating point: {listed(integers)}")
        training = folder / TRAINING_NAME
        return config, tensors | head_tensors | (read_safetensors(training) if training.is_file() else {})

    def fit(self, model: nn.Module, adaptation: Adaptation, config: MethodConfig, tensors: Tensors) -> Tensors:
        """What the checkpoint's adapters compute must be what the model's do: the weights mean nothing else."""
        assert isinstance(config, AdapterConfig)
        wrong = differences(config, adaptation.config)
        if wrong:
            raise ValueError(f"the config of the checkpoint differs from the model's: {', '.join(wrong)}")
        return tensors

    def expected(self, model: nn.Module, adaptation: Adaptation, config: MethodConfig) -> dict[str, torch.Size]:
        assert isinstance(adaptation, BottleneckAdaptation)
        shapes = adaptation.shapes(model)
        return {key: shapes[name] for key, name in _targets(adaptation).items()}

    def assign(self, model: nn.Module, adaptation: Adaptation, tensors: Tensors) -> None:
        assert isinstance(adaptation, BottleneckAdaptation)
        for key, name in _targets(adaptation).items():
            get_tensor(model, name).copy_(tensors[key])


def _names(adaptation: BottleneckAdaptation, adapter: str) -> dict[str, str]:
    """{key in AdapterHub's file: name in the model} of the adapters."""
    return {
        f"{place.key}{adapter}.{leaf}": f"{place.path}.{name}"
        for place in adaptation.places
        for leaf, name in _LEAVES.items()
    }


def _targets(adaptation: BottleneckAdaptation) -> dict[str, str]:
    """{key as `read` gives it: name in the model} of everything that a checkpoint has."""
    names = _names(adaptation, "")
    rooted = _without_root(names)
    return {rooted[key]: name for key, name in names.items()} | {name: name for name in adaptation.trained}


def _plain(tensors: Tensors, adapter: str) -> Tensors:
    """Without the adapter's name and the path to the blocks, which depends on the head that the model had."""
    old = r"\.(?:attention|layer)_text_(?:task|lang)_adapters\."  # written before adapter-transformers 2
    named = {re.sub(old, ".adapters.", key): tensor for key, tensor in tensors.items()}
    named = {key.replace(f".adapters.{adapter}.", ".adapters."): tensor for key, tensor in named.items()}
    rooted = _without_root(named)
    return {rooted[key]: tensor for key, tensor in named.items()}


def _without_root(keys: Iterable[str]) -> dict[str, str]:
    """{key: key without the components that all begin with, up to a number}: bert.encoder.layer.0.x gives 0.x."""
    split = {key: key.split(".") for key in keys}
    common = 0
    for components in zip(*split.values(), strict=False):
        if len(set(components)) > 1 or components[0].isdigit():
            break
        common += 1
    return {key: ".".join(components[common:]) for key, components in split.items()}


def _is_head(config: AdapterConfig, name: str) -> bool:
    return name.split(".")[0] in TASK_HEADS.get(config.task_type or "", ())


def _read_head(folder: Path, saved: dict[str, Any]) -> tuple[dict[str, Any], Tensors]:
    """(head_config.json, the tensors) of the head of a transformers model for classification or answering questions."""
    if not (folder / HEAD_CONFIG_NAME).is_file():
        return {}, {}
    head = read_json(folder / HEAD_CONFIG_NAME)
    kind = str(head.get("model_class"))
    if kind.endswith(tuple(HEAD_TASKS)):
        return head, _read_either(folder, HEAD_NAMES)
    warnings.warn(f"{folder} has the head of a {kind}, which is not loaded: the model keeps its own", stacklevel=4)
    return {}, {}


def _read_either(folder: Path, names: tuple[str, str]) -> Tensors:
    """The tensors of the safetensors file, or of the pickled one where there is only that."""
    safe, pickled = (folder / name for name in names)
    return read_pickle(pickled) if pickled.is_file() and not safe.is_file() else read_safetensors(existing(safe))
