"""What a checkpoint format has to answer, and the checks that all of them share."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ..tuning.adaptation import Adaptation
from ..tuning.config import MethodConfig

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
TRAINING_NAME = "adapter_training.safetensors"  # what a run goes on from and inference does not need; ours alone
Writers = dict[str, Callable[[Path], None] | None]  # {file name: what writes it; None: the file must not be there}
Tensors = dict[str, torch.Tensor]


class Format(Protocol):
    """One project's files for one kind of method. Keys are the file's, names are the model's."""

    def writes(self, config: MethodConfig) -> bool:
        """Whether adapters of this config are saved in this format."""

    def recognises(self, saved: dict[str, Any]) -> bool:
        """Whether an adapter_config.json with these fields is of this format."""

    def files(self, model: nn.Module, adaptation: Adaptation) -> Writers:
        """What to write for an adapted model."""

    def read(self, folder: Path, saved: dict[str, Any]) -> tuple[MethodConfig, Tensors]:
        """The config, and the tensors by the keys of the file; raises errors that name the file."""

    def fit(self, model: nn.Module, adaptation: Adaptation, config: MethodConfig, tensors: Tensors) -> Tensors:
        """The tensors that are for this model.

        Raises ValueError: the checkpoint's config does not fit what the model was adapted with.
        """

    def expected(self, model: nn.Module, adaptation: Adaptation, config: MethodConfig) -> dict[str, torch.Size]:
        """Key and shape of every tensor that the file must have; the model may be still to be adapted."""

    def assign(self, model: nn.Module, adaptation: Adaptation, tensors: Tensors) -> None:
        """Copy the tensors, all checked, into the adapted model."""


def existing(file: Path) -> Path:
    """The file; FileNotFoundError naming what its folder holds instead."""
    if not file.is_file():
        names = sorted(path.name for path in file.parent.iterdir()) if file.parent.is_dir() else ["no such folder"]
        raise FileNotFoundError(f"{file.parent} has no {file.name} (found: {', '.join(names) or 'nothing'})")
    return file


def check_tensors(file: str | os.PathLike, tensors: Tensors, shapes: dict[str, torch.Size]) -> None:
    """Raises ValueError listing missing and unexpected keys, wrong shapes, NaN or infinite values, integers."""
    present = {key: tensors[key] for key in shapes if key in tensors}
    wrong = [
        f"{key}: {tuple(tensor.shape)}, expected {tuple(shapes[key])}"
        for key, tensor in present.items()
        if tensor.shape != shapes[key]
    ]
    problems = {
        "missing keys": [key for key in shapes if key not in tensors],
        "unexpected keys": [key for key in tensors if key not in shapes],
        "shapes": wrong,
        "NaN or infinite": [key for key, tensor in present.items() if not torch.isfinite(tensor).all()],
        "not floating point": [
            key for key, tensor in present.items() if not tensor.is_floating_point() and ".lora_" in key
        ],
    }
    found = [f"{name}: {listed(keys)}" for name, keys in problems.items() if keys]
    if found:
        raise ValueError(f"{file} does not fit the model; " + "; ".join(found))


def listed(items: Iterable[str], most: int = 20) -> str:
    """The first `most` of them, and how many more there are."""
    items = list(items)
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
