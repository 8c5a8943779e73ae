"""Adapters in the format of Hugging Face PEFT: adapter_config.json and adapter_model.safetensors."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from ..nn import LoRALinear, NF4Linear
from ..nn.linear_like import dense_weight
from ..tuning.adapt import apply
from ..tuning.adaptation import Adaptation, adaptation_of, get_tensor, require_adaptation, require_enabled
from ..tuning.config import LoRAConfig
from ..tuning.plan import plan
from .files import read_json, read_safetensors, write_files
from .peft_config import config_from_peft, config_to_peft

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def save_adapter(model: nn.Module, path: str | os.PathLike) -> None:
    """Write the adapter of an adapted model into the folder `path`, readable by peft.PeftModel.from_pretrained.

    Both files are written and flushed under temporary names before they take the place of earlier ones: an interrupted
    save leaves those. Of a 4-bit base nothing is written, as PEFT does.

    Raises:
        ValueError: the model is not adapted, or its adapters are disabled at the moment.
    """
    adaptation = require_adaptation(model)
    require_enabled(model)
    tensors = {key: get_tensor(model, name).detach().contiguous() for key, name in _names(adaptation).items()}
    config = json.dumps(config_to_peft(adaptation.config, model), indent=2, sort_keys=True)
    write_files(
        Path(path),
        {
            WEIGHTS_NAME: lambda file: save_file(tensors, file, metadata={"format": "pt"}),
            CONFIG_NAME: lambda file: _write_text(file, config),
        },
    )


def load_adapter(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Load a PEFT LoRA checkpoint into `model`, which is returned; one that is not adapted is adapted first.

    Everything is checked before the model is touched. The adapter is trainable afterwards, as after adapt.

    Raises:
        FileNotFoundError: the folder or one of its two files is missing.
        ValueError: a file is corrupt or cut short; keys, shapes or the config do not fit the model (all are listed); a
            feature of PEFT that is not supported; NaN or infinite values; adapters that are merged or disabled.
        TypeError: a field of the config has the wrong type, or the config targets a layer that is not linear.
    """
    require_enabled(model)
    merged = [path for path, module in model.named_modules() if isinstance(module, LoRALinear) and module.merged]
    if merged:
        raise ValueError(f"an adapter is merged into {_listed(merged)}: unmerge() before loading another")
    folder = Path(path)
    config = _read_config(_existing(folder / CONFIG_NAME))
    file = _existing(folder / WEIGHTS_NAME)
    tensors = read_safetensors(file)
    adaptation = adaptation_of(model)
    planned = adaptation is None
    if adaptation is None:
        adaptation = plan(model, config)
    names = _names(adaptation)
    _check_scalings(model, adaptation, config, file)
    _check_tensors(file, tensors, {key: _shape(model, adaptation, name) for key, name in names.items()})
    if planned:
        apply(model, adaptation)
    with torch.no_grad():
        for key, name in names.items():
            get_tensor(model, name).copy_(tensors[key])
    return model


def _names(adaptation: Adaptation) -> dict[str, str]:
    """{key in the file: name in the model}."""
    adapters = {
        f"{_PREFIX}{path}.{leaf}.weight": f"{path}.{leaf}"
        for path in adaptation.targets
        for leaf in ("lora_A", "lora_B")
    }
    wrapped = set(adaptation.targets)
    for name in adaptation.trained:
        path, _, leaf = name.rpartition(".")
        adapters[_PREFIX + (f"{path}.base_layer.{leaf}" if path in wrapped else name)] = name
    return adapters


def _shape(model: nn.Module, adaptation: Adaptation, name: str) -> tuple[int, ...]:
    """Of a tensor of the adapter, which may be still to come."""
    path, _, leaf = name.rpartition(".")
    layer = model.get_submodule(path)
    if leaf not in ("lora_A", "lora_B") or isinstance(layer, LoRALinear):
        return tuple(get_tensor(model, name).shape)
    n, k = (layer.weight if isinstance(layer, NF4Linear) else dense_weight(layer)).shape
    r = adaptation.config.rank(path)
    return (r, k) if leaf == "lora_A" else (n, r)


def _existing(file: Path) -> Path:
    if not file.is_file():
        names = sorted(path.name for path in file.parent.iterdir()) if file.parent.is_dir() else ["no such folder"]
        raise FileNotFoundError(f"{file.parent} has no {file.name} (found: {', '.join(names) or 'nothing'})")
    return file


def _read_config(file: Path) -> LoRAConfig:
    try:
        return config_from_peft(read_json(file))
    except (TypeError, ValueError) as error:
        raise type(error)(str(error) if str(file) in str(error) else f"{file}: {error}") from error


def _check_scalings(model: nn.Module, adaptation: Adaptation, config: LoRAConfig, file: Path) -> None:
    """On an adapted model the checkpoint's lora_alpha and rslora must be the model's: the weights mean nothing else."""
    wrong = []
    for path in adaptation.targets:
        layer = model.get_submodule(path)
        if isinstance(layer, LoRALinear) and layer.r == config.rank(path) and layer.scaling != config.scaling(path):
            wrong.append(f"{path}: {config.scaling(path):g}, the model has {layer.scaling:g}")
    if wrong:
        raise ValueError(f"{file.parent}: scaling (lora_alpha, r, use_rslora) differs: {_listed(wrong)}")


def _check_tensors(file: Path, tensors: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    missing = [key for key in shapes if key not in tensors]
    unexpected = [key for key in tensors if key not in shapes and not _is_leftover(key, shapes)]
    wrong = [
        f"{key}: {tuple(tensors[key].shape)}, expected {shape}"
        for key, shape in shapes.items()
        if key in tensors and tuple(tensors[key].shape) != shape
    ]
    bad = [key for key in shapes if key in tensors and not torch.isfinite(tensors[key]).all()]
    adapters = [key for key in shapes if key in tensors and ".lora_" in key]
    problems = {
        "missing keys": missing,
        "unexpected keys": unexpected,
        "shapes": wrong,
        "NaN or infinite": bad,
        "not floating point": [key for key in adapters if not tensors[key].is_floating_point()],
    }
    found = [f"{name}: {_listed(keys)}" for name, keys in problems.items() if keys]
    if found:
        raise ValueError(f"{file} does not fit the model; " + "; ".join(found))


def _is_leftover(key: str, shapes: dict[str, tuple[int, ...]]) -> bool:
    """With bias='all' PEFT writes the biases of modules_to_save three times; the plain key is the one it reads."""
    return any(
        key.replace(f".{part}.", ".") in shapes for part in ("modules_to_save", "original_module") if part in key
    )


def _listed(items: list[str], most: int = 20) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
