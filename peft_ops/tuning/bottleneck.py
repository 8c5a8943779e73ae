"""Bottleneck adapters in a model: placed, switched off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import nn

from .adaptation import Adaptation
from .bottleneck_config import AdapterConfig
from .bottleneck_hooks import PlacedAdapter
from .bottleneck_places import LOOKED_FOR, Place, find_places, layer_norms
from .config import MethodConfig
from .matching import is_within
from .trained import owner, saved_modules, tensors_within

_LOCATIONS = ("mh_adapter", "cross_adapter", "output_adapter")


@dataclass
class BottleneckAdaptation(Adaptation):
    """places: where the adapters are."""

    method: ClassVar[str] = "a bottleneck adapter"
    config: AdapterConfig
    places: list[Place] = field(default_factory=list)

    @classmethod
    def plan(cls, model: nn.Module, config: MethodConfig) -> BottleneckAdaptation:
        """Raises:
        ValueError: no block is recognised (the message has what was looked for), or none has a place that the config
            asks for; leave_out names a block that the model does not have; a LayerNorm has no weight.
        """
        assert isinstance(config, AdapterConfig)
        found = find_places(model)
        _check_layers(config, found)
        places = [p for p in found if getattr(config, p.location) and p.layer not in config.leave_out]
        _check_locations(model, config, places)
        for place in places:
            _norm_weight(model, place)
        names, saved = saved_modules(model, config)
        norms = layer_norms(model.named_modules()) if config.train_layer_norms else []
        trained = tensors_within(model, [path for path in norms if not is_within(path, saved)] + saved)
        return cls(config=replace(config, modules_to_save=names or None), trained=trained, places=places)

    def install(self, model: nn.Module) -> None:
        for place in self.places:
            adapter = self._adapter(_norm_weight(model, place))
            parent, name = owner(model, place.path)
            parent.add_module(name, adapter.train(parent.training))
            for path, hook in getattr(place, self.config.form):
                adapter.hang(model.get_submodule(path), hook)

    def _adapter(self, weight: torch.Tensor) -> PlacedAdapter:
        """For a sublayer whose LayerNorm has this weight [d]."""
        config, width = self.config, weight.shape[0]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        adapter = PlacedAdapter(
            width, config.size(width), config.non_linearity, config.scaling, config.init_weights,
            device=weight.device, dtype=dtype,
        )  # fmt: skip
        adapter.norm_sum, adapter.norm_again = config.residual_before_ln is not False, config.original_ln_after
        return adapter

    @contextmanager
    def off(self, model: nn.Module) -> Iterator[None]:
        self._enable(model, False)
        try:
            yield
        finally:
            self._enable(model, True)

    def _enable(self, model: nn.Module, enabled: bool) -> None:
        for place in self.places:
            adapter = model.get_submodule(place.path)
            assert isinstance(adapter, PlacedAdapter)
            adapter.adapter_enabled = enabled

    def shapes(self, model: nn.Module) -> dict[str, torch.Size]:
        shapes: dict[str, torch.Size] = {}
        for place in self.places:
            d = _norm_weight(model, place).shape[0]
            m = self.config.size(d)
            sizes = {"down_weight": (m, d), "down_bias": (m,), "up_weight": (d, m), "up_bias": (d,)}
            shapes |= {f"{place.path}.{name}": torch.Size(size) for name, size in sizes.items()}
        return shapes | super().shapes(model)


def _check_layers(config: AdapterConfig, found: list[Place]) -> None:
    layers = {place.layer for place in found}
    outside = [layer for layer in config.leave_out if layer not in layers]
    if outside:
        raise ValueError(f"leave_out={outside}: the model has blocks 0 to {max(layers)}")


def _check_locations(model: nn.Module, config: AdapterConfig, places: list[Place]) -> None:
    for location in _LOCATIONS:
        if getattr(config, location) and not any(place.location == location for place in places):
            raise ValueError(
                f"{location}=True: no block of model ({type(model).__name__}) "
                f"{'that leave_out leaves ' if config.leave_out else ''}has a sublayer of that kind; "
                f"looked for: {LOOKED_FOR}"
            )


def _norm_weight(model: nn.Module, place: Place) -> torch.Tensor:
    """[d], from which an adapter takes its width, device and dtype."""
    weight = getattr(model.get_submodule(place.norm), "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1:
        given = tuple(weight.shape) if isinstance(weight, torch.Tensor) else "none"
        raise ValueError(f"{place.norm} must have a weight [d], from which adapters take their width; it has {given}")
    return weight
