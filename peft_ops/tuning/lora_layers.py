"""The LoRA layers of a model, whether `adapt` or the user put them in: off for a while, or merged."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..nn import NF4Linear
from ..nn.lora_layer import LoRALayer
from ..nn.nf4_lora_linear import NF4LoRALinear
from .trained import replace_module


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """{path: layer}."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALayer)}


@contextmanager
def layers_off(model: nn.Module) -> Iterator[None]:
    """Within it the layers compute what their base does; merged adapters are taken out. Nests."""
    enabled = [layer for layer in lora_layers(model).values() if layer.adapter_enabled]
    merged = [layer for layer in enabled if layer.merged]
    for layer in enabled:
        layer.unmerge()
        layer.adapter_enabled = False
    try:
        yield
    finally:
        for layer in enabled:
            layer.adapter_enabled = True
        for layer in merged:
            layer.merge()


def merge_layers(model: nn.Module, requantize: bool) -> None:
    """Put plain layers in the place of the LoRA layers, and of other NF4 layers unless `requantize`; see `merge`.

    Raises:
        ValueError: a merged weight would hold NaN or infinite values (the layer is named; the model is left as it was).
    """
    layers = lora_layers(model)
    for path, layer in layers.items():
        try:
            layer.merged_weight()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    _warn_untied(model, layers)
    for path in [path for path, module in model.named_modules() if isinstance(module, LoRALayer | NF4Linear)]:
        replace_module(model, path, _plain(model.get_submodule(path), requantize))


def _plain(layer: nn.Module, requantize: bool) -> nn.Module:
    if requantize and isinstance(layer, NF4LoRALinear):
        return layer.to_nf4_linear()
    if requantize and isinstance(layer, NF4Linear):
        return layer
    if isinstance(layer, LoRALayer):
        return layer.to_base()
    assert isinstance(layer, NF4Linear)
    return layer.to_linear()


def _warn_untied(model: nn.Module, layers: dict[str, LoRALayer]) -> None:
    adapted = {id(layer._parameters["weight"]): path for path, layer in layers.items() if "weight" in layer._parameters}
    for path, module in model.named_modules():
        tied = adapted.get(id(module._parameters.get("weight")))
        if tied is not None and not isinstance(module, LoRALayer):
            warnings.warn(
                f"{tied}.weight was tied to {path}.weight and no longer is, now that an adapter is merged into it: "
                "set config.tie_word_embeddings = False before saving the model",
                stacklevel=5,
            )
