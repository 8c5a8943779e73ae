"""Prefix-tuning and P-tuning v2 in a model: a prefix in every layer's attention, positions moved behind it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from ..nn.attention_interface import register, with_prefix
from ..nn.positions import PositionShift, PrefixedStack, RelativeShift
from ..nn.prefix import Prefix, PrefixEncoder, ProjectedPrefix
from .adaptation import Adaptation
from .attention_plan import AttentionSite, PositionSites, attention_sites, position_sites, text_config
from .config import MethodConfig
from .prefix_config import PrefixTuningConfig
from .prefix_text import KeysValues, keys_and_values
from .trained import saved_modules, tensors_within

ENCODERS = "peft_prefix_encoders"  # of the root of the model: a child for every place
_PREFIX, _SHIFT, _STACK = "peft_prefix", "peft_shift", "peft_stack"


@dataclass
class PrefixAdaptation(Adaptation):
    """sites: the attention modules with a prefix, in the order of the layers. positions: what is moved by n.
    text: keys and values to start from, until they are installed.

    Source: Li and Liang, "Prefix-Tuning", 2021; fields of Hugging Face PEFT 0.21.
    """

    method: ClassVar[str] = "prefix-tuning"
    config: PrefixTuningConfig
    sites: list[AttentionSite] = field(default_factory=list)
    positions: PositionSites = field(default_factory=lambda: PositionSites([], [], {}))
    text: dict[str, KeysValues] = field(default_factory=dict)

    @classmethod
    def plan(cls, model: nn.Module, config: MethodConfig) -> PrefixAdaptation:
        """Raises:
        ValueError: a model whose attention or positions are not recognised, or whose attention cannot be wrapped
            (named); as many virtual tokens as positions, or more; token ids outside the vocabulary; modules_to_save
            that match nothing, or with T5's relative_attention_bias, which gets no gradient through a prefix.
        """
        assert isinstance(config, PrefixTuningConfig)
        sites = attention_sites(model, tuple(config.places))
        positions = position_sites(model, sites)
        _check_room(model, config.num_virtual_tokens, positions)
        trained = tensors_within(model, saved_modules(model, config)[1])
        biases = [name for name in trained if ".relative_attention_bias." in name]
        if biases:
            raise ValueError(f"modules_to_save cannot have {biases[0]}: it gets no gradient where there is a prefix")
        text = {} if config.init_token_ids is None else keys_and_values(model, sites, config.init_token_ids)
        return cls(config=config, trained=trained, sites=sites, positions=positions, text=text)

    def install(self, model: nn.Module) -> None:
        register()
        if self.config.prefix_projection:
            encoders = {place: self._encoder(model, place) for place in self.places}
            model.add_module(ENCODERS, nn.ModuleDict(encoders))
        copies: dict[int, Any] = {}  # layers that shared a config share its copy
        for site in self.sites:
            module: Any = model.get_submodule(site.path)
            module.add_module(_PREFIX, self._prefix(model, site).train(module.training))
            module.config = copies.setdefault(id(module.config), with_prefix(module.config))
        self.text = {}
        self._move_positions(model)

    @property
    def places(self) -> list[str]:
        """The places that the model has, as the config orders them."""
        present = {site.place for site in self.sites}
        return [place for place in self.config.places if place in present] or sorted(present)

    def at(self, place: str) -> list[AttentionSite]:
        """The sites of one place, in the order of the layers."""
        return [site for site in self.sites if site.place == place]

    def prefix(self, model: nn.Module, site: AttentionSite) -> Prefix:
        """The prefix that was installed there."""
        prefix = model.get_submodule(f"{site.path}.{_PREFIX}")
        assert isinstance(prefix, Prefix)
        return prefix

    def encoder(self, model: nn.Module, place: str) -> PrefixEncoder:
        """The encoder that was installed for a place; there is one with prefix_projection only."""
        encoder = model.get_submodule(f"{ENCODERS}.{place}")
        assert isinstance(encoder, PrefixEncoder)
        return encoder

    @contextmanager
    def off(self, model: nn.Module) -> Iterator[None]:
        """The attention modules have the model's config again, and positions start at 0."""
        self._switch(model, False)
        try:
            yield
        finally:
            self._switch(model, True)

    def eject(self, model: nn.Module) -> None:
        """Keep the keys and values that the encoder gives, as parameters, and drop it.

        Raises:
            ValueError: there is no encoder.
        """
        if not self.config.prefix_projection:
            raise ValueError("prefix_projection is False: keys and values are trained themselves, nothing to eject")
        for site in self.sites:
            prefix = self.prefix(model, site)
            assert isinstance(prefix, ProjectedPrefix)
            model.get_submodule(site.path).add_module(_PREFIX, prefix.plain())
        delattr(model, ENCODERS)
        self.config = dataclasses.replace(self.config, prefix_projection=False)

    def shapes(self, model: nn.Module) -> dict[str, torch.Size]:
        n, shapes = self.config.num_virtual_tokens, {}
        hidden = self.config.encoder_hidden_size or _width(model)
        if self.config.prefix_projection:
            for place in self.places:
                encoder = f"{ENCODERS}.{place}"
                shapes[f"{encoder}.embedding.weight"] = torch.Size((n, _width(model)))
                shapes[f"{encoder}.linear.weight"] = torch.Size((hidden, _width(model)))
                shapes[f"{encoder}.linear.bias"] = torch.Size((hidden,))
        for site in self.sites:
            path, out = f"{site.path}.{_PREFIX}", site.heads * (site.key_dim + site.value_dim)
            if self.config.prefix_projection:
                shapes[f"{path}.linear.weight"] = torch.Size((out, hidden))
                shapes[f"{path}.linear.bias"] = torch.Size((out,))
            else:
                shapes[f"{path}.key"] = torch.Size((site.heads, n, site.key_dim))
                shapes[f"{path}.value"] = torch.Size((site.heads, n, site.value_dim))
        return shapes | super().shapes(model)

    def _encoder(self, model: nn.Module, place: str) -> PrefixEncoder:
        hidden = self.config.encoder_hidden_size or _width(model)
        where = _like(model, self.at(place)[0].path)
        return PrefixEncoder(self.config.num_virtual_tokens, _width(model), hidden, **where)

    def _prefix(self, model: nn.Module, site: AttentionSite) -> Prefix:
        config, module = self.config, model.get_submodule(site.path)
        arguments: dict[str, Any] = _like(model, site.path) | {
            "n": config.num_virtual_tokens, "heads": site.heads, "key_dim": site.key_dim, "value_dim": site.value_dim,
            "config": module.config, "dropout": config.dropout, "zero": config.init_weights == "zero",
        }  # fmt: skip
        if config.prefix_projection:
            return ProjectedPrefix(encoder=self.encoder(model, site.place), **arguments)
        prefix = Prefix(**arguments)
        if site.path in self.text:
            with torch.no_grad():
                for parameter, start in zip((prefix.key, prefix.value), self.text[site.path], strict=True):
                    parameter.copy_(start)
        return prefix

    def _move_positions(self, model: nn.Module) -> None:
        n, found = self.config.num_virtual_tokens, self.positions
        for path in found.shifts:
            module = model.get_submodule(path)
            shift = PositionShift(n, module)
            module.add_module(_SHIFT, shift)
            module.register_forward_pre_hook(shift.before, with_kwargs=True)
        for path in found.relative:
            attention: Any = model.get_submodule(path)
            relative = RelativeShift(n, attention)
            attention.add_module(_SHIFT, relative)
            attention.compute_bias = relative.compute_bias
        for path in dict.fromkeys(site.stack for site in self.sites):
            stack = model.get_submodule(path)
            watch = PrefixedStack(n, stack, found.limits.get(path))
            stack.add_module(_STACK, watch)
            stack.register_forward_pre_hook(watch.before, with_kwargs=True)

    def _switch(self, model: nn.Module, on: bool) -> None:
        copies: dict[int, Any] = {}
        for site in self.sites:
            owner: Any = model.get_submodule(site.path)
            original = self.prefix(model, site).config
            owner.config = copies.setdefault(id(original), with_prefix(original)) if on else original
        for module in model.modules():
            if isinstance(module, PositionShift | RelativeShift | PrefixedStack):
                module.enabled = on


@dataclass
class PTuningV2Adaptation(PrefixAdaptation):
    """Source: Liu et al., "P-Tuning v2", 2021."""

    method: ClassVar[str] = "P-tuning v2"


def _check_room(model: nn.Module, n: int, positions: PositionSites) -> None:
    table = min(positions.limits.values(), default=None)
    rotary = getattr(text_config(model), "max_position_embeddings", None)
    limit = table or (rotary if positions.shifts else None)  # T5's relative positions have no end
    if limit is not None and n >= limit:
        raise ValueError(f"num_virtual_tokens must be below the model's {limit} positions, got {n}")


def _width(model: nn.Module) -> int:
    return text_config(model).hidden_size


def _like(model: nn.Module, path: str) -> dict[str, Any]:
    """Device, and dtype of at least 32 bits, for what is trained beside a module; a 4-bit one may have no floats."""
    parameters = [*model.get_submodule(path).parameters(), *model.parameters()]
    dtype = next(p.dtype for p in parameters if p.is_floating_point())
    return {"device": parameters[0].device, "dtype": torch.promote_types(dtype, torch.float32)}
