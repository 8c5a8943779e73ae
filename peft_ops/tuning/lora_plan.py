"""Everything that can be wrong with LoRA on a model is found here, before the model is touched."""

import warnings
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..nn import NF4Linear
from ..nn.linear_like import check_linear, dense_weight, is_conv1d
from ..nn.lora_embedding import check_embedding
from .config import matches_end
from .lora_config import LoRAConfig, QLoRAConfig
from .matching import is_within, linear_paths, names_match, output_heads, resolve_targets, target_paths
from .trained import saved_modules, tensors_within

_QUANTISABLE = (torch.float16, torch.bfloat16, torch.float32)
_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")


def plan_lora(model: nn.Module, config: LoRAConfig) -> dict[str, Any]:
    """The fields of the LoRAAdaptation that fits; the model is only read.

    Raises:
        TypeError: a target that is no linear layer; a weight that NF4 cannot hold.
        ValueError: nothing matched; NaN or infinite weights to quantise.
    """
    names, saved = saved_modules(model, config)
    config = replace(config, target_modules=resolve_targets(model, config, saved), modules_to_save=names or None)
    targets = target_paths(model, config)
    for path in targets:
        _check_target(model, path, saved)
        if config.use_dora and isinstance(model.get_submodule(path), nn.Embedding):
            raise ValueError(
                f"target_modules matches {path}, an embedding, on which use_dora is not supported: "
                "name it in exclude_modules, or leave use_dora unset"
            )
    config = replace(config, fan_in_fan_out=any(is_conv1d(model.get_submodule(path)) for path in targets))
    quantize = _quantizable(model, saved, targets) if isinstance(config, QLoRAConfig) else []
    for path in quantize:
        _check_quantizable(model, path)
    _warn_unused(model, config, targets)
    trained = tensors_within(model, saved)
    trained += [name for name in _bias_names(model, config, targets) if name not in trained]
    return {"config": config, "targets": targets, "quantize": quantize, "trained": trained}


def _check_target(model: nn.Module, path: str, saved: list[str]) -> None:
    layer, (parent, _, name) = model.get_submodule(path), path.rpartition(".")
    if not isinstance(layer, NF4Linear):
        try:
            (check_embedding if isinstance(layer, nn.Embedding) else check_linear)(layer)
        except (TypeError, ValueError) as error:
            raise type(error)(f"target_modules matches {path}, which cannot be adapted: {error}") from error
    tied = _stands_for(model, layer) if name == "shared" else []
    if tied:
        raise ValueError(
            f"target_modules matches {path}, which the model does not call: name {' and '.join(tied)}, "
            "which share its weight"
        )
    if _weight_read_by_parent(model, parent, name):
        raise ValueError(
            f"target_modules matches {path}, whose weight its parent reads without calling the layer: "
            "an adapter there would do nothing; name it in exclude_modules"
        )
    if is_within(path, saved):
        raise ValueError(f"target_modules matches {path}, which modules_to_save={saved} trains whole")


def _stands_for(model: nn.Module, shared: nn.Module) -> list[str]:
    """The embeddings that are called in the place of the `shared` one of encoder-decoder models: tied to it."""
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module is not shared and module.weight is shared._parameters["weight"]
    ]


def _weight_read_by_parent(model: nn.Module, parent: str, name: str) -> bool:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    in_attention = isinstance(model.get_submodule(parent), nn.MultiheadAttention)
    return in_attention or (model_type in _MAMBA and name == "out_proj")


def _quantizable(model: nn.Module, saved: list[str], targets: list[str]) -> list[str]:
    """All linear layers but output heads, modules_to_save, tied weights and those that another module reads."""
    heads = output_heads(model, classification=True)
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    paths = []
    for path in linear_paths(model):
        layer, (parent, _, name) = model.get_submodule(path), path.rpartition(".")
        if (
            path in heads
            or is_within(path, saved)
            or isinstance(layer, NF4Linear)
            or _weight_read_by_parent(model, parent, name)
        ):
            continue
        if path in targets or owners[id(layer._parameters["weight"])] == 1:
            paths.append(path)
    return paths


def _check_quantizable(model: nn.Module, path: str) -> None:
    weight = dense_weight(model.get_submodule(path))
    if weight.dtype not in _QUANTISABLE:
        raise TypeError(f"{path}.weight must be float32, float16 or bfloat16 to be quantised, got {weight.dtype}")
    if not weight.is_meta and not torch.isfinite(weight).all():
        raise ValueError(f"{path}.weight holds NaN or infinite values and cannot be quantised")


def _bias_names(model: nn.Module, config: LoRAConfig, targets: Collection[str]) -> list[str]:
    if config.bias == "none":
        return []
    names = [name for name, _ in model.named_parameters() if name == "bias" or name.endswith(".bias")]
    return names if config.bias == "all" else [name for name in names if name.rpartition(".")[0] in set(targets)]


def _warn_unused(model: nn.Module, config: LoRAConfig, targets: list[str]) -> None:
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field):
            if not any(matches_end(pattern, path) for path in targets):
                warnings.warn(f"{field}[{pattern!r}] matches none of the adapted layers", stacklevel=6)
    excluded = config.exclude_modules
    if excluded and not any(names_match(excluded, path) for path, _ in model.named_modules()):
        warnings.warn(f"exclude_modules={excluded!r} matches no module", stacklevel=6)
