"""What a method costs in memory."""

import torch
from torch import nn

from ..nn import LoRALinear
from ..nn.nf4_linear import NF4Storage
from .data import Sequences
from .training import loss_sum


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
