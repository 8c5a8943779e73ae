"""Taking adapters out of a model by adding them to its weights."""

import warnings

from torch import nn

from ..nn import LoRALinear, NF4Linear
from ..nn.nf4_lora_linear import NF4LoRALinear
from .adaptation import replace_module, require_enabled, set_adaptation


def merge(model: nn.Module, requantize: bool = False) -> nn.Module:
    """Put plain layers (nn.Linear, Conv1D) with W + scaling · B A in the place of the LoRA layers; returns the model.

    The sum is computed in float32 and rounded once. Trained biases and modules_to_save stay as trained. Of a 4-bit base
    every layer becomes a dense nn.Linear in the dtype it had before it was quantised; with requantize=True it stays
    NF4 and merged weights are quantised again, which loses what NF4 cannot hold.

    Raises:
        ValueError: a merged weight would hold NaN or infinite values (the layer is named; the model is left as it was);
            the model has no adapters, or they are disabled.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}
    if not layers:
        raise ValueError(f"model ({type(model).__name__}) has no adapters to merge")
    require_enabled(model)
    for path, layer in layers.items():
        try:
            layer.merged_weight()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    _warn_untied(model, layers)
    for path in [path for path, module in model.named_modules() if isinstance(module, LoRALinear | NF4Linear)]:
        replace_module(model, path, _plain(model.get_submodule(path), requantize))
    set_adaptation(model, None)
    return model


def _plain(layer: nn.Module, requantize: bool) -> nn.Module:
    if requantize and isinstance(layer, NF4LoRALinear):
        return layer.to_nf4_linear()
    if requantize and isinstance(layer, NF4Linear):
        return layer
    assert isinstance(layer, LoRALinear | NF4Linear)
    return layer.to_linear()


def _warn_untied(model: nn.Module, layers: dict[str, LoRALinear]) -> None:
    adapted = {id(layer._parameters["weight"]): path for path, layer in layers.items() if "weight" in layer._parameters}
    for path, module in model.named_modules():
        tied = adapted.get(id(module._parameters.get("weight")))
        if tied is not None and not isinstance(module, LoRALinear):
            warnings.warn(
                f"{tied}.weight was tied to {path}.weight and no longer is, now that an adapter is merged into it: "
                "set config.tie_word_embeddings = False before saving the model",
                stacklevel=3,
            )
