"""NF4: 4-bit NormalFloat weights, bit-exact to the layout of bitsandbytes (Dettmers et al., "QLoRA", 2023, section 3).

`quantize` and `dequantize` are the whole API; `NF4Weight` is what passes between them and what the layers hold.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from ._backend import implementation

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """A tensor of `shape` in 4 bits per element plus one scale per block of `blocksize` elements in row-major order.

    packed: uint8, element 2i in the high nibble of byte i; [N, K/2] where the shape is [N, K] with even K, else flat.
    absmax: float32, one per block; [N, K/blocksize] where blocks end with the rows, else flat. None where nested.
    dtype: of the tensor that was quantised; what `dequantize` returns by default.
    absmax_codes, nested_absmax, nested_offset: the 8-bit form of absmax under double quantisation:
        absmax[i] = code_map[absmax_codes[i]] * nested_absmax[i // 256] + nested_offset; uint8 (shaped like absmax),
        float32 [ceil(blocks / 256)] and float32 [].
    """

    packed: torch.Tensor
    absmax: torch.Tensor | None
    blocksize: int
    shape: torch.Size
    dtype: torch.dtype
    absmax_codes: torch.Tensor | None = None
    nested_absmax: torch.Tensor | None = None
    nested_offset: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nested(self) -> bool:
        return self.absmax_codes is not None

    @property
    def nbytes(self) -> int:
        """Bytes that the weight occupies."""
        return sum(t.nbytes for t in self._tensors().values())

    def to(self, device: torch.device | str) -> "NF4Weight":
        """The same bytes on another device."""
        moved: dict[str, Any] = {name: t.to(device) for name, t in self._tensors().items()}
        return replace(self, **moved)

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {f.name: t for f in fields(self) if isinstance(t := getattr(self, f.name), torch.Tensor)}


def packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of `packed` for a weight of `shape`: rows kept where no byte holds elements of two of them."""
    n = _numel(shape)
    return (shape[0], shape[1] // 2) if len(shape) == 2 and shape[1] % 2 == 0 else ((n + 1) // 2,)


def absmax_shape(shape: tuple[int, ...], blocksize: int) -> tuple[int, ...]:
    """Shape of `absmax` for a weight of `shape`: rows kept where no block crosses them."""
    n = _numel(shape)
    aligned = len(shape) == 2 and shape[1] % blocksize == 0
    return (shape[0], shape[1] // blocksize) if aligned else (-(-n // blocksize),)


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def quantize(w: torch.Tensor, blocksize: int = 64, double_quant: bool = False) -> NF4Weight:
    """Quantise a tensor of any shape to NF4.

    Args:
        w: float32, float16 or bfloat16, any shape and strides; not modified, no gradient flows.
        blocksize: elements per scale, a power of two from 32 to 4096.
        double_quant: store the scales in 8 bits too (4.127 instead of 4.5 bits per weight at blocksize 64).

    Raises:
        TypeError: w is not a floating-point tensor of 16 or 32 bits.
        ValueError: a block size that is not allowed, or NaN or infinite values in w.

    Source: Dettmers et al., "QLoRA", 2023, sections 2 and 3; byte layout of bitsandbytes 0.50.
    """
    if not isinstance(w, torch.Tensor) or w.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        given = w.dtype if isinstance(w, torch.Tensor) else type(w).__name__
        raise TypeError(f"w must be a float32, float16 or bfloat16 tensor, got {given}")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {', '.join(map(str, BLOCKSIZES))}, got {blocksize}")
    w = w.detach()
    impl = implementation("nf4", w)
    packed, absmax = impl.nf4_quantize(w, blocksize)
    if not absmax.isfinite().all():
        raise ValueError(f"w {tuple(w.shape)} holds NaN or infinite values: a block with one cannot be quantised")
    weight = NF4Weight(
        packed.view(packed_shape(w.shape)), absmax.view(absmax_shape(w.shape, blocksize)), blocksize, w.shape, w.dtype
    )
    if not double_quant:
        return weight
    codes, nested_absmax, nested_offset = impl.absmax_quantize(absmax)
    return replace(
        weight, absmax=None, absmax_codes=codes.view(absmax_shape(w.shape, blocksize)),
        nested_absmax=nested_absmax, nested_offset=nested_offset,
    )  # fmt: skip


def dequantize(weight: NF4Weight, dtype: torch.dtype | None = None, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """The values of an NF4Weight: code * absmax in float32, rounded once to `dtype` (default: that of out, or
    weight.dtype).

    out: a contiguous tensor of weight.shape to write them into; no gradient flows. Where weights are decoded again and
        again it saves what fresh memory costs, which on a CPU is most of the time.

    Raises:
        TypeError: weight is not an NF4Weight, dtype is not floating point or not that of out.
        ValueError: out has another shape or device, is not contiguous, or requires a gradient.
    """
    if not isinstance(weight, NF4Weight):
        raise TypeError(f"weight must be an NF4Weight, got {type(weight).__name__}")
    dtype = dtype or (weight.dtype if out is None else out.dtype)
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point dtype, got {dtype}")
    if out is not None:
        _check_out(out, weight, dtype)
    probe = weight.packed.new_empty(0, dtype=dtype)  # of its class too: a DTensor's bytes have no address here
    flat = None if out is None else out.view(-1)
    values = implementation("nf4", probe).nf4_dequantize(weight, dtype, flat).view(weight.shape)
    if out is None:
        return values
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)
    return out


def _check_out(out: torch.Tensor, weight: NF4Weight, dtype: torch.dtype) -> None:
    if out.dtype != dtype:
        raise TypeError(f"out must be {dtype}, got {out.dtype}")
    if out.shape != weight.shape or out.device != weight.device:
        raise ValueError(
            f"out must be {tuple(weight.shape)} on {weight.device}, got {tuple(out.shape)} on {out.device}"
        )
    if not out.is_contiguous() or out.requires_grad:
        raise ValueError("out must be contiguous and require no gradient")
