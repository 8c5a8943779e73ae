"""What this machine reaches at most, measured in the run that they are held against: the roof of a roofline."""

import time
from collections.abc import Callable

import torch

from benchmarks.measure import DeviceInstant, timed
from benchmarks.shapes import DEVICE, DTYPE, ON_GPU

ROUNDS = 9
COPIED = 1 << 30 if ON_GPU else 1 << 27  # bytes of a buffer: many times any cache
SIDE = 8192 if ON_GPU else 2048


def ceilings(tiny: bool = False) -> dict[str, float]:
    """copy_bytes_per_s, read and written bytes together; matmul_flops_per_s of bfloat16 on random data."""
    nbytes, side = (1 << 20, 128) if tiny else (COPIED, SIDE)
    source = torch.randn(nbytes // 4, device=DEVICE)
    target = torch.empty_like(source)
    copy_s = _fastest(lambda: target.copy_(source))
    a, b = (torch.randn(side, side, device=DEVICE, dtype=DTYPE) for _ in range(2))
    matmul_s = _fastest(lambda: a @ b)
    return {"copy_bytes_per_s": 2 * nbytes / copy_s, "matmul_flops_per_s": 2 * side**3 / matmul_s}


def _fastest(call: Callable) -> float:
    clock = DeviceInstant if ON_GPU else time.perf_counter
    return min(timed(call, clock) for _ in range(ROUNDS))
