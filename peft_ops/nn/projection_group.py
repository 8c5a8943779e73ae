"""LoRA layers that a module calls one after the other with the same x, computed in one op."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..ops._arguments import functorch_active
from ..ops.lora_projections import lora_projections

if TYPE_CHECKING:
    from .lora_linear import LoRALinear

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def hooked(module: nn.Module) -> bool:
    """Calling it does more than its class's forward: hooks, or a forward of its own."""
    own = "forward" in vars(module) or any(getattr(module, hooks) for hooks in _HOOKS)
    return own or bool(torch.nn.modules.module._has_any_global_hook())


@dataclass
class _Pending:
    """Results that wait for their layers: x as it was, by what state of the layers they were computed, and they."""

    x: torch.Tensor
    version: int
    state: tuple
    results: dict[int, torch.Tensor]  # by id of the layer

    def is_for(self, x: torch.Tensor, state: tuple) -> bool:
        return x is self.x and x._version == self.version and state == self.state


class ProjectionGroup:
    """Query, key and value of one attention module: the first that is called computes all, the others take theirs.

    A layer takes what was computed from its very x, unchanged, with the parameters and settings as they were; in every
    other case it computes alone. Where results were not taken before the next x came, as in cross-attention, whose keys
    have another x than its queries, the group turns itself off.

    The module that the layers are in holds the group; layers and group hold one another weakly, so that replaced layers
    are freed, and a copy of the module has a group over its own layers.
    """

    def __init__(self, layers: Sequence[LoRALinear]):
        self.active = True
        self._join(layers)

    def _join(self, layers: Sequence[LoRALinear]) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]
        self._pending: _Pending | None = None
        for layer in layers:
            layer._group = weakref.ref(self)

    def layers(self) -> list[LoRALinear]:
        """Those that are still alive and in this group."""
        found = [layer for ref in self._layers if (layer := ref()) is not None]
        return [layer for layer in found if layer._group is not None and layer._group() is self]

    def result(self, layer: LoRALinear, x: torch.Tensor) -> torch.Tensor | None:
        """What `layer` computes of x; None where it has to compute alone."""
        layers = self.layers() if self.active and _usable_input(x) else []
        if not any(layer is other for other in layers):  # nn.DataParallel's replicas are not
            return None
        state, pending = _state(layers), self._pending
        if pending is not None and id(layer) in pending.results:
            if state is None or not pending.is_for(x, state):
                return None
            y = pending.results.pop(id(layer))
            if not pending.results:
                self._pending = None
            return y
        if pending is not None:
            self._pending, self.active = None, False
            return None
        return None if state is None or len(layers) < 2 else self._compute(layer, x, layers, state)

    def _compute(self, layer: LoRALinear, x: torch.Tensor, layers: list[LoRALinear], state: tuple) -> torch.Tensor:
        version = x._version
        ys = lora_projections(x, [other.linear_terms() for other in layers])
        results = {id(other): y for other, y in zip(layers, ys, strict=True)}
        y = results.pop(id(layer))
        self._pending = _Pending(x, version, state, results)
        return y

    def __getstate__(self) -> dict[str, Any]:
        return {"active": self.active, "layers": self.layers()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.active = state["active"]
        self._join(state["layers"])


def _usable_input(x: Any) -> bool:
    """Identity and version tell whether it is still the same: not so of inference tensors, nor inside transforms."""
    return (
        isinstance(x, torch.Tensor) and not x.is_inference() and not torch.jit.is_tracing() and not functorch_active()
    )


def _state(layers: Sequence[LoRALinear]) -> tuple | None:
    """What results depend on beside x; None where one of the layers has to be computed alone."""
    state: list[Any] = [torch.is_grad_enabled(), torch.is_inference_mode_enabled()]
    device = layers[0].lora_A.device.type
    state.append(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None)
    for layer in layers:
        if layer.merged or not layer.adapter_enabled or hooked(layer) or "lora_magnitude_vector" in layer._parameters:
            return None
        state += [layer.scaling, layer.lora_dropout if layer.training else 0.0]
        for tensor in (*layer._parameters.values(), *layer._buffers.values()):
            if tensor is not None:
                state += [id(tensor), None if tensor.is_inference() else tensor._version]
    return tuple(state)
