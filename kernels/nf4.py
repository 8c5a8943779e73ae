"""NF4 in both directions, one launch each, bit for bit as the reference: every product and sum is rounded by itself
(`enable_fp_fusion=False`), as bitsandbytes' format defines them."""

import torch
import triton
import triton.language as tl

from . import configs
from .launch import device_guard
from .nf4_tables import NESTED_BLOCKSIZE, nf4_tables

# PTX: $8 four bytes, $9 level lane % 16; $0 to $3 the levels of high nibbles, $4 to $7 of low ones. 0x101f makes two
# segments of 16 lanes, so that of an index only four bits count.
LEVELS_OF_4_BYTES = tl.constexpr("""{
    .reg .b32 n<8>;
    shr.u32 n1, $8, 4;
    shr.u32 n2, $8, 8;
    shr.u32 n3, $8, 12;
    shr.u32 n4, $8, 16;
    shr.u32 n5, $8, 20;
    shr.u32 n6, $8, 24;
    shr.u32 n7, $8, 28;
    shfl.sync.idx.b32 $0, $9, n1, 0x101f, 0xffffffff;
    shfl.sync.idx.b32 $1, $9, n3, 0x101f, 0xffffffff;
    shfl.sync.idx.b32 $2, $9, n5, 0x101f, 0xffffffff;
    shfl.sync.idx.b32 $3, $9, n7, 0x101f, 0xffffffff;
    shfl.sync.idx.b32 $4, $9, $8, 0x101f, 0xffffffff;
    shfl.sync.idx.b32 $5, $9, n2, 0x101f, 0xffffffff;
    shfl.sync.idx.b32 $6, $9, n4, 0x101f, 0xffffffff;
    shfl.sync.idx.b32 $7, $9, n6, 0x101f, 0xffffffff;
    }""")


