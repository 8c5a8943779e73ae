"""Partial fine-tuning: some layers are trained whole, the others stay frozen."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from .config import MethodConfig, check_count, check_names
from .in_place import InPlaceAdaptation, InPlaceConfig, check_bool, chosen_within, trained_names
from .layers import embedding_paths, layer_paths, layer_stacks, norm_paths
from .matching import names_match, output_heads
from .trained import saved_modules

_WAYS = ("num_top_layers", "frozen_bottom_layers", "layers", "layer_names")


@dataclass(frozen=True)
class PartialConfig(InPlaceConfig):
    """Partial fine-tuning for `adapt`. At most one of the first four says which layers are trained.

    num_top_layers: the last n.
    frozen_bottom_layers: all but the first n.
    layers: these, by index; -1 is the last.
    layer_names: modules by name, layers or parts of them: names matched exactly or as the last components of a module's
        path, or a regular expression that matches the whole path.
    embeddings, final_norm, head: whether these are trained too; by default layers alone are, as in LLaMA-Factory's
        freeze tuning. embeddings: all that comes before the layers. final_norm: normalisations after them. head: the
        output embedding, or the classifier of a model without one.
    fp32_masters: `optimizer_for` keeps a float32 master of every trained 16-bit parameter; see MasterWeights. An
        optimizer of your own making has to be wrapped in MasterWeights.
    layers_pattern: path, or end of the path, of the list that the layers are in (an nn.ModuleList or nn.Sequential), or
        a regular expression for it; None finds it.
    modules_to_save, task_type: see MethodConfig; these are trained in place too.

    The layers of an encoder-decoder model are counted through: the encoder's, then the decoder's.

    Raises:
        TypeError, ValueError: values of the wrong type or out of range; more than one way to choose layers.
    """

    num_top_layers: int | None = None
    frozen_bottom_layers: int | None = None
    layers: Collection[int] | int | None = None
    layer_names: Collection[str] | str | None = None
    embeddings: bool = False
    final_norm: bool = False
    head: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in _WAYS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of {', '.join(_WAYS)}, got {' and '.join(given)}")
        if self.num_top_layers is not None:
            check_count("num_top_layers", self.num_top_layers)
        if self.frozen_bottom_layers is not None:
            check_count("frozen_bottom_layers", self.frozen_bottom_layers, least=0)
        if self.layers is not None:
            _check_layers(self.layers)
        check_names("layer_names", self.layer_names)
        if self.layer_names is not None and not self.layer_names:
            raise ValueError("layer_names must name a module, got none")
        for name in ("embeddings", "final_norm", "head"):
            check_bool(name, getattr(self, name))


@dataclass
class PartialAdaptation(InPlaceAdaptation):
    """Chosen layers are trained."""

    method: ClassVar[str] = "partial fine-tuning"
    config: PartialConfig

    @classmethod
    def plan(cls, model: nn.Module, config: MethodConfig) -> PartialAdaptation:
        """Raises ValueError: a layer outside the model, a name or a part that it has not, a quantised weight, one tied
        to a tensor that stays frozen; nothing to train."""
        assert isinstance(config, PartialConfig)
        _, saved = saved_modules(model, config)
        paths = [*_chosen_layers(model, config), *_named(model, config), *_around(model, config), *saved]
        return cls(config, trained_names(model, chosen_within(paths)))


def _chosen_layers(model: nn.Module, config: PartialConfig) -> list[str]:
    top, bottom, layers = config.num_top_layers, config.frozen_bottom_layers, config.layers
    if top is None and bottom is None and layers is None:
        return []
    paths = layer_paths(model, config.layers_pattern)
    has = f"the model has {len(paths)} layers ({paths[0]} to {paths[-1]})"
    if layers is not None:
        indices = (layers,) if isinstance(layers, int) else layers
        outside = [i for i in indices if not -len(paths) <= i < len(paths)]
        if outside:
            raise ValueError(f"layers has {', '.join(map(str, outside))}, but {has}")
        return [paths[i] for i in indices]
    if top is not None and top > len(paths):
        raise ValueError(f"num_top_layers={top}, but {has}")
    if bottom is not None and bottom >= len(paths):
        raise ValueError(f"frozen_bottom_layers={bottom} leaves none to train: {has}")
    return paths[bottom:] if top is None else paths[-top:]


def _named(model: nn.Module, config: PartialConfig) -> list[str]:
    wanted = config.layer_names
    if wanted is None:
        return []
    paths = [path for path, _ in model.named_modules() if path]
    for names in [wanted] if isinstance(wanted, str) else [[name] for name in wanted]:
        if not any(names_match(names, path) for path in paths):
            children = dict.fromkeys(path.rpartition(".")[2] for path in paths)
            last = [name for name in children if not name.isdigit()]
            shown = names if isinstance(names, str) else names[0]
            raise ValueError(f"layer_names: {shown!r} matches no module; modules are named {', '.join(last[:30])}")
    return [path for path in paths if names_match(wanted, path)]


def _around(model: nn.Module, config: PartialConfig) -> list[str]:
    layers = [path for stack in layer_stacks(model, config.layers_pattern) for path in stack]
    parts = {
        "embeddings": embedding_paths(model, layers),
        "final_norm": norm_paths(model, layers),
        "head": sorted(output_heads(model, classification=True)),
    }
    for name, paths in parts.items():
        if getattr(config, name) and not paths:
            raise ValueError(f"{name}=True, but {type(model).__name__} has none that is known; use layer_names")
    return [path for name, paths in parts.items() if getattr(config, name) for path in paths]


def _check_layers(layers: object) -> None:
    indices = (layers,) if isinstance(layers, int) else layers
    if not isinstance(indices, Collection) or not all(isinstance(i, int) and not isinstance(i, bool) for i in indices):
        raise TypeError(f"layers must be an int or a list of ints, got {layers!r}")
    if not indices:
        raise ValueError("layers must name a layer, got none")
