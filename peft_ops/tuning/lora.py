"""LoRA and QLoRA in a model: layers replaced, layers quantised, switched off, merged."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from ..nn import LoRAEmbedding, LoRALinear, NF4Linear
from ..nn.linear_like import dense_weight
from ..nn.lora_layer import LoRALayer
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
        options = (
            config.rank(path), config.alpha(path), config.lora_dropout, config.use_rslora, config.init_lora_weights,
        )  # fmt: skip
        if isinstance(layer, nn.Embedding):
            return LoRAEmbedding.from_embedding(layer, *options)
        return LoRALinear.from_linear(layer, *options, config.use_dora)

    def off(self, model: nn.Module) -> AbstractContextManager[None]:
        return layers_off(model)

    def merge(self, model: nn.Module, requantize: bool) -> None:
        merge_layers(model, requantize)

    def shapes(self, model: nn.Module) -> dict[str, torch.Size]:
        return self.adapter_shapes(model) | super().shapes(model)

    def adapter_shapes(self, model: nn.Module) -> dict[str, torch.Size]:
        """Of what is in the LoRA layers, or will be."""
        shapes: dict[str, torch.Size] = {}
        for path in self.targets:
            layer = model.get_submodule(path)
            if isinstance(layer, LoRALayer):
                leaves = {name: getattr(layer, name).shape for name in layer.ADAPTER}
            else:
                leaves = _leaves(layer, self.config.rank(path), self.config.use_dora)
            shapes |= {f"{path}.{name}": shape for name, shape in leaves.items()}
        return shapes


def _leaves(layer: nn.Module, r: int, use_dora: bool) -> dict[str, torch.Size]:
    """Name and shape of what an adapter of rank r on a layer of the base consists of."""
    if isinstance(layer, nn.Embedding):
        v, d = layer.weight.shape
        return {"lora_embedding_A": torch.Size((r, v)), "lora_embedding_B": torch.Size((d, r))}
    n, k = layer.weight.shape if isinstance(layer, NF4Linear) else dense_weight(layer).shape
    leaves = {"lora_A": torch.Size((r, k)), "lora_B": torch.Size((n, r))}
    return leaves | ({"lora_magnitude_vector": torch.Size((n,))} if use_dora else {})
