"""Several LoRA adapters on one model, by name: one is in it, the others lie beside it over the same base tensors.

Each is an Adaptation of its own with layers of its own (and its own heads and biases); switching puts the layers of one
in the place of another's. What is not active takes no part in forward, state_dict or training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from ..nn.lora_layer import LoRALayer
from .adaptation import adaptation_of, require_adaptation, require_enabled, set_adaptation
from .fuse import regroup
from .lora import LoRAAdaptation
from .trained import replace_module

_ATTRIBUTE = "_peft_ops_named"
DEFAULT = "default"
Layers = dict[str, nn.Module]


@dataclass
class Named:
    """active: the name of the adapter that is in the model. stowed: the others, each with its layers by path."""

    active: str = DEFAULT
    stowed: dict[str, tuple[LoRAAdaptation, Layers]] = field(default_factory=dict)

    def names(self) -> list[str]:
        return [self.active, *self.stowed]


def named_of(model: nn.Module) -> Named:
    """What a model has beside the adapter that is in it."""
    return vars(model).get(_ATTRIBUTE) or Named()


def name_active(model: nn.Module, adapter_name: str) -> None:
    """Call the adapter that is in the model so."""
    named = named_of(model)
    named.active = adapter_name
    vars(model)[_ATTRIBUTE] = named


def forget_names(model: nn.Module) -> None:
    """After a merge: the other adapters were made for a base that is no more."""
    vars(model).pop(_ATTRIBUTE, None)


def adapter_names(model: nn.Module) -> list[str]:
    """Names of an adapted model's adapters, the active one first.

    Raises:
        ValueError: the model is not adapted.
    """
    require_adaptation(model)
    return named_of(model).names()


def set_adapter(model: nn.Module, adapter_name: str) -> nn.Module:
    """Make the adapter of this name the active one: it computes and is trained, the others rest.

    Raises:
        ValueError: no adapter of that name; the active one is merged into the weights, or disabled.
    """
    named = _ready(model)
    _require_name(named, adapter_name)
    if adapter_name != named.active:
        _stow(model, named)
        _bring(model, named, adapter_name)
    return model


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Forget an adapter that is not active.

    Raises:
        ValueError: no adapter of that name, or it is the active one.
    """
    named = _ready(model)
    _require_name(named, adapter_name)
    if adapter_name == named.active:
        others = ", ".join(named.stowed) or "none"
        raise ValueError(f"adapter {adapter_name!r} is active: set_adapter to another first (there are: {others})")
    del named.stowed[adapter_name]


def add(model: nn.Module, adapter_name: str, install: Callable[[], object]) -> nn.Module:
    """Another adapter, which `install` puts into the bare base model or raises without touching it.

    The active adapter stays active.

    Raises:
        TypeError: the name is no string.
        ValueError: the name exists or has a dot in it; a model whose method takes no second adapter.
    """
    named = _ready(model)
    check_new_name(named, adapter_name)
    first = adaptation_of(model)
    if not isinstance(first, LoRAAdaptation):
        raise ValueError(f"model is already adapted by {first and first.method}, which takes no second adapter")
    if first.config.starts_from_weight and first.quantize:
        raise ValueError(
            f"init_lora_weights={first.config.init_lora_weights!r} over 4 bits made a base for its adapter alone"
        )
    current = named.active
    _stow(model, named)
    try:
        install()
        named.active = adapter_name
        _stow(model, named)
    finally:
        _bring(model, named, current)
    vars(model)[_ATTRIBUTE] = named
    return model


@contextmanager
def activated(model: nn.Module, adapter_name: str | None) -> Iterator[None]:
    """The adapter of this name (None: the active one) is active for a while."""
    if adapter_name is None:
        yield
        return
    current = named_of(model).active
    set_adapter(model, adapter_name)
    try:
        yield
    finally:
        set_adapter(model, current)


def layers_by_name(model: nn.Module, names: Sequence[str]) -> dict[str, Layers]:
    """{name: {path: layer}} of adapters of the model, where they lie."""
    named, adaptation = _ready(model), require_adaptation(model)
    assert isinstance(adaptation, LoRAAdaptation)
    layers = {name: stowed for name, (_, stowed) in named.stowed.items()}
    layers[named.active] = {path: model.get_submodule(path) for path in adaptation.targets}
    for name in names:
        _require_name(named, name)
    return {name: layers[name] for name in names}


def check_new_name(named: Named, adapter_name: str) -> None:
    """A name that can be added."""
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise ValueError(f"adapter_name must be a string without dots, got {adapter_name!r}")
    if adapter_name in named.names():
        raise ValueError(f"adapter {adapter_name!r} exists already (there are: {', '.join(named.names())})")


def _ready(model: nn.Module) -> Named:
    adaptation = require_adaptation(model)
    require_enabled(model)
    if isinstance(adaptation, LoRAAdaptation):
        for path in adaptation.targets:
            layer = model.get_submodule(path)
            if isinstance(layer, LoRALayer) and layer.merged:
                raise ValueError(f"the active adapter is merged into {path}: unmerge() first")
    return named_of(model)


def _require_name(named: Named, adapter_name: str) -> None:
    if adapter_name not in named.names():
        raise ValueError(f"no adapter is called {adapter_name!r}; there are: {', '.join(named.names())}")


def _stow(model: nn.Module, named: Named) -> None:
    """Take the active adapter out: layers of the base take the place of its own, originals that of what it trained."""
    adaptation = adaptation_of(model)
    assert isinstance(adaptation, LoRAAdaptation)
    layers: Layers = {}
    for path in adaptation.targets:
        layer = model.get_submodule(path)
        assert isinstance(layer, LoRALayer)
        layers[path] = layer
        replace_module(model, path, layer.base())
    adaptation.exchange(model)
    named.stowed[named.active] = (adaptation, layers)
    set_adaptation(model, None)


def _bring(model: nn.Module, named: Named, adapter_name: str) -> None:
    """Put a stowed adapter into the bare model, over its tensors as they are now."""
    adaptation, layers = named.stowed.pop(adapter_name)
    for path, layer in layers.items():
        base = model.get_submodule(path)
        layer._parameters.update(base._parameters)
        layer._buffers.update(base._buffers)
        device = next(base.parameters()).device
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.data = tensor.data.to(device)
        replace_module(model, path, layer.train(base.training))
    adaptation.exchange(model)
    named.active = adapter_name
    set_adaptation(model, adaptation)
    regroup(model)
