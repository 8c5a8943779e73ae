"""Writing files so that an interruption leaves the previous ones, and reading them with errors that name them."""

import filecmp
import json
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def write_files(folder: Path, writers: dict[str, Callable[[Path], None] | None]) -> None:
    """Write every file under a temporary name, flush all to the disk, then rename them one after another.

    A file whose bytes did not change is not renamed, so where one file changes (a later checkpoint of a run: its config
    stays) the exchange is atomic. Where the writer is None, an earlier file is removed at the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as scratch:
        written = {}
        for name, write in writers.items():
            if write is not None:
                written[name] = path = Path(scratch, name)
                write(path)
                _flush(path)
        for name, path in written.items():
            final = folder / name
            if not (final.is_file() and filecmp.cmp(path, final, shallow=False)):
                os.replace(path, final)
        for name in writers.keys() - written.keys():
            (folder / name).unlink(missing_ok=True)
        _flush(folder)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def tensor_writer(tensors: dict[str, torch.Tensor]) -> Callable[[Path], None]:
    """Writes them as safetensors, as PEFT does; every tensor gets storage of its own."""
    own = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
    return lambda file: save_file(own, file, metadata={"format": "pt"})


def json_writer(value: dict[str, Any]) -> Callable[[Path], None]:
    """Writes it as JSON with sorted keys: the same value gives the same bytes."""
    text = json.dumps(value, indent=2, sort_keys=True)

    def write(file: Path) -> None:
        file.write_text(text, encoding="utf-8")

    return write


def read_json(path: Path) -> dict:
    """The object in a JSON file; ValueError naming the file where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, on the CPU; ValueError naming the file where it is corrupt or cut short."""
    try:
        with safe_open(path, framework="pt") as file:
            keys = file.keys()
            return {key: file.get_tensor(key) for key in keys}
    except SafetensorError as error:
        raise ValueError(f"{path} is corrupt or truncated: {error}") from error


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file of torch.save, on the CPU, unpickling nothing but tensors; ValueError as above."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is corrupt, truncated or not only of tensors: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path} must hold a dict of tensors, got {type(tensors).__name__}")
    return tensors
