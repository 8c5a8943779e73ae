"""What every layer with a low-rank adapter does: rest, be merged into its base weight, and be taken out again."""

from typing import Any, ClassVar

import torch
from torch import nn

from ..nf4 import NF4Weight


class LoRALayer(nn.Module):
    """A layer of a base model, its tensors under their own names, and an adapter beside them.

    Subclasses say how the two add up: `_adapted_weight` and `_base_tensors`.
    """

    ADAPTER: ClassVar[tuple[str, ...]]  # names of what is trained, those of Hugging Face PEFT
    weight: nn.Parameter | NF4Weight
    r: int
    lora_alpha: float
    lora_dropout: float
    scaling: float
    adapter_enabled: bool = True  # False: the base layer alone
    _base_class: type[nn.Module]
    _base_attributes: dict[str, Any]
    _original: dict[str, torch.Tensor] | None = None  # the base tensors that merge() replaced

    def _adapted_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """A fresh weight with the adapter in it."""
        raise NotImplementedError

    def _base_tensors(self, matrix: torch.Tensor) -> dict[str, Any]:
        """What to store for a base weight of these values."""
        raise NotImplementedError

    def to_base(self) -> nn.Module:
        """The layer that was replaced, with the adapter merged in."""
        raise NotImplementedError

    def base(self) -> nn.Module:
        """The layer that was replaced, over the same tensors, without the adapter."""
        raise NotImplementedError

    def _share_attributes(self, base: nn.Module) -> None:
        """The public attributes of the layer replaced, which its forward reads and `_rebuilt` gives back."""
        self._base_class = type(base)
        self._base_attributes = {k: v for k, v in vars(base).items() if not k.startswith("_") and k != "training"}
        vars(self).update(self._base_attributes)

    def _rebuilt(self, **parameters: nn.Parameter | None) -> nn.Module:
        """A layer of the class replaced, over these parameters."""
        layer = self._base_class.__new__(self._base_class)
        nn.Module.__init__(layer)
        vars(layer).update(self._base_attributes)
        for name, parameter in parameters.items():
            layer.register_parameter(name, parameter)
        return layer.train(self.training)

    def _freeze_base(self) -> None:
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in self.ADAPTER)

    @property
    def merged(self) -> bool:
        """The adapter is inside the weight, and forward is the base layer's."""
        return self._original is not None

    @torch.no_grad()
    def merged_weight(self) -> torch.Tensor:
        """The weight with the adapter in it, computed in float32 (or float64) and rounded once to its dtype.

        Of a linear layer [out, in], whatever the layout of the base.

        Raises:
            ValueError: the result holds NaN or infinite values.
        """
        adapter = getattr(self, self.ADAPTER[0]).dtype
        wide = torch.promote_types(torch.promote_types(self.weight.dtype, adapter), torch.float32)
        merged = self._adapted_weight(wide).to(self.weight.dtype)
        if not merged.is_meta and not torch.isfinite(merged).all():
            raise ValueError("merging the adapter into weight gives NaN or infinite values; nothing was changed")
        return merged

    def merge(self) -> None:
        """Put the adapter into a new base weight; the original is kept, so unmerge() restores it exactly.

        Tied weights are not written to: this layer gets a weight of its own until unmerge(). Nothing where merged.
        """
        if self.merged:
            return
        tensors = self._base_tensors(self.merged_weight())
        self._original = {name: getattr(self, name) for name in tensors}
        self._set_base(tensors)

    def unmerge(self) -> None:
        """Undo merge(), to the bit. Nothing where not merged."""
        if self._original is not None:
            self._set_base(self._original)
            self._original = None

    def _set_base(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            setattr(self, name, tensor)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for tensor in (self._original or {}).values():
            tensor.data = self._base_fn(fn)(tensor.data)
        return self

    def _base_fn(self, fn):
        return fn

    def _repr_of_adapter(self) -> str:
        return (
            f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}, scaling={self.scaling:g}"
            + (", merged" if self.merged else "")
            + ("" if self.adapter_enabled else ", adapter disabled")
        )
