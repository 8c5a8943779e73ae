"""Launch configurations per kernel and architecture, and the choices between kernels.

What was measured comes first (`measured`: tables/<arch>.json, written by `python -m benchmarks.tune`). Where there is
no table, the design values here hold: of the device's architecture (16-bit operands), then the family's, then the
default, so that a GPU that nobody has measured gets the nearest entry, never an error. Sizes fit the smallest shared
memory of a family (99 KiB on NVIDIA, 64 KiB on AMD).
"""

import torch

from . import measured
from .arches import arch_of as arch_of
from .measured import using as using
from .prefix_configs import PREFIX_ATTENTION as PREFIX_ATTENTION
from .prefix_configs import PREFIX_COLUMNS as PREFIX_COLUMNS
from .prefix_configs import covering as covering
from .prefix_configs import prefix_attention as prefix_attention

LAUNCH = {
    "down_project": {
        "default": dict(BLOCK_M=64, BLOCK_K=64, num_warps=4, num_stages=3),
        "fp32": dict(BLOCK_M=64, BLOCK_K=32, num_warps=4, num_stages=2),
        "gfx": dict(BLOCK_M=64, BLOCK_K=64, num_warps=4, num_stages=2),
        "sm_90": dict(BLOCK_M=128, BLOCK_K=64, num_warps=8, num_stages=3),  # a float32 A is split for twice the rows
        "sm_100": dict(BLOCK_M=64, BLOCK_K=64, num_warps=8, num_stages=3),  # larger tiles spill
        "sm_100 fp32": dict(BLOCK_M=64, BLOCK_K=32, num_warps=8, num_stages=2),
    },
    "down_project_da": {
        "default": dict(BLOCK_M=64, BLOCK_K=64, num_warps=4, num_stages=3),
        "sm_90": dict(BLOCK_M=64, BLOCK_K=128, num_warps=4, num_stages=3),
        "sm_100": dict(BLOCK_M=64, BLOCK_K=128, num_warps=8, num_stages=3),
        "fp32": dict(BLOCK_M=32, BLOCK_K=64, num_warps=4, num_stages=2),
        "gfx": dict(BLOCK_M=64, BLOCK_K=64, num_warps=4, num_stages=2),
    },
    "low_rank_update": {
        "default": dict(BLOCK_M=64, BLOCK_N=128, num_warps=4, num_stages=2),
        "fp32": dict(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=2),
        "gfx": dict(BLOCK_M=64, BLOCK_N=128, num_warps=4, num_stages=2),
    },
    "low_rank_update_groups": {  # of several masks: two accumulators
        "default": dict(BLOCK_M=64, BLOCK_N=64, num_warps=8, num_stages=2),
        "fp32": dict(BLOCK_M=64, BLOCK_N=32, num_warps=8, num_stages=2),
    },
    "low_rank_gradients": {  # ds leaves 8 · rank / BLOCK_N bytes of partial sums for every element of dy
        "default": dict(BLOCK_M=32, BLOCK_N=256, num_warps=4, num_stages=2),
        "fp32": dict(BLOCK_M=64, BLOCK_N=64, num_warps=8, num_stages=2),
        "gfx": dict(BLOCK_M=32, BLOCK_N=64, num_warps=4, num_stages=2),
    },
    "dora_norm": {  # ranks above BLOCK_R are walked: the tile of W is what has to fit
        "default": dict(BLOCK_N=64, BLOCK_K=64, BLOCK_R=16, num_warps=8, num_stages=3),
        "gfx": dict(BLOCK_N=64, BLOCK_K=64, BLOCK_R=16, num_warps=8, num_stages=2),
    },
    "nf4_dora_norm": {
        "default": dict(BLOCK_N=64, BLOCK_K=64, BLOCK_R=16, num_warps=8, num_stages=3),
        "gfx": dict(BLOCK_N=64, BLOCK_K=64, BLOCK_R=16, num_warps=8, num_stages=2),
    },
    "dora_update": {
        "default": dict(BLOCK_M=64, BLOCK_N=128, num_warps=4, num_stages=2),
        "fp32": dict(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=2),
        "gfx": dict(BLOCK_M=64, BLOCK_N=128, num_warps=4, num_stages=2),
    },
    "dora_gradients": {
        "default": dict(BLOCK_M=32, BLOCK_N=128, num_warps=8, num_stages=2),
    },
    "linear_low_rank": {
        "default": dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, num_warps=4, num_stages=3),
        "gfx": dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=32, GROUP_M=8, num_warps=4, num_stages=2),
    },
    "linear_few_rows": {
        "default": dict(BLOCK_M=16, BLOCK_N=32, BLOCK_K=128, num_warps=4, num_stages=4),
        "gfx": dict(BLOCK_M=16, BLOCK_N=32, BLOCK_K=128, num_warps=4, num_stages=2),
        "sm_80": dict(BLOCK_M=16, BLOCK_N=32, BLOCK_K=256, num_warps=4, num_stages=4),
        "sm_90": dict(BLOCK_M=16, BLOCK_N=32, BLOCK_K=256, num_warps=4, num_stages=4),
        "sm_100": dict(BLOCK_M=16, BLOCK_N=32, BLOCK_K=256, num_warps=4, num_stages=4),
    },
    "linear_few_rows_dx": {  # W is walked across its rows: a wider tile reads whole lines of memory
        "default": dict(BLOCK_M=16, BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=4),
        "gfx": dict(BLOCK_M=16, BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=2),
    },
    "sum_splits_low_rank": {
        "default": dict(BLOCK_M=16, BLOCK_N=32, num_warps=4),
    },
    "up_project": {
        "default": dict(BLOCK_M=64, BLOCK_N=128, num_warps=8, num_stages=2),
        "fp32": dict(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=2),
    },
    "up_project_gradients": {
        "default": dict(BLOCK_M=64, BLOCK_N=128, num_warps=8, num_stages=3),
        "fp32": dict(BLOCK_M=32, BLOCK_N=64, num_warps=4, num_stages=2),
        "gfx": dict(BLOCK_M=32, BLOCK_N=128, num_warps=8, num_stages=2),
    },
    "logprob": {
        "default": dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3),
        "fp32": dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_warps=4, num_stages=2),
        "gfx": dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, num_warps=8, num_stages=2),
    },
    "logprob_gradient": {
        "default": dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=3),
        "fp32": dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, GROUP_M=8, num_warps=4, num_stages=2),
        "gfx": dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, GROUP_M=8, num_warps=8, num_stages=2),
    },
    "add_product": {
        "default": dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=3),
        "fp32": dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, GROUP_M=8, num_warps=4, num_stages=2),
        "gfx": dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, GROUP_M=8, num_warps=8, num_stages=2),
    },
    "bottleneck_gradient": {"default": dict(BLOCK=1024, num_warps=4)},
    "gated": {"default": dict(BLOCK=1024, num_warps=4)},
    "gated_gradients": {"default": dict(BLOCK=1024, num_warps=4)},
}
PROGRAMS = 256  # how many programs a split reduction aims at: fixed, so that results do not depend on the GPU


