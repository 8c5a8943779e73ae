"""LoRA over a 4-bit base: the layer of QLoRA."""

import warnings
from typing import Any

import torch
from torch import nn

from .. import nf4
from ..nf4 import NF4Weight
from ..ops import nf4_linear
from .lora_linear import LoRALinear
from .nf4_linear import NF4Linear, NF4Storage, keeping_dtype, nf4_parameters, plain_linear


class NF4LoRALinear(LoRALinear, NF4Storage):
    """A LoRALinear whose base is stored as NF4Linear stores it; made by LoRALinear.from_linear(nf4_linear, ...).

    merge() quantises the merged weight again, which loses what NF4 cannot hold; the original bytes are kept, so
    unmerge() is exact. to_linear() gives a dense nn.Linear and loses only the rounding to the nominal dtype.

    Source: Dettmers et al., "QLoRA", 2023, equation 5.
    """

    fan_in_fan_out = False
    weight = NF4Storage.weight

    def __init__(self, *args, **kwargs) -> None:
        raise TypeError("a LoRALinear over NF4 is made by LoRALinear.from_linear(NF4Linear(...), r=...)")

    def _share_base(self, linear: nn.Module) -> None:
        assert isinstance(linear, NF4Linear)
        self._store(linear.weight)
        self.register_parameter("bias", linear.bias)

    def _matrix(self) -> NF4Weight:
        return self.weight

    def _base_forward(self, x: torch.Tensor) -> torch.Tensor:
        return nf4_linear(x, self.weight, self.bias)

    def _wide_base(self, dtype: torch.dtype) -> torch.Tensor:
        return nf4.dequantize(self.weight, dtype)

    def _base_tensors(self, matrix: torch.Tensor) -> dict[str, Any]:
        weight = nf4.quantize(matrix, self.blocksize, self.weight.nested)
        tensors = {
            **nf4_parameters(weight),
            "nested_absmax": weight.nested_absmax,
            "nested_offset": weight.nested_offset,
        }
        return {name: t for name, t in tensors.items() if t is not None}

    def merge(self) -> None:
        """Put the adapter into a newly quantised weight: lossy (see the class); unmerge() restores the bytes."""
        if not self.merged:
            warnings.warn("merging into an NF4 weight quantises it again, which is lossy", stacklevel=2)
        super().merge()

    def to_linear(self) -> nn.Linear:
        """A dense nn.Linear with the adapter merged in, in the nominal dtype."""
        weight = nf4.dequantize(self.weight) if self.merged else self.merged_weight()
        return plain_linear(weight, self.bias).train(self.training)

    def base(self) -> NF4Linear:
        return NF4Linear.from_weight(self.weight, self.bias).train(self.training)

    def to_nf4_linear(self) -> NF4Linear:
        """An NF4Linear with the adapter merged in and quantised again (lossy)."""
        return NF4Linear.from_linear(self.to_linear(), self.blocksize, self.weight.nested)

    def _base_fn(self, fn):
        return keeping_dtype(fn)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, base=nf4, blocksize={self.blocksize}, double_quant={self.weight.nested}"
