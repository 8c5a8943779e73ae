"""A new LoRA adapter out of several: their weighted sum, exactly or in a given rank."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import nn

from ..nn import LoRAEmbedding, LoRALinear
from ..nn.lora_layer import LoRALayer
from ..nn.nf4_lora_linear import NF4LoRALinear
from .adapt import apply
from .adaptation import require_adaptation
from .config import check_choice, check_count
from .lora import LoRAAdaptation
from .lora_config import LoRAConfig
from .methods import plan
from .named import add, layers_by_name, named_of

_Factors = list[tuple[float, torch.Tensor, torch.Tensor]]  # weight · scaling, A [r, K], B [N, r] of each adapter
_PLAIN = (LoRALinear, NF4LoRALinear, LoRAEmbedding)


def add_weighted_adapter(
    model: nn.Module, adapters: Sequence[str], weights: Sequence[float], adapter_name: str,
    combination_type: str = "cat", svd_rank: int | None = None,
) -> nn.Module:  # fmt: skip
    """Add an adapter combined from others; it is not made active. Layers that only some of them have count too.

    combination_type: 'cat' is Σ wᵢ sᵢ Bᵢ Aᵢ exactly, its rank the sum of theirs; 'svd' the best approximation of that
        in svd_rank (None: their largest rank); 'linear' sums A and B each, with the roots of |wᵢ sᵢ|, which needs equal
        ranks and is that sum for one adapter only. sᵢ are their scalings; that of the new one is 1.

    A warning names adapters that trained heads or biases too, which are not combined.

    Raises:
        TypeError: DoRA, PiSSA or LoftQ among them, whose effect is no product of factors.
        ValueError: no such adapters, another number of weights, an existing name, unequal ranks for 'linear'.

    Source: combinations of Hugging Face PEFT 0.21, `LoraModel.add_weighted_adapter`, whose default is 'svd'.
    """
    check_choice("combination_type", combination_type, ("cat", "svd", "linear"))
    if len(adapters) != len(weights) or not adapters:
        raise ValueError(f"adapters and weights must be as many, at least one, got {len(adapters)} and {len(weights)}")
    if svd_rank is not None:
        check_count("svd_rank", svd_rank)
    layers = layers_by_name(model, adapters)
    _warn_of_heads(model, adapters)
    paths = list(dict.fromkeys(path for found in layers.values() for path in found))
    of = list(zip(adapters, weights, strict=True))
    parts = {path: _factors(path, [(layers[name].get(path), weight) for name, weight in of]) for path in paths}
    if combination_type == "linear" and any(len({a.shape[0] for _, a, _ in part}) > 1 for part in parts.values()):
        raise ValueError("combination_type 'linear' needs adapters of equal rank; 'cat' and 'svd' do not")
    combined = {path: _combined(part, combination_type, svd_rank) for path, part in parts.items()}
    r = max(a.shape[0] for a, _ in combined.values())
    config = replace(
        _first_config(model, adapters[0]), r=r, lora_alpha=r, rank_pattern={}, alpha_pattern={}, use_rslora=False,
        target_modules=paths, exclude_modules=None, layers_to_transform=None, layers_pattern=None,
        modules_to_save=None, bias="none", task_type=None, init_lora_weights=True,
    )  # fmt: skip

    def install() -> None:
        apply(model, plan(model, config))
        with torch.no_grad():
            for path, (a, b) in combined.items():
                layer = model.get_submodule(path)
                for name, factor, dim in zip(layer.ADAPTER, (a, b), (0, 1), strict=True):  # type: ignore[arg-type]
                    getattr(layer, name).zero_().narrow(dim, 0, factor.shape[dim]).copy_(factor)

    return add(model, adapter_name, install)


def _warn_of_heads(model: nn.Module, adapters: Sequence[str]) -> None:
    named, active = named_of(model), require_adaptation(model)
    whole = [name for name in adapters if (active if name == named.active else named.stowed[name][0]).trained]
    if whole:
        warnings.warn(f"heads and biases that {', '.join(whole)} trained whole are not combined", stacklevel=3)


def _factors(path: str, found: list[tuple[nn.Module | None, float]]) -> _Factors:
    factors = []
    for layer, weight in found:
        if layer is None:
            continue
        if type(layer) not in _PLAIN:
            raise TypeError(f"{path} is {type(layer).__name__}: only plain LoRA can be combined")
        assert isinstance(layer, LoRALayer)
        a, b = (getattr(layer, name).detach() for name in layer.ADAPTER)
        wide = torch.promote_types(a.dtype, torch.float32)
        a, b = a.to(wide), b.to(wide)
        factors.append((weight * layer.scaling, a, b))
    return factors


@torch.no_grad()
def _combined(factors: _Factors, how: str, svd_rank: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    if how == "cat":
        return torch.cat([w * a for w, a, _ in factors]), torch.cat([b for _, _, b in factors], dim=1)
    if how == "linear":
        roots = [math.sqrt(abs(w)) for w, _, _ in factors]
        signed = [math.copysign(root, w) for root, (w, _, _) in zip(roots, factors, strict=True)]
        a = sum(root * a for root, (_, a, _) in zip(signed, factors, strict=True))
        b = sum(root * b for root, (_, _, b) in zip(roots, factors, strict=True))
        assert isinstance(a, torch.Tensor)
        assert isinstance(b, torch.Tensor)
        return a, b
    rank = svd_rank or max(a.shape[0] for _, a, _ in factors)
    a, b = torch.cat([w * a for w, a, _ in factors]), torch.cat([b for _, _, b in factors], dim=1)
    # The singular vectors of B A from those of the small R Rᵀ factors, without the product: B = Q R, Aᵀ = P S.
    q, upper = torch.linalg.qr(b)
    p, other = torch.linalg.qr(a.t())
    u, s, vh = torch.linalg.svd(upper @ other.t())
    rank = min(rank, len(s))
    return vh[:rank] @ p.t(), q @ (u[:, :rank] * s[:rank])


def _first_config(model: nn.Module, name: str) -> LoRAConfig:
    """As a LoRAConfig where it is a QLoRAConfig: the base that the new adapter shares is quantised already."""
    named = named_of(model)
    adaptation = require_adaptation(model) if name == named.active else named.stowed[name][0]
    assert isinstance(adaptation, LoRAAdaptation)
    return LoRAConfig(**{f.name: getattr(adaptation.config, f.name) for f in fields(LoRAConfig)})
