"""What a method costs in memory."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from .. import save_adapter
from ..nn import LoRALinear
from ..nn.nf4_linear import NF4Storage
from .data import Sequences, Split
from .loss import loss_sum
from .memory import peak_of
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


def peak_memory(model: nn.Module, data: Split, options: Options) -> int:
    """Most bytes that two training steps hold: weights, gradients, optimizer state, activations.

    The steps are taken at a learning rate of zero, so the model stays as it is; its gradients are freed. All layers are
    trained, as they are at the end where they join one by one. This is what torch's allocator says: on a CPU without
    the scratch that C++ code takes for itself (`CPUMemory`).
    """
    trainer = Trainer(model, data, replace(options, lr=0.0, layerwise=False))
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainer.device)
        _two_steps(trainer)
        return torch.cuda.max_memory_allocated(trainer.device)
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())
    }
    return sum(held.values()) + peak_of(lambda: _two_steps(trainer))


def _two_steps(trainer: Trainer) -> None:
    trainer.model.train()
    for _ in range(2):
        trainer.step()


def checkpoint_bytes(model: nn.Module) -> int:
    """Size of what `save_adapter` writes."""
    with TemporaryDirectory() as folder:
        save_adapter(model, folder)
        return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
