"""What a method costs in memory."""

import weakref
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import save_adapter
from ..nn import LoRALinear
from ..nn.nf4_linear import NF4Storage
from .data import Sequences, Split
from .loss import loss_sum
from .training import Options, Trainer


def saved_for_backward(model: nn.Module, sequences: Sequences, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps between forward and backward of one batch, parameters and buffers excluded.

    Every storage counts once, whole: that is what stays allocated.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), sequences.tokens)}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_sum(model, sequences, dtype)
    del loss
    return sum(storages.values())


def base_bits(model: nn.Module) -> float:
    """Bits per weight of the linear layers' base, the output head (which no method touches) left out."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    nbytes = elements = 0
    for layer in model.modules():
        if isinstance(layer, NF4Storage):
            nbytes += sum(t.nbytes for t in layer.stored())
            elements += layer.weight.shape.numel()
        elif isinstance(layer, nn.Linear | LoRALinear) and layer is not head:
            nbytes += layer.weight.nbytes
            elements += layer.weight.shape.numel()
    return 8 * nbytes / elements if elements else 0.0


class AllocatedBytes(TorchDispatchMode):
    """While it is on, counts the bytes of the tensors that operations make: `live` now, `peak` at most.

    Storages count once, whole, until they are freed; those that were there before count nothing. Scratch memory inside
    an operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in _tensors((args, kwargs)):
            self._meet(tensor.untyped_storage(), 0)
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            self._meet(storage, storage.nbytes())
        return out

    def _meet(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        if storage._cdata in self._alive:
            return
        self._alive[storage._cdata] = nbytes
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, storage._cdata)

    def _gone(self, key: int) -> None:
        self.live -= self._alive.pop(key)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def peak_memory(model: nn.Module, data: Split, options: Options) -> int:
    """Most bytes that two training steps hold: weights, gradients, optimizer state, activations.

    The steps are taken at a learning rate of zero, so the model stays as it is; its gradients are freed. On a GPU this
    is what the allocator says, elsewhere what AllocatedBytes does. All layers are trained, as they are at the end where
    they join one by one.
    """
    trainer = Trainer(model, data, replace(options, lr=0.0, layerwise=False))
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainer.device)
        _two_steps(trainer)
        return torch.cuda.max_memory_allocated(trainer.device)
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())
    }
    with AllocatedBytes() as allocated:
        _two_steps(trainer)
    return sum(held.values()) + allocated.peak


def _two_steps(trainer: Trainer) -> None:
    trainer.model.train()
    for _ in range(2):
        trainer.step()


def checkpoint_bytes(model: nn.Module) -> int:
    """Size of what `save_adapter` writes."""
    with TemporaryDirectory() as folder:
        save_adapter(model, folder)
        return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