@triton.jit
def _nf4_lookup(pairs_ptr, SHUFFLE: tl.constexpr):
    """What `_nf4_pair` looks levels up in: the table of pairs or, with SHUFFLE, level lane % 16 in a register."""
    if SHUFFLE:
        lookup = tl.inline_asm_elementwise(  # the second level of pair lane % 16
            """{
            .reg .b32 lane; .reg .b64 at;
            mov.u32 lane, %laneid;
            and.b32 lane, lane, 15;
            mad.wide.u32 at, lane, 8, $1;
            ld.global.f32 $0, [at+4];
            }""", "=f,l", [pairs_ptr], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        lookup = pairs_ptr
    return lookup


@triton.jit
def _nf4_pair(byte, lookup, SHUFFLE: tl.constexpr):
    """(high, low): the float32 levels of a byte's nibbles.

    From a table of 256 pairs in memory or, with SHUFFLE (NVIDIA), from the registers of the warp: a shuffle takes its
    lane from the low bits of a register, so a nibble costs a shift and a shuffle, no address and no mask. (Pure, or
    torch.compile would take every argument for written.)
    """
    if SHUFFLE:
        high, low = tl.inline_asm_elementwise(
            LEVELS_OF_4_BYTES, "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,r,f,f,f,f", [byte, lookup],
            dtype=(tl.float32, tl.float32), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        pair = tl.load(lookup + byte.to(tl.int32))
        high = (pair & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
        low = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return high, low


@triton.jit
def _nf4_scale(block, mask, absmax_ptr, nested_ptr, offset_ptr, map_ptr, NESTED: tl.constexpr):
    """float32 absmax of blocks (int64 indices); where NESTED, absmax_ptr holds its 8-bit codes. 0 where masked, none
    with mask None."""
    if mask is None:
        scale = tl.load(absmax_ptr + block)
        if NESTED:
            scale = tl.load(map_ptr + scale.to(tl.int32)) * tl.load(nested_ptr + block // 256) + tl.load(offset_ptr)
    elif NESTED:
        code = tl.load(absmax_ptr + block, mask=mask, other=127).to(tl.int32)
        scale = tl.load(map_ptr + code) * tl.load(nested_ptr + block // 256, mask=mask, other=0.0)
        scale = tl.where(mask, scale + tl.load(offset_ptr), 0.0)
    else:
        scale = tl.load(absmax_ptr + block, mask=mask, other=0.0)
    return scale


@triton.jit
def _normalize(x):
    """(x · (1/absmax), absmax) of the rows of a float32 tile; a NaN anywhere makes its absmax NaN."""
    absmax = tl.max(tl.abs(x), axis=1)
    absmax = tl.where(tl.max((x != x).to(tl.int32), axis=1) > 0, float("nan"), absmax)
    inverse = tl.div_rn(tl.full(absmax.shape, 1.0, tl.float32), absmax)
    inverse = tl.where(inverse == float("inf"), 0.0, inverse)
    return x * inverse[:, None], absmax


@triton.jit
def _count_below(x, thresholds_ptr, FIRST: tl.constexpr, STEPS: tl.constexpr):
    """How many of 2 · FIRST - 1 ascending thresholds lie below x, by STEPS = log2(2 · FIRST) halvings."""
    count = tl.zeros(x.shape, tl.int32)
    for i in tl.static_range(STEPS):
        count += tl.where(x > tl.load(thresholds_ptr + count + ((FIRST >> i) - 1)), FIRST >> i, 0)
    return count


@triton.jit
def _nf4_quantize_kernel(
    w_ptr, packed_ptr, absmax_ptr, thresholds_ptr, n, BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr
):
    """packed[i] = code(w[2i]) << 4 | code(w[2i+1]), absmax per block; w [n], computed in float32."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    element = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    x, absmax = _normalize(tl.load(w_ptr + element, mask=element < n, other=0.0).to(tl.float32))
    tl.store(absmax_ptr + block, absmax, mask=block * BLOCKSIZE < n)
    high, low = tl.split(tl.reshape(_count_below(x, thresholds_ptr, 8, 4), (BLOCKS, BLOCKSIZE // 2, 2)))
    byte = block[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    tl.store(packed_ptr + byte, (high << 4 | low).to(tl.uint8), mask=2 * byte < n)


@triton.jit
def _absmax_quantize_kernel(
    absmax_ptr, offset_ptr, codes_ptr, nested_ptr, thresholds_ptr, n, BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr
):
    """codes[i] of (absmax[i] - offset) / nested: the nearest of 256 levels; nested = its absmax per block."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    element = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    inside = element < n
    absmax = tl.load(absmax_ptr + element, mask=inside, other=0.0)
    x, nested = _normalize(tl.where(inside, absmax - tl.load(offset_ptr), 0.0))
    tl.store(nested_ptr + block, nested, mask=block * BLOCKSIZE < n)
    tl.store(codes_ptr + element, _count_below(x, thresholds_ptr, 128, 8).to(tl.uint8), mask=inside)


@triton.jit
def _nf4_dequantize_kernel(
    packed_ptr, absmax_ptr, nested_ptr, offset_ptr, map_ptr, pairs_ptr, out_ptr,
    n, packed_bytes, first_block, line_blocks, source_line_blocks,
    BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr, NESTED: tl.constexpr, LINES: tl.constexpr, SHUFFLE: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """out[i] = level[code] · absmax of n elements (in packed_bytes) from first_block on, in float32, rounded once.

    With LINES they are lines of line_blocks blocks, source_line_blocks apart: columns of a matrix. With EVEN the last
    program's blocks are whole too, so that nothing is masked.
    """
    HALF: tl.constexpr = BLOCKSIZE // 2
    start = tl.program_id(0).to(tl.int64) * BLOCKS
    block = tl.arange(0, BLOCKS)
    if LINES:
        at = (start + block).to(tl.int32)
        source = (at // line_blocks).to(tl.int64) * source_line_blocks + at % line_blocks + first_block
        byte = source[:, None] * HALF + tl.arange(0, HALF)[None, :]
    else:
        source = first_block + start + block
        packed_ptr += (first_block + start) * HALF
        byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    local = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    byte = (
        tl.load(packed_ptr + byte)
        if EVEN
        else tl.load(packed_ptr + byte, mask=local < packed_bytes - start * HALF, other=0)
    )
    high, low = _nf4_pair(byte, _nf4_lookup(pairs_ptr, SHUFFLE), SHUFFLE)
    inside = None if EVEN else block < tl.cdiv(n, BLOCKSIZE) - start
    scale = _nf4_scale(source, inside, absmax_ptr, nested_ptr, offset_ptr, map_ptr, NESTED)[:, None]
    values = tl.reshape(tl.join(high * scale, low * scale), (BLOCKS, BLOCKSIZE))
    element = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    out = out_ptr + start * BLOCKSIZE + element
    if EVEN:
        tl.store(out, values.to(out_ptr.dtype.element_ty))
    else:
        tl.store(out, values.to(out_ptr.dtype.element_ty), mask=element < n - start * BLOCKSIZE)


def nf4_quantize(w: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See peft_ops.reference.nf4."""
    w, n = w.reshape(-1), w.numel()
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(triton.cdiv(n, blocksize), dtype=torch.float32, device=w.device)
    if n:
        config = configs.nf4_blocks("nf4_quantize", blocksize, configs.arch_of(w.device), w.dtype, n)
        with device_guard(w):
            _nf4_quantize_kernel[(triton.cdiv(absmax.numel(), config["BLOCKS"]),)](
                w.contiguous(), packed, absmax, nf4_tables(w.device).thresholds, n, BLOCKSIZE=blocksize, **config
            )
    return packed, absmax


def absmax_quantize(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See peft_ops.reference.nf4."""
    absmax, n = absmax.contiguous(), absmax.numel()
    codes = torch.empty(n, dtype=torch.uint8, device=absmax.device)
    nested = torch.empty(triton.cdiv(n, NESTED_BLOCKSIZE), dtype=torch.float32, device=absmax.device)
    if not n:
        return codes, nested, torch.zeros((), device=absmax.device)
    offset = absmax.mean()
    config = configs.nf4_blocks("absmax_quantize", NESTED_BLOCKSIZE)
    with device_guard(absmax):
        _absmax_quantize_kernel[(triton.cdiv(nested.numel(), config["BLOCKS"]),)](
            absmax, offset, codes, nested, nf4_tables(absmax.device).map_thresholds, n,
            BLOCKSIZE=NESTED_BLOCKSIZE, **config,
        )  # fmt: skip
    return codes, nested, offset


def nf4_dequantize(weight, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """See peft_ops.reference.nf4."""
    if out is None:
        out = torch.empty(weight.shape.numel(), dtype=dtype, device=weight.packed.device)
    return _decode_into(out, weight, 0, None)


def _decode_into(out: torch.Tensor, weight, first_block: int, line_blocks: int | None) -> torch.Tensor:
    """Fill out, contiguous, with the elements from first_block on: all that follow each other or, with line_blocks,
    that many blocks of every row of a weight whose rows end with a block."""
    n, blocksize = out.numel(), weight.blocksize
    if n:
        config = configs.nf4_blocks("nf4_dequantize", blocksize, configs.arch_of(out.device), out.dtype, n)
        row_blocks = weight.shape[-1] // blocksize if line_blocks else 1
        with device_guard(out):
            _nf4_dequantize_kernel[(triton.cdiv(n, blocksize * config["BLOCKS"]),)](
                *_weight_arguments(weight), out,
                n, (n + 1) // 2, first_block, line_blocks or 1, row_blocks, BLOCKSIZE=blocksize,
                NESTED=weight.absmax is None, LINES=line_blocks is not None,
                SHUFFLE=configs.nf4_shuffle(out.device), EVEN=n % (blocksize * config["BLOCKS"]) == 0,
                enable_fp_fusion=False, **config,
            )  # fmt: skip
    return out


def _weight_arguments(weight) -> tuple[torch.Tensor, ...]:
    """(packed, absmax or its codes, nested_absmax, nested_offset, map, pairs): three are read only where nested."""
    tables, packed = nf4_tables(weight.packed.device), weight.packed.contiguous()
    if weight.absmax is not None:
        absmax = weight.absmax.contiguous()
        return packed, absmax, absmax, absmax, absmax, tables.pairs
    nested_absmax, codes = weight.nested_absmax.contiguous(), weight.absmax_codes.contiguous()
    return packed, codes, nested_absmax, weight.nested_offset, tables.map, tables.pairs
