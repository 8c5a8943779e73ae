"""What launchers share."""

import contextlib

import torch


def device_guard(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """The tensor's device is the current one inside: Triton launches on the current device, whatever its arguments."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def dropout_arguments(p: float, seed: torch.Tensor | None, like: torch.Tensor) -> tuple[torch.Tensor, int, float]:
    """(seed pointer, threshold, keep_scale) of a kernel with dropout p; the pointer is not read at p = 0."""
    keep_scale = 1.0 / (1.0 - p) if p < 1.0 else 0.0
    return like if seed is None else seed, min(round(p * 2**16), 2**16 - 1), keep_scale


def seed_groups(p: float, seed: torch.Tensor | None, R: int) -> int:
    """Into how many equal groups R columns fall: one for each seed of an int64 [G], else, and without dropout, one."""
    groups = 1 if p == 0.0 or seed is None or seed.dim() == 0 else seed.shape[0]
    if R % groups:
        raise ValueError(f"{groups} seeds need a multiple of {groups} rows of a, got {R}")
    return groups
