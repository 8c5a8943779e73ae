"""Launch configurations of prefix attention, design values."""

import torch

# By the wider head dimension of keys and values, PREFIX_COLUMNS of which hold the prefix's gradients at a time. Dropout
# and a float32 prefix beside 16-bit queries fit as well.
PREFIX_ATTENTION = {
    "prefix_merge": {
        64: dict(BLOCK_M=64, BLOCK_N=64, BLOCK_C=32, num_warps=8, num_stages=1),
        128: dict(BLOCK_M=64, BLOCK_N=32, BLOCK_C=32, num_warps=8, num_stages=1),
        256: dict(BLOCK_M=64, BLOCK_N=16, BLOCK_C=32, num_warps=8, num_stages=1),
        "fp32": dict(BLOCK_M=32, BLOCK_N=32),
        "few": dict(num_warps=4),
    },
    "prefix_dq": {
        64: dict(BLOCK_M=64, BLOCK_N=16, BLOCK_C=32, num_warps=4, num_stages=1),
        128: dict(BLOCK_M=64, BLOCK_N=16, BLOCK_C=32, num_warps=4, num_stages=1),
        256: dict(BLOCK_M=32, BLOCK_N=16, BLOCK_C=32, num_warps=8, num_stages=1),
        "fp32": dict(BLOCK_M=32, BLOCK_N=32, num_warps=8),
    },
    "prefix_gradients": {
        64: dict(BLOCK_M=32, BLOCK_N=32, BLOCK_C=32, num_warps=8, num_stages=1),
        "fp32": dict(BLOCK_M=16, BLOCK_N=16, num_warps=4),
    },
}
PREFIX_COLUMNS = 64  # of the prefix's gradients that one program holds


def prefix_attention(kernel: str, arch: str, dtype: torch.dtype, rows: int, n: int, head_dim: int) -> dict[str, int]:
    """Launch configuration for a prefix of n keys and `rows` rows that share them; no tile wider than there is."""
    table = PREFIX_ATTENTION[kernel]
    fit = 64 if head_dim <= 64 or kernel == "prefix_gradients" else 128 if head_dim <= 128 else 256
    config = table[fit] | (table["fp32"] if dtype == torch.float32 else {})
    if rows <= 16:  # one tile of a decoding step
        config = config | table.get("few", {})
    within = {"BLOCK_M": rows, "BLOCK_N": n, "BLOCK_C": head_dim}
    return config | {block: min(config[block], covering(size)) for block, size in within.items()}


def covering(size: int) -> int:
    """The power of two from 16 that covers a dimension."""
    return max(16, 1 << (size - 1).bit_length())
