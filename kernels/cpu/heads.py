"""What the library takes of attention's tensors: rows that it can read, strides and sizes."""

import ctypes

import torch

from . import native


def rows(t: torch.Tensor) -> torch.Tensor:
    """t with neighbours in a row side by side in memory: itself where it is so."""
    return t if t.stride(-1) == 1 else t.contiguous()


def bias_rows(bias: torch.Tensor | None, query: torch.Tensor, keys: int) -> torch.Tensor | None:
    """[B, H, T, keys] in float32, neighbours in a row side by side; a view wherever it is shared."""
    if bias is None:
        return None
    bias = rows(bias.float().expand(*bias.shape[:-1], keys))
    return bias.expand(*query.shape[:3], keys)


def strides(*tensors: torch.Tensor | None) -> ctypes.Array:
    """Three of each."""
    values = [stride for t in tensors for stride in ((0, 0, 0) if t is None else t.stride()[:3])]
    return (ctypes.c_int64 * len(values))(*values)


def sizes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> ctypes.Array:
    """B, H, heads of keys, T, S, D, Dv, of keys [..., heads, S, D]."""
    B, H, T, D = query.shape
    return (ctypes.c_int64 * 7)(B, H, *key.shape[-3:-2], T, key.shape[-2], D, value.shape[-1])


def threads(query: torch.Tensor, key: torch.Tensor) -> int:
    return native.threads(query.numel() * key.shape[-2])
