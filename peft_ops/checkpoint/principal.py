"""Adapters that started from the weight (PiSSA, LoftQ) as plain LoRA over the base, and what training goes on from.

scaling · (B A − B₀ A₀), what training changed, is LoRA of rank 2 r with factors [A; A₀] and [B, −B₀]: any reader of
PEFT's files can add it to the base (PEFT's conversion of PiSSA, `path_initial_model_for_weight_conversion`).
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..tuning.lora import LoRAAdaptation
from ..tuning.lora_config import LoRAConfig
from .format import Tensors

_FACTORS = {"lora_A": "initial_a", "lora_B": "initial_b"}


def plain_config(config: LoRAConfig) -> LoRAConfig:
    """Of rank 2 r with the same scaling, which is alpha / r or alpha / sqrt(r)."""
    times = math.sqrt(2) if config.use_rslora else 2
    changes: dict[str, Any] = {
        "r": 2 * config.r, "lora_alpha": times * config.lora_alpha, "init_lora_weights": True,
        "rank_pattern": {key: 2 * r for key, r in config.rank_pattern.items()},
        "alpha_pattern": {key: times * alpha for key, alpha in config.alpha_pattern.items()},
    }  # fmt: skip
    return replace(config, **changes)


def plain_factor(model: nn.Module, name: str, factor: torch.Tensor) -> torch.Tensor:
    """The factor of rank 2 r at the place of the one called `name`; anything else as it is."""
    path, _, leaf = name.rpartition(".")
    if leaf not in _FACTORS:
        return factor
    initial = getattr(model.get_submodule(path), _FACTORS[leaf]).to(factor.dtype)
    return torch.cat((factor, initial)) if leaf == "lora_A" else torch.cat((factor, -initial), dim=1)


def start_names(adaptation: LoRAAdaptation) -> list[str]:
    """Names of the initial factors in the model."""
    return [f"{path}.{leaf}" for path in adaptation.targets for leaf in _FACTORS.values()]


def check_start(model: nn.Module, adaptation: LoRAAdaptation, tensors: Tensors) -> None:
    """The initial factors in `tensors`, by name, are those of this model: over 4 bits its base depends on them.

    Raises:
        ValueError: they are not, as on another base model.
    """
    for path in adaptation.targets:
        layer: Any = model.get_submodule(path)
        if path not in adaptation.quantize or not hasattr(layer, "initial_a"):
            continue
        probe = torch.ones(layer.initial_a.shape[1], 1, dtype=torch.float64)
        a, b = (tensors[f"{path}.{leaf}"].double() for leaf in _FACTORS.values())
        theirs, ours = b @ (a @ probe), layer.initial_b.double().cpu() @ (layer.initial_a.double().cpu() @ probe)
        if theirs.shape != ours.shape or (theirs - ours).norm() > 1e-2 * ours.norm():
            raise ValueError(f"the checkpoint was made on another base: {path} starts otherwise here")
