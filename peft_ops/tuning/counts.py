"""How much of a model is trained."""

from dataclasses import dataclass

from torch import nn

from ..nn.nf4_linear import NF4Storage


@dataclass(frozen=True)
class ParameterCount:
    """trainable and total elements, and trainable / total."""

    trainable: int
    total: int
    share: float

    def __str__(self) -> str:
        return f"{self.trainable:,} of {self.total:,} parameters are trainable ({self.share:.4%})"


def trainable_parameters(model: nn.Module) -> ParameterCount:
    """Counts of a model's parameters; an NF4 weight counts as the elements that it stands for, its scales do not."""
    storages = [module for module in model.modules() if isinstance(module, NF4Storage)]
    stored = {id(tensor) for storage in storages for tensor in storage.stored()}
    quantised = {id(storage.packed): storage.weight.shape.numel() for storage in storages}
    dense = [p for p in model.parameters() if id(p) not in stored]
    trainable = sum(p.numel() for p in dense if p.requires_grad)
    total = sum(p.numel() for p in dense) + sum(quantised.values())
    return ParameterCount(trainable, total, trainable / total if total else 0.0)
