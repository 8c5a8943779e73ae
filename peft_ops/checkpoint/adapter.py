"""Saving what a method trained, and loading it: the same steps for every method and format."""

import os
from pathlib import Path

import torch
from torch import nn

from ..tuning.adapt import apply
from ..tuning.adaptation import adaptation_of, require_adaptation, require_enabled
from ..tuning.config import MethodConfig
from ..tuning.lora_layers import lora_layers
from ..tuning.methods import plan
from ..tuning.named import Named, activated, adapter_names, add, check_new_name, name_active
from .adapterhub import AdapterHub
from .files import read_json, write_files
from .format import CONFIG_NAME, Format, check_tensors, existing, listed
from .in_place import InPlace
from .peft_lora import PeftLoRA
from .peft_prefix import PeftPrefix
from .peft_prompt import PeftPrompt

FORMATS: tuple[Format, ...] = (PeftLoRA(), PeftPrompt(), PeftPrefix(), AdapterHub(), InPlace())


def save_adapter(model: nn.Module, path: str | os.PathLike, adapter_name: str | None = None) -> None:
    """Write what was trained of an adapted model into the folder `path`.

    LoRA and its family, prompt tuning, P-tuning, prefix-tuning, P-tuning v2: in Hugging Face PEFT's format, read by
    peft.PeftModel.from_pretrained; what only training needs (an encoder, the start of PiSSA) goes into
    adapter_training.safetensors beside it. Bottleneck adapters: in AdapterHub's, read by
    load_adapter(path, use_safetensors=True) of a model of that package; LayerNorms, which it does not train, go into
    adapter_training.safetensors. All files are written and flushed under temporary names before they take the place of
    earlier ones: an interrupted save leaves those. Of a frozen base nothing is written.
    Full and partial fine-tuning: the trained tensors by their names in the model.

    adapter_name: which of several LoRA adapters; None is the active one.

    Raises:
        ValueError: the model is not adapted, or its adapters are disabled at the moment.
    """
    require_adaptation(model)
    require_enabled(model)
    with activated(model, adapter_name):
        adaptation = require_adaptation(model)
        write_files(Path(path), _format_of(adaptation.config).files(model, adaptation))


def load_adapter(model: nn.Module, path: str | os.PathLike, adapter_name: str | None = None) -> nn.Module:
    """Load a checkpoint of any method into `model`, which is returned; one that is not adapted is adapted first.

    adapter_name: of several LoRA adapters, the one to load into, or a new one to add; None is the active one.
    Everything is checked before the model is touched. The adapter is trainable afterwards, as after adapt.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is corrupt or cut short; keys, shapes or the config do not fit the model (all are listed); a
            feature that is not supported; NaN or infinite values; adapters that are merged or disabled.
        TypeError: a field of the config has the wrong type, or the config targets a layer that is not linear.
    """
    if adapter_name is not None and adaptation_of(model) is not None:
        return _load_by_name(model, path, adapter_name)
    if adapter_name is not None:
        check_new_name(Named(""), adapter_name)
    require_enabled(model)
    merged = [path for path, layer in lora_layers(model).items() if layer.merged]
    if merged:
        raise ValueError(f"an adapter is merged into {listed(merged)}: unmerge() before loading another")
    folder = Path(path)
    file = existing(folder / CONFIG_NAME)
    saved = read_json(file)
    kind = next((kind for kind in FORMATS if kind.recognises(saved)), None)
    if kind is None:
        raise ValueError(f"{file}: peft_type must be a method that is known here, got {saved.get('peft_type')!r}")
    config, tensors = kind.read(folder, saved)
    adaptation = adaptation_of(model)
    if planned := adaptation is None:
        adaptation = plan(model, config)
    elif not kind.writes(adaptation.config):
        raise ValueError(f"{file} is of another method: the model was adapted with {adaptation.method}")
    tensors = kind.fit(model, adaptation, config, tensors)
    check_tensors(folder, tensors, kind.expected(model, adaptation, config))
    if planned:
        apply(model, adaptation)
    with torch.no_grad():
        kind.assign(model, adaptation, tensors)
    if adapter_name is not None:
        name_active(model, adapter_name)
    return model


def _load_by_name(model: nn.Module, path: str | os.PathLike, adapter_name: str) -> nn.Module:
    if adapter_name in adapter_names(model):
        with activated(model, adapter_name):
            return load_adapter(model, path)
    saved = read_json(existing(Path(path) / CONFIG_NAME))
    if not PeftLoRA().recognises(saved):
        raise ValueError(f"{path} holds no LoRA adapter, the only one that can be added to another")
    return add(model, adapter_name, lambda: load_adapter(model, path))


def _format_of(config: MethodConfig) -> Format:
    return next(kind for kind in FORMATS if kind.writes(config))
