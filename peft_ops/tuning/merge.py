"""Taking what a method added out of a model, by folding it into what is there."""

from collections.abc import Sequence

from torch import nn

from .adaptation import adaptation_of, require_adaptation, require_enabled, set_adaptation
from .lora_layers import lora_layers, merge_layers
from .named import adapter_names as adapter_names_of
from .named import delete_adapter, forget_names, set_adapter
from .weighted import add_weighted_adapter


def merge(model: nn.Module, requantize: bool = False, adapter_names: Sequence[str] | None = None) -> nn.Module:
    """Fold the method into plain weights and return the model, which is no longer adapted.

    LoRA: nn.Linear (Conv1D, ...) with W + scaling · B A takes the place of the LoRA layers; the sum is computed in
    float32 and rounded once. Trained biases and modules_to_save stay as trained. Of a 4-bit base every layer becomes a
    dense nn.Linear in the dtype it had before it was quantised; with requantize=True it stays NF4 and merged weights
    are quantised again, which loses what NF4 cannot hold. Full and partial fine-tuning: the trained weights stay.

    adapter_names: of several LoRA adapters these are added up and merged, by default the active one alone; the others
    are dropped, since the base that they were made for is no more.

    Raises:
        ValueError: the method cannot be merged (it is named); a merged weight would hold NaN or infinite values (the
            layer is named; the model is left as it was); the model has no adapters, or they are disabled.
    """
    adaptation = adaptation_of(model)
    if adaptation is None:
        if not lora_layers(model):
            raise ValueError(f"model ({type(model).__name__}) has no adapters to merge")
        merge_layers(model, requantize)
        return model
    require_enabled(model)
    if adapter_names is None:
        adaptation.merge(model, requantize)
    else:
        _merge_sum(model, adapter_names, requantize)
    set_adaptation(model, None)
    forget_names(model)
    return model


def _merge_sum(model: nn.Module, names: Sequence[str], requantize: bool) -> None:
    """Merge the sum of these adapters; where that fails the model is left as it was."""
    active, total = adapter_names_of(model)[0], names[0] if len(names) == 1 else "+".join(names)
    if len(names) != 1:
        add_weighted_adapter(model, names, [1.0] * len(names), total)
    set_adapter(model, total)
    try:
        require_adaptation(model).merge(model, requantize)
    except ValueError:
        set_adapter(model, active)
        if len(names) != 1:
            delete_adapter(model, total)
        raise


def eject(model: nn.Module) -> nn.Module:
    """Drop what only training needs (the encoder of P-tuning and prefix-tuning) and keep what it computes.

    The model computes the same afterwards, and what is left can be trained further directly.

    Raises:
        ValueError: the method has nothing of the kind; the model is not adapted, or its adapters are disabled.
    """
    adaptation = require_adaptation(model)
    require_enabled(model)
    adaptation.eject(model)
    return model
