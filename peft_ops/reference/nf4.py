"""NF4 in plain PyTorch: the byte format of bitsandbytes, defined by its formulas (not by its CPU build, which errs).

Elements are taken in row-major order; blocks of `blocksize` cross row ends and the last may be partial. `weight` is an
NF4Weight (peft_ops.nf4), read by attribute.
"""

from functools import cache

import torch

NESTED_BLOCKSIZE = 256
# The 16 levels of Dettmers et al., "QLoRA", 2023, appendix E.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@cache
def nf4_codes(device: torch.device) -> torch.Tensor:
    """float32 [16]: the value of each code."""
    return torch.tensor(NF4_LEVELS, dtype=torch.float32, device=device)


@cache
def nf4_pairs(device: torch.device) -> torch.Tensor:
    """float32 [256, 2]: the values of the high and the low nibble of each byte."""
    codes = nf4_codes(device)
    return torch.stack((codes.repeat_interleave(16), codes.repeat(16)), dim=-1)


@cache
def dynamic_map(device: torch.device) -> torch.Tensor:
    """float32 [256], ascending: the 8-bit dynamic map of the nested absmax (Dettmers, "8-bit Approximations for
    Parallelism in Deep Learning", 2015, section 2.1): a sign, a decimal exponent, and means of a linear fraction."""
    positive = []
    for i in range(7):
        bounds = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        positive.append((bounds[:-1] + bounds[1:]) / 2.0 * 10.0 ** (i - 6))
    values = torch.cat(positive)
    return torch.cat((values, -values, torch.tensor([0.0, 1.0]))).sort().values.to(device)


def nf4_quantize(w: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(packed uint8 [ceil(n/2)], absmax float32 [ceil(n/blocksize)]) of w's n elements.

    x = w · (1/absmax); code = how many midpoints of neighbouring levels lie below x, so ties go to the lower code; a
    zero block has code 7 throughout; the pad nibble of an odd n is 7.
    """
    blocks = _blocks(w.reshape(-1).float(), blocksize)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * absmax.reciprocal().masked_fill(absmax == 0, 0.0)[:, None]
    levels = nf4_codes(w.device)
    codes = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8).view(-1)
    packed = (codes[0::2] << 4) | codes[1::2]
    return packed[: (w.numel() + 1) // 2].contiguous(), absmax


def absmax_quantize(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes uint8 [n], nested_absmax float32 [ceil(n/256)], offset float32 []) of absmax [n]: the nearest entry of the
    dynamic map to (absmax - mean) / nested_absmax in each block of 256, ties to the lower one."""
    n = absmax.numel()
    offset = absmax.mean() if n else absmax.new_zeros(())
    blocks = _blocks(absmax - offset, NESTED_BLOCKSIZE)
    nested_absmax = blocks.abs().amax(dim=1)
    scaled = blocks * nested_absmax.reciprocal().masked_fill(nested_absmax == 0, 0.0)[:, None]
    levels = dynamic_map(absmax.device)
    codes = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2, out_int32=True)
    return codes.to(torch.uint8).view(-1)[:n].contiguous(), nested_absmax, offset


def nf4_absmax(weight) -> torch.Tensor:
    """float32 [blocks]: the scale of every block, nested or not."""
    if weight.absmax is not None:
        return weight.absmax.reshape(-1)
    codes = weight.absmax_codes.reshape(-1)
    values = _blocks(dynamic_map(codes.device)[codes.int()], NESTED_BLOCKSIZE) * weight.nested_absmax[:, None]
    return values.view(-1)[: codes.numel()] + weight.nested_offset


def nf4_dequantize(weight, dtype: torch.dtype) -> torch.Tensor:
    """The n values, flat: level[code] · absmax in float32, rounded once to dtype."""
    n = weight.shape.numel()
    values = nf4_pairs(weight.packed.device)[weight.packed.reshape(-1).int()].view(-1)
    blocks = _blocks(values[:n], weight.blocksize) * nf4_absmax(weight)[:, None]
    return blocks.view(-1)[:n].to(dtype)


def _blocks(flat: torch.Tensor, blocksize: int) -> torch.Tensor:
    """[ceil(n/blocksize), blocksize] of a flat tensor, zeros behind the last element."""
    short = -flat.numel() % blocksize
    return (torch.nn.functional.pad(flat, (0, short)) if short else flat).view(-1, blocksize)
