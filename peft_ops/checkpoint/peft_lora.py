"""LoRA in the format of Hugging Face PEFT: adapter_config.json and adapter_model.safetensors."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..nn.lora_layer import LoRALayer
from ..tuning.adaptation import Adaptation
from ..tuning.config import MethodConfig
from ..tuning.lora import LoRAAdaptation
from ..tuning.lora_config import LoRAConfig
from ..tuning.trained import get_tensor
from .files import json_writer, read_safetensors, tensor_writer
from .format import CONFIG_NAME, WEIGHTS_NAME, Tensors, Writers, existing, listed
from .peft_config import config_from_peft, config_to_peft

_PREFIX = "base_model.model."


class PeftLoRA:
    """A checkpoint.format.Format."""

    def writes(self, config: MethodConfig) -> bool:
        return isinstance(config, LoRAConfig)

    def recognises(self, saved: dict[str, Any]) -> bool:
        return saved.get("peft_type") == "LORA"

    def files(self, model: nn.Module, adaptation: Adaptation) -> Writers:
        assert isinstance(adaptation, LoRAAdaptation)
        tensors = {key: get_tensor(model, name) for key, name in _names(model, adaptation).items()}
        return {
            WEIGHTS_NAME: tensor_writer(tensors),
            CONFIG_NAME: json_writer(config_to_peft(adaptation.config, model)),
        }

    def read(self, folder: Path, saved: dict[str, Any]) -> tuple[MethodConfig, Tensors]:
        try:
            config = config_from_peft(saved)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{folder / CONFIG_NAME}: {error}") from error
        return config, _without_leftovers(read_safetensors(existing(folder / WEIGHTS_NAME)))

    def check(self, model: nn.Module, adaptation: Adaptation, config: MethodConfig) -> None:
        """The checkpoint's lora_alpha, rslora and dora must be the model's: the weights mean nothing else."""
        assert isinstance(adaptation, LoRAAdaptation)
        assert isinstance(config, LoRAConfig)
        if config.use_dora != adaptation.config.use_dora:
            raise ValueError(f"use_dora of the checkpoint is {config.use_dora}, that of the model is not")
        wrong = []
        for path in adaptation.targets:
            layer = model.get_submodule(path)
            if isinstance(layer, LoRALayer) and layer.r == config.rank(path) and layer.scaling != config.scaling(path):
                wrong.append(f"{path}: {config.scaling(path):g}, the model has {layer.scaling:g}")
        if wrong:
            raise ValueError(f"scaling (lora_alpha, r, use_rslora) of the checkpoint differs: {listed(wrong)}")

    def expected(self, model: nn.Module, adaptation: Adaptation, config: MethodConfig) -> dict[str, torch.Size]:
        assert isinstance(adaptation, LoRAAdaptation)
        shapes = adaptation.shapes(model)
        return {key: shapes[name] for key, name in _names(model, adaptation).items()}

    def assign(self, model: nn.Module, adaptation: Adaptation, tensors: Tensors) -> None:
        assert isinstance(adaptation, LoRAAdaptation)
        for key, name in _names(model, adaptation).items():
            get_tensor(model, name).copy_(tensors[key])


def _names(model: nn.Module, adaptation: LoRAAdaptation) -> dict[str, str]:
    """{key in the file: name in the model}."""
    adapters = {
        f"{_PREFIX}{name}" + (".weight" if name.endswith(("lora_A", "lora_B")) else ""): name
        for name in adaptation.adapter_shapes(model)
    }
    wrapped = set(adaptation.targets)
    for name in adaptation.trained:
        path, _, leaf = name.rpartition(".")
        adapters[_PREFIX + (f"{path}.base_layer.{leaf}" if path in wrapped else name)] = name
    return adapters


def _without_leftovers(tensors: Tensors) -> Tensors:
    """With bias='all' PEFT writes the biases of modules_to_save three times; the plain key is the one it reads."""
    plain = {key: key.replace(".modules_to_save.", ".").replace(".original_module.", ".") for key in tensors}
    return {key: tensor for key, tensor in tensors.items() if plain[key] == key or plain[key] not in tensors}


def without_base_copies(model: nn.Module, tensors: Tensors, folder: Path) -> Tensors:
    """PEFT writes the frozen weights of input and output embeddings that it adapts: they have to be the model's own.

    Raises:
        ValueError: they are not, as after a vocabulary that was resized on both sides.
    """
    copies, other = [key for key in tensors if key.endswith(".base_layer.weight")], []
    for key in copies:
        path = key.removeprefix(_PREFIX).removesuffix(".base_layer.weight")
        own, saved = model.get_submodule(path)._parameters.get("weight"), tensors[key]
        if own is None or own.shape != saved.shape or own.is_meta:
            continue  # of another layout, which check_tensors reports, or nothing to compare
        narrow = min(own.dtype, saved.dtype, key=lambda dtype: dtype.itemsize)
        if not torch.equal(own.detach().cpu().to(narrow), saved.to(narrow)):
            other.append(path)
    if other:
        raise ValueError(f"{folder} was made on another base: it has other weights for {listed(other)}")
    return {key: tensor for key, tensor in tensors.items() if key not in copies}