def launch(kernel: str, arch: str, dtype: torch.dtype, rows: int | None = None, rank: int = 0) -> dict[str, int]:
    """Block sizes, num_warps and num_stages of a kernel for operands of `dtype` on an architecture.

    rows: that the kernel runs over, rank: its BLOCK_R where the launcher sets that; without rows, the design values.
    """
    design = designed(kernel, arch, dtype)
    return design if rows is None else measured.config(kernel, arch, dtype, rows, rank, design)


def designed(kernel: str, arch: str, dtype: torch.dtype, rows: int = 0) -> dict[str, int]:
    """What a kernel is launched with where no table has it."""
    if kernel not in LAUNCH:
        return NF4_TILES[kernel] if kernel in NF4_TILES else _nf4_linear_design(kernel, rows, arch, dtype)
    table = LAUNCH[kernel]
    amd = arch.startswith("gfx")
    for key in (arch, "gfx") if amd else (f"{arch} fp32", "fp32") if dtype == torch.float32 else (arch,):
        if key in table:
            return table[key]
    return table["default"]


def linear_route(rows: int, out: int, k: int, dtype: torch.dtype, arch: str, dx: bool = False) -> str:
    """How a dense x Wᵀ [rows, out] over k gets its low-rank term: "vendor" (its GEMM, then an update in place), "few
    rows" (two launches with the down-projection), "fused" (one GEMM with the term inside) or "tma" (the same for Hopper
    and Blackwell; "fused" where it cannot).

    "vendor" sums as the base alone does, so that B = 0 equals it to the bit; the others need a table to ask for them.
    """
    return measured.route("linear_dx" if dx else "linear", arch, dtype, out, k, rows) or "vendor"


def fp32_precision(arch: str) -> str:
    """How a dot of float32 operands keeps float32's accuracy: three TF32 products, or AMD's own float32 unit."""
    return "ieee" if arch.startswith("gfx") else "tf32x3"


