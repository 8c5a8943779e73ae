"""NF4 on a CPU, bit-exact to the reference on every instruction set."""

import torch

from . import native

NESTED_BLOCKSIZE = 256


def nf4_quantize(w: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(packed uint8 [ceil(n/2)], absmax float32 [ceil(n/blocksize)]) of w's n elements."""
    w, n = w.contiguous(), w.numel()
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32)
    native.lib.nf4_quantize(
        packed.data_ptr(), absmax.data_ptr(), w.data_ptr(), native.DTYPES[w.dtype], n, blocksize, native.threads(n)
    )
    return packed, absmax


def absmax_quantize(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes uint8 [n], nested_absmax float32 [ceil(n/256)], offset float32 []) of absmax [n]."""
    absmax, n = absmax.contiguous(), absmax.numel()
    offset = absmax.mean() if n else absmax.new_zeros(())
    codes = torch.empty(n, dtype=torch.uint8)
    nested_absmax = torch.empty(-(-n // NESTED_BLOCKSIZE), dtype=torch.float32)
    native.lib.absmax_quantize(
        codes.data_ptr(), nested_absmax.data_ptr(), absmax.data_ptr(), n, offset.data_ptr(), native.MIDPOINTS,
        native.threads(n),
    )  # fmt: skip
    return codes, nested_absmax, offset


def nf4_dequantize(weight, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """The n values, flat: level[code] · absmax in float32, rounded once to dtype; in `out`, contiguous, if given."""
    n = weight.shape.numel()
    out = torch.empty(n, dtype=dtype) if out is None else out
    arguments, _held = native.weight_arguments(weight)
    native.lib.nf4_dequantize(out.data_ptr(), native.DTYPES[dtype], *arguments, 0, n, native.threads(n))
    return out
