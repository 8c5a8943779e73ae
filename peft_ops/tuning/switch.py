"""The base model for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..nn import LoRALinear
from .adaptation import Adaptation, adaptation_of, get_tensor, set_tensor


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the context the model computes what it did before it was adapted (over NF4: with the quantised weights).

    Trained biases and modules_to_save step aside for the originals, merged adapters are taken out. Nests, and ends the
    same way by an exception. A checkpointed forward run here must also be run backward here: it is computed again then.

    Raises:
        ValueError: the model has no adapters.
    """
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    if not layers:
        raise ValueError(f"model ({type(model).__name__}) has no adapters to disable")
    enabled = [layer for layer in layers if layer.adapter_enabled]
    merged = [layer for layer in enabled if layer.merged]
    adaptation = adaptation_of(model)
    exchanged = adaptation if adaptation and not adaptation.disabled else None
    _disable(model, enabled, exchanged)
    try:
        yield model
    finally:
        for layer in enabled:
            layer.adapter_enabled = True
        for layer in merged:
            layer.merge()
        _exchange(model, exchanged)


def _disable(model: nn.Module, layers: list[LoRALinear], adaptation: Adaptation | None) -> None:
    for layer in layers:
        layer.unmerge()
        layer.adapter_enabled = False
    _exchange(model, adaptation)


def _exchange(model: nn.Module, adaptation: Adaptation | None) -> None:
    """Trained tensors and their originals change places; the latter are moved to where the former are."""
    if adaptation is None:
        return
    for name, kept in adaptation.originals.items():
        current = get_tensor(model, name)
        if (kept.device, kept.dtype) != (current.device, current.dtype):
            moved = kept.detach().to(current.device, current.dtype)
            kept = nn.Parameter(moved, requires_grad=False) if isinstance(kept, nn.Parameter) else moved
        set_tensor(model, name, kept)
        adaptation.originals[name] = current
    adaptation.disabled = not adaptation.disabled