def update_precision(arch: str, dtype: torch.dtype) -> str:
    """Of a float32 low-rank product that is rounded to `dtype`: TF32 has more bits than a 16-bit result keeps."""
    return fp32_precision(arch) if dtype == torch.float32 or arch.startswith("gfx") else "tf32"


def block_r(rank: int, arch: str, dtype: torch.dtype) -> int:
    """A power of two from 16 that covers the rank, up to what a program's registers hold; ranks above are walked.

    64 where operands of the matrix unit may lie in shared memory (Hopper) or registers abound
    (AMD), 32 elsewhere and in float32, whose three products need three times the registers.
    """
    roomy = arch.startswith(("gfx", "sm_9")) and dtype != torch.float32
    return max(16, min(64 if roomy else 32, 1 << (rank - 1).bit_length()))


def gradients_in_one_read(rank: int, arch: str, dtype: torch.dtype) -> bool:
    """Whether ds and db come from one read of dy: its partial sums of ds outweigh a second read above rank 32, where
    that is one read (block_r)."""
    return rank <= 32 or block_r(rank, arch, dtype) <= 32


def splits(programs: int, steps: int, least: int = 4) -> int:
    """Into how many parts to cut a reduction of `steps` so that `programs` of them fill a GPU; none below `least`."""
    wanted = PROGRAMS // max(1, programs)
    return max(1, min(wanted, steps // least))


# Two consumer warp groups; "wide" where there are tiles enough to fill a GPU and the operands of the low-rank product
# fit beside: up to these ranks without and with dropout. Blackwell has no tensor memory left to FLATTEN a wide tile.
LINEAR_TMA = dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, SUBTILES=1, num_warps=8, num_stages=3)
LINEAR_TMA_WIDE = {"sm_9": dict(BLOCK_N=256, SUBTILES=2), "sm_10": dict(BLOCK_N=256)}
LINEAR_TMA_WIDE_RANK = (32, 16)
LINEAR_TMA_RANK = 64  # the rank is one step


def linear_tma(rows: int, out: int, rank: int, dropout: bool, arch: str) -> dict[str, int]:
    """Launch configuration of the persistent GEMM."""
    tiles, blackwell = -(-rows // 128) * -(-out // 256), arch.startswith("sm_10")
    wide = tiles >= PROGRAMS // 2 and rank <= LINEAR_TMA_WIDE_RANK[dropout]
    return {
        **LINEAR_TMA, **(LINEAR_TMA_WIDE["sm_10" if blackwell else "sm_9"] if wide else {}),
        "BLOCK_R": covering(rank), "FLATTEN": not dropout and not (wide and blackwell),
    }  # fmt: skip


def nf4_shuffle(device: torch.device) -> bool:
    """Whether NF4 levels come from the registers of a warp: inline PTX, which neither AMD nor the interpreter knows."""
    return arch_of(device).startswith("sm_")


NF4_TILES = {  # elements and warps of a program that walks blocks
    "nf4_quantize": dict(elements=4096, num_warps=8),
    "absmax_quantize": dict(elements=1024, num_warps=4),
    "nf4_dequantize": dict(elements=8192, num_warps=4),
}


def nf4_blocks(
    kernel: str, blocksize: int, arch: str = "default", dtype: torch.dtype = torch.float32, elements: int | None = None
) -> dict[str, int]:
    """BLOCKS of one program and its num_warps, for that many elements; without them, the design values."""
    tile = NF4_TILES[kernel]
    if elements is not None:
        tile = measured.config(kernel, arch, dtype, elements, 0, tile)
    return dict(BLOCKS=max(1, tile["elements"] // blocksize), num_warps=tile["num_warps"])


# By the rows that a tile holds; W is decoded in tiles of BLOCK_N x BLOCK_K. "mma": where the matrix unit takes both
# operands from registers, so that fewer are left (sm_8x, sm_12x), for few rows and for more.
NF4_LINEAR = {
    "nf4_linear": {
        16: dict(BLOCK_M=16, BLOCK_N=128, BLOCK_K=128, num_warps=4, num_stages=4),
        32: dict(BLOCK_M=32, BLOCK_N=128, BLOCK_K=128, num_warps=4, num_stages=3),
        64: dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=3),
        128: dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128, num_warps=8, num_stages=3),
        "mma few": dict(BLOCK_K=64),
        "mma": dict(BLOCK_N=64, BLOCK_K=64),
        "gfx": dict(BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=2),
        "fp32": dict(BLOCK_M=16, BLOCK_N=64, BLOCK_K=32, num_warps=4, num_stages=3),
    },
    "nf4_linear_dx": {
        16: dict(BLOCK_M=16, BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=3),
        32: dict(BLOCK_M=32, BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=3),
        64: dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=128, num_warps=4, num_stages=3),
        128: dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128, num_warps=8, num_stages=3),
        "mma few": dict(BLOCK_N=64, BLOCK_K=128),
        "mma": dict(BLOCK_N=64, BLOCK_K=128),
        "gfx": dict(BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=2),
        "fp32": dict(BLOCK_M=16, BLOCK_N=32, BLOCK_K=64, num_warps=4, num_stages=3),
    },
}
# Rows up to which decoding inside the GEMM beats decoding first, by output features: bitsandbytes 0.50's calibration on
# an H100, until ours is measured. float32 has no fast matrix unit: few rows only.
NF4_FUSED_ROWS = ((8192, 16), (20480, 32), (1 << 62, 64))
NF4_SLAB_BYTES = 32 << 20  # of decoded weights at once: stays in the L2 cache of a data-centre GPU


