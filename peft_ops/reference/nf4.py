"""NF4 in plain PyTorch: the byte format of bitsandbytes, defined by its formulas (not by its CPU build, which errs).

Elements are taken in row-major order; blocks of `blocksize` cross row ends and the last may be partial. `weight` is an
NF4Weight (peft_ops.nf4), read by attribute.
"""

import torch

NESTED_BLOCKSIZE = 256
# The 16 levels of Dettmers et al., "QLoRA", 2023, appendix E.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_CHUNK = 1 << 18  # elements worked on at once: 1 MiB of float32 stays in a core's cache


def _dynamic_map() -> torch.Tensor:
    """float32 [256], ascending: the 8-bit dynamic map of the nested absmax (Dettmers, "8-bit Approximations for
    Parallelism in Deep Learning", 2015, section 2.1): a sign, a decimal exponent, and means of a linear fraction."""
    positive = []
    for i in range(7):
        bounds = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        positive.append((bounds[:-1] + bounds[1:]) / 2.0 * 10.0 ** (i - 6))
    values = torch.cat(positive)
    return torch.cat((values, -values, torch.tensor([0.0, 1.0], device="cpu"))).sort().values


with torch.inference_mode(False):  # tables outlive the mode that the first import happens to run in
    _LEVELS = torch.tensor(NF4_LEVELS, dtype=torch.float32, device="cpu")
    _PAIRS = torch.stack((_LEVELS.repeat_interleave(16), _LEVELS.repeat(16)), dim=-1).view(torch.int64).view(-1)
    _MAP = _dynamic_map()


def nf4_quantize(w: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(packed uint8 [ceil(n/2)], absmax float32 [ceil(n/blocksize)]) of w's n elements.

    x = w · (1/absmax); code = how many midpoints of neighbouring levels lie below x, so ties go to the lower code; a
    block whose 1/absmax is infinite (all zeros) has code 7 throughout; the pad nibble of an odd n is 7. A block with
    NaN or infinite values has such an absmax.
    """
    flat = w.reshape(-1)
    n = flat.numel()
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32, device=w.device)
    thresholds = _midpoints(_LEVELS.to(w.device)).unbind()
    for start in range(0, n, _CHUNK):
        stop = min(start + _CHUNK, n)
        x, absmax[start // blocksize : -(-stop // blocksize)] = _normalized(flat[start:stop].float(), blocksize)
        codes = torch.zeros(x.shape, dtype=torch.uint8, device=w.device)
        for threshold in thresholds:
            codes += x > threshold
        packed[start // 2 : (stop + 1) // 2] = (codes[0::2] << 4).bitwise_or_(codes[1::2])[: (stop - start + 1) // 2]
    return packed, absmax


def absmax_quantize(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes uint8 [n], nested_absmax float32 [ceil(n/256)], offset float32 []) of absmax [n]: the nearest entry of the
    dynamic map to (absmax - mean) / nested_absmax in each block of 256, ties to the lower one."""
    n = absmax.numel()
    offset = absmax.mean() if n else absmax.new_zeros(())
    x, nested_absmax = _normalized(absmax - offset, NESTED_BLOCKSIZE)
    codes = torch.bucketize(x[:n], _midpoints(_MAP.to(absmax.device)), out_int32=True)
    return codes.to(torch.uint8), nested_absmax, offset


def _nf4_absmax(weight) -> torch.Tensor:
    """float32 [blocks]: the scale of every block, nested or not."""
    if weight.absmax is not None:
        return weight.absmax.reshape(-1)
    codes = weight.absmax_codes.reshape(-1)
    values = _MAP.to(codes.device).index_select(0, codes.int())
    return _scale(values, weight.nested_absmax, NESTED_BLOCKSIZE).add_(weight.nested_offset)


def nf4_dequantize(weight, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """The n values, flat: level[code] · absmax in float32, rounded once to dtype; in `out`, contiguous, if given."""
    values = _decode(weight.packed.reshape(-1), _nf4_absmax(weight), weight.blocksize, weight.shape.numel(), dtype)
    return values if out is None else out.copy_(values)


def _decode(packed: torch.Tensor, absmax: torch.Tensor, blocksize: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    """n values from flat bytes and scales, a chunk at a time; one expression where a compiler fuses it anyway."""
    pairs = _PAIRS.to(packed.device)  # one look-up gives the float32 values of both nibbles
    if torch.compiler.is_compiling() or n <= _CHUNK:
        return _scale(pairs.index_select(0, packed.int()).view(torch.float32)[:n], absmax, blocksize).to(dtype)
    out = torch.empty(n, dtype=dtype, device=packed.device)
    for start in range(0, n, _CHUNK):
        stop = min(start + _CHUNK, n)
        values = pairs.index_select(0, packed[start // 2 : (stop + 1) // 2].int()).view(torch.float32)[: stop - start]
        out[start:stop] = _scale(values, absmax[start // blocksize : -(-stop // blocksize)], blocksize)
    return out


def _scale(values: torch.Tensor, scales: torch.Tensor, blocksize: int) -> torch.Tensor:
    """values [n], each times the scale of its block, in place."""
    whole = values.numel() // blocksize
    values[: whole * blocksize].view(whole, blocksize).mul_(scales[:whole, None])
    values[whole * blocksize :].mul_(scales[whole:])
    return values


def _normalized(flat: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(x · (1/absmax) of whole blocks, flat, zeros behind the last element; absmax per block)."""
    short = -flat.numel() % blocksize
    blocks = (torch.nn.functional.pad(flat, (0, short)) if short else flat).view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1)
    inverse = absmax.reciprocal()
    return (blocks * inverse.masked_fill_(inverse.isinf(), 0.0)[:, None]).view(-1), absmax


def _midpoints(levels: torch.Tensor) -> torch.Tensor:
    return (levels[1:] + levels[:-1]) / 2
