"""A linear layer over a frozen 4-bit weight, and the storage that it shares with LoRA over one (QLoRA)."""

from collections.abc import Callable

import torch
from torch import nn

from .. import nf4
from ..nf4 import NF4Weight
from ..ops.nf4_linear import nf4_linear
from .linear_like import check_linear, dense_weight


def keeping_dtype(fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """`fn` of nn.Module._apply without its casts: quantised bytes and their scales move, but never change type."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        out = fn(tensor)
        return out if out.dtype == tensor.dtype else tensor.to(out.device)

    return moved


class NF4Storage(nn.Module):
    """The tensors of a frozen weight [out_features, in_features] in NF4.

    `packed` and `absmax` (or `absmax_codes`) are Parameters without gradient, cut at rows where the shape allows, so
    that FSDP2 shards them; `nested_absmax` and `nested_offset` are buffers, which it replicates (it rejects 0-dim
    parameters). `.to(dtype)` changes the nominal dtype of `weight` and casts the bias; the quantised tensors only move.
    """

    in_features: int
    out_features: int
    blocksize: int
    weight_dtype: torch.dtype
    packed: nn.Parameter
    absmax: nn.Parameter | None
    absmax_codes: nn.Parameter | None
    nested_absmax: torch.Tensor | None
    nested_offset: torch.Tensor | None

    @property
    def weight(self) -> NF4Weight:
        """What the ops take; it answers to dtype, shape and device as a tensor does."""
        return NF4Weight(
            self.packed, self.absmax, self.blocksize, torch.Size((self.out_features, self.in_features)),
            self.weight_dtype, self.absmax_codes, self.nested_absmax, self.nested_offset,
        )  # fmt: skip

    def _store(self, weight: NF4Weight) -> None:
        self.out_features, self.in_features = weight.shape
        self.blocksize, self.weight_dtype = weight.blocksize, weight.dtype
        for name, parameter in nf4_parameters(weight).items():
            self.register_parameter(name, parameter)
        self.register_buffer("nested_absmax", weight.nested_absmax)
        self.register_buffer("nested_offset", weight.nested_offset)

    def stored(self) -> list[torch.Tensor]:
        """The quantised tensors."""
        tensors = (self.packed, self.absmax, self.absmax_codes, self.nested_absmax, self.nested_offset)
        return [t for t in tensors if t is not None]

    def _apply(self, fn, recurse=True):
        quantised, move = {id(t) for t in self.stored()}, keeping_dtype(fn)
        super()._apply(lambda t: move(t) if id(t) in quantised else fn(t), recurse)
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        return self


class NF4Linear(NF4Storage):
    """y = x deq(W)ᵀ + bias with W frozen in NF4; gradients flow to x and bias.

    Args:
        in_features, out_features, bias, device, dtype: as for nn.Linear, whose initial weights are quantised. On
            device="meta" nothing is computed, for load_state_dict(assign=True) or to_empty() to fill.
        blocksize: weights per scale, a power of two from 32 to 4096.
        double_quant: keep the scales in 8 bits too.

    Source: Dettmers et al., "QLoRA", 2023, section 3.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, blocksize: int = 64, double_quant: bool = True,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        linear = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._store(_quantize(linear.weight, blocksize, double_quant))
        self.bias = linear.bias

    @classmethod
    def from_linear(cls, linear: nn.Module, blocksize: int = 64, double_quant: bool = True) -> "NF4Linear":
        """The layer with its weight (of a Conv1D: transposed) quantised and its bias shared; `linear` is unchanged.

        Raises:
            TypeError: not an nn.Linear or Conv1D, or its weight is not float32, float16 or bfloat16.
            ValueError: a block size that is not allowed, NaN or infinite weights.
        """
        check_linear(linear)
        weight = _quantize(dense_weight(linear), blocksize, double_quant)
        return cls.from_weight(weight, linear._parameters.get("bias")).train(linear.training)

    @classmethod
    def from_weight(cls, weight: NF4Weight, bias: nn.Parameter | None = None) -> "NF4Linear":
        """A layer over these very tensors."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._store(weight)
        layer.register_parameter("bias", bias)
        return layer

    def to_linear(self) -> nn.Linear:
        """An nn.Linear with the dequantised weight, in the nominal dtype, frozen; the bias is shared."""
        return plain_linear(nf4.dequantize(self.weight), self.bias).train(self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nf4_linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"blocksize={self.blocksize}, double_quant={self.weight.nested}"
        )


def nf4_parameters(weight: NF4Weight) -> dict[str, nn.Parameter | None]:
    """What NF4Storage registers as Parameters; those that are Parameters already are shared."""
    return {
        name: t if t is None or isinstance(t, nn.Parameter) else nn.Parameter(t, requires_grad=False)
        for name, t in (("packed", weight.packed), ("absmax", weight.absmax), ("absmax_codes", weight.absmax_codes))
    }


def plain_linear(weight: torch.Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """An nn.Linear over these tensors; the weight is frozen."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.register_parameter("bias", bias)
    return linear


def _quantize(w: torch.Tensor, blocksize: int, double_quant: bool) -> NF4Weight:
    """nf4.quantize, or only its shapes where w is on the meta device."""
    if not w.is_meta:
        return nf4.quantize(w, blocksize, double_quant)
    if blocksize not in nf4.BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {', '.join(map(str, nf4.BLOCKSIZES))}, got {blocksize}")
    shape = nf4.absmax_shape(w.shape, blocksize)
    packed = torch.empty(nf4.packed_shape(w.shape), dtype=torch.uint8, device="meta")
    if not double_quant:
        return NF4Weight(packed, torch.empty(shape, device="meta"), blocksize, w.shape, w.dtype)
    codes = torch.empty(shape, dtype=torch.uint8, device="meta")
    nested = torch.empty(-(-codes.numel() // 256), device="meta")
    return NF4Weight(packed, None, blocksize, w.shape, w.dtype, codes, nested, torch.empty((), device="meta"))
