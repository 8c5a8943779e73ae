"""LoRA and QLoRA in a model: layers replaced, layers quantised, switched off, merged."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from ..nn import LoRALinear, NF4Linear
from ..nn.linear_like import dense_weight
from .adaptation import Adaptation
from .config import MethodConfig
from .lora_config import LoRAConfig, QLoRAConfig
from .lora_layers import layers_off, merge_layers
from .lora_plan import plan_lora
from .trained import replace_module


@dataclass
class LoRAAdaptation(Adaptation):
    """targets: paths of the LoRA layers. quantize: paths of the layers put into NF4 (among them most targets).

    Source: Hu et al., "LoRA", 2021; Dettmers et al., "QLoRA", 2023; fields and matching of Hugging Face PEFT 0.21.
    """

    method: ClassVar[str] = "LoRA"
    config: LoRAConfig
    targets: list[str] = field(default_factory=list)
    quantize: list[str] = field(default_factory=list)

    @classmethod
    def plan(cls, model: nn.Module, config: MethodConfig) -> LoRAAdaptation:
        """Raises:
        TypeError: a target that is no linear layer; a weight that NF4 cannot hold.
        ValueError: nothing matched (the message has near names); NaN or infinite weights to quantise.
        """
        assert isinstance(config, LoRAConfig)
        return cls(**plan_lora(model, config))

    def install(self, model: nn.Module) -> None:
        """Layers are replaced one at a time: each dense weight is freed before the next one is quantised."""
        targets, quantize = set(self.targets), set(self.quantize)
        for path in [path for path, _ in model.named_modules() if path in targets or path in quantize]:
            replace_module(model, path, self._replacement(model.get_submodule(path), path))

    def _replacement(self, layer: nn.Module, path: str) -> nn.Module:
        config = self.config
        if path in self.quantize:
            assert isinstance(config, QLoRAConfig)
            layer = NF4Linear.from_linear(layer, config.blocksize, config.double_quant)
        if path not in self.targets:
            return layer
        r, alpha = config.rank(path), config.alpha(path)
        return LoRALinear.from_linear(layer, r, alpha, config.lora_dropout, config.use_rslora, config.init_lora_weights)

    def off(self, model: nn.Module) -> AbstractContextManager[None]:
        return layers_off(model)

    def merge(self, model: nn.Module, requantize: bool) -> None:
        merge_layers(model, requantize)

    def shapes(self, model: nn.Module) -> dict[str, torch.Size]:
        shapes: dict[str, torch.Size] = {}
        for path in self.targets:
            layer = model.get_submodule(path)
            (n, k), r = _weight_shape(layer), layer.r if isinstance(layer, LoRALinear) else self.config.rank(path)
            shapes |= {f"{path}.lora_A": torch.Size((r, k)), f"{path}.lora_B": torch.Size((n, r))}
        return shapes | super().shapes(model)


def _weight_shape(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, LoRALinear | NF4Linear):
        return layer.out_features, layer.in_features
    n, k = dense_weight(layer).shape
    return n, k
