"""Launch configurations per kernel and architecture, and the choices between kernels.

A kernel looks up its device's architecture, then that family's, then the default: a GPU that nobody has measured gets
the nearest entry, never an error. Sizes fit the smallest shared memory of a family (99 KiB on NVIDIA, 64 KiB on AMD).
Everything here is a design value until `benchmarks/results/<gpu>/` holds a measurement behind it.
"""

from functools import cache

import torch

LAUNCH = {
    "down_project": {
        "default": dict(BLOCK_M=64, BLOCK_K=64, num_warps=4, num_stages=3),
        "fp32": dict(BLOCK_M=64, BLOCK_K=32, num_warps=4, num_stages=2),
        "gfx": dict(BLOCK_M=64, BLOCK_K=64, num_warps=4, num_stages=2),
    },
    "down_project_da": {
        "default": dict(BLOCK_M=64, BLOCK_K=64, num_warps=4, num_stages=3),
        "fp32": dict(BLOCK_M=32, BLOCK_K=64, num_warps=4, num_stages=2),
        "gfx": dict(BLOCK_M=64, BLOCK_K=64, num_warps=4, num_stages=2),
    },
    "low_rank_update": {
        "default": dict(BLOCK_M=64, BLOCK_N=128, num_warps=4, num_stages=2),
        "fp32": dict(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=2),
        "gfx": dict(BLOCK_M=64, BLOCK_N=128, num_warps=4, num_stages=2),
    },
    "low_rank_gradients": {
        "default": dict(BLOCK_M=64, BLOCK_N=128, num_warps=4, num_stages=2),
        "fp32": dict(BLOCK_M=64, BLOCK_N=64, num_warps=8, num_stages=2),
        "gfx": dict(BLOCK_M=32, BLOCK_N=64, num_warps=4, num_stages=2),
    },
    "linear_low_rank": {
        "default": dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, num_warps=4, num_stages=3),
        "gfx": dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=32, GROUP_M=8, num_warps=4, num_stages=2),
    },
}
PROGRAMS = 256  # how many programs a split reduction aims at: fixed, so that results do not depend on the GPU
FUSED_LINEAR_MAX_M = 0  # rows up to which the base GEMM carries the low-rank term; above it, vendor GEMM + one update


@cache
def arch_of(device: torch.device) -> str:
    """ "sm_90", "gfx942", ..., or "default" where there is no GPU (the interpreter)."""
    if device.type != "cuda":
        return "default"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def launch(kernel: str, arch: str, dtype: torch.dtype) -> dict[str, int]:
    """Block sizes, num_warps and num_stages of a kernel for operands of `dtype` on an architecture."""
    table = LAUNCH[kernel]
    family = "gfx" if arch.startswith("gfx") else "fp32" if dtype == torch.float32 else "default"
    return table.get(arch) or table.get(family) or table["default"]


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


def splits(programs: int, steps: int, least: int = 4) -> int:
    """Into how many parts to cut a reduction of `steps` so that `programs` of them fill a GPU; none below `least`."""
    wanted = PROGRAMS // max(1, programs)
    return max(1, min(wanted, steps // least))


NF4_TILES = {  # elements and warps of a program that walks blocks
    "nf4_quantize": dict(elements=4096, num_warps=8),
    "absmax_quantize": dict(elements=1024, num_warps=4),
    "nf4_dequantize": dict(elements=4096, num_warps=4),
}


def nf4_blocks(kernel: str, blocksize: int) -> dict[str, int]:
    """BLOCKS of one program and its num_warps."""
    tile = NF4_TILES[kernel]
    return dict(BLOCKS=max(1, tile["elements"] // blocksize), num_warps=tile["num_warps"])