def nf4_linear(kernel: str, rows: int, arch: str, dtype: torch.dtype) -> dict[str, int]:
    """Launch configuration of a fused NF4 kernel for `rows` rows of x."""
    return measured.config(kernel, arch, dtype, rows, 0, _nf4_linear_design(kernel, rows, arch, dtype))


def _nf4_linear_design(kernel: str, rows: int, arch: str, dtype: torch.dtype) -> dict[str, int]:
    table = NF4_LINEAR[kernel]
    fit = next((most for most in (16, 32, 64) if rows <= most), 128)
    if kernel == "nf4_linear_dx" and arch.startswith(("sm_9", "sm_10")):  # a warp group's instruction has 64 rows of dy
        fit = max(fit, 64)
    mma = "mma few" if fit <= 32 else "mma"
    return {
        **table[fit],
        **table.get("gfx" if arch.startswith("gfx") else mma if arch.startswith(("sm_8", "sm_12")) else "", {}),
        **(table["fp32"] if dtype == torch.float32 else {}),
    }


def nf4_fused(rows: int, out: int, dtype: torch.dtype, arch: str = "default", kernel: str = "nf4_linear") -> bool:
    """Whether an NF4 product with `rows` rows and `out` columns decodes inside the GEMM."""
    choice = measured.route(kernel, arch, dtype, out, 0, rows)
    return rows > 0 and choice == "fused" if choice else nf4_fused_by_design(rows, out, dtype)


def nf4_fused_by_design(rows: int, out: int, dtype: torch.dtype) -> bool:
    most = 16 if dtype == torch.float32 else next(most for widest, most in NF4_FUSED_ROWS if out <= widest)
    return 0 < rows <= most


def nf4_slab(
    lines: int, line_bytes: int, align: int, arch: str = "default", dtype: torch.dtype = torch.bfloat16
) -> int:
    """How many lines of a decoded weight make a slab: a multiple of align, or all."""
    most = measured.route("nf4_slab_bytes", arch, dtype, 0, 0, 1) or NF4_SLAB_BYTES
    return min(lines, max(1, most // max(1, line_bytes * align)) * align)


def nf4_splits(grid: tuple[int, int], reduction: int, block: int) -> tuple[int, int]:
    """(splits, elements of the reduction in each, whole blocks) for a grid of output tiles."""
    steps = -(-reduction // block)
    each = -(-steps // splits(grid[0] * grid[1], steps))
    return -(-steps // each), each * block


LOGPROB_WORKSPACE = 64 << 20  # bytes of logit gradients at a time


def logprob_columns(rows: int, itemsize: int) -> int:
    """How many columns of the vocabulary a workspace holds the gradients of: a multiple of 256."""
    return max(1, LOGPROB_WORKSPACE // max(1, rows * itemsize * 256)) * 256


def logprob(
    kernel: str, arch: str, dtype: torch.dtype, low_rank: bool, aligned: bool, rows: int | None = None
) -> dict[str, int]:
    """Launch configuration of a kernel of linear_logprob. A low-rank product, and rows that do not start at multiples
    of 16 elements (K is none), take registers."""
    config = launch(kernel, arch, dtype, rows, rank=int(low_rank))
    if arch.startswith("gfx") or (aligned and not low_rank):
        return config
    return {**config, "BLOCK_N": config["BLOCK_N"] // 2, **({} if aligned else dict(BLOCK_M=64, BLOCK_K=32))}
