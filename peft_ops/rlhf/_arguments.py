"""What every loss asks of its arguments: checks that name the argument, and the one cast of 16-bit inputs."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch

from ..tuning.config import check_choice as check_choice


def aligned(form: str, **tensors: torch.Tensor | None) -> list[torch.Tensor]:
    """The tensors in float32 (float64 stays), all of the form '[B]' or '[B, T]', the shape and device of the first.

    Raises:
        TypeError: no tensor, not floating point.
        ValueError: another shape or device than the first's.
    """
    wide: list[torch.Tensor] = []
    first, dims = next(iter(tensors)), form.count(",") + 1
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} must be a floating-point tensor {form}, got {_kind(tensor)}")
        if tensor.dim() != dims:
            raise ValueError(f"{name} must be {form}, got {tuple(tensor.shape)}")
        if wide:
            check_shape(name, tensor, wide[0].shape, first, wide[0].device)
        wide.append(tensor.to(torch.promote_types(tensor.dtype, torch.float32)))
    return wide


def scalar(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor [] in float32 or float64."""
    if not isinstance(tensor, torch.Tensor) or not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} must be a floating-point tensor [], got {_kind(tensor)}")
    if tensor.dim() != 0:
        raise ValueError(f"{name} must be [], got {tuple(tensor.shape)}")
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_bool(name: str, tensor: torch.Tensor, like: torch.Tensor, like_name: str) -> None:
    """A bool tensor of the shape of `like`."""
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor, got {_kind(tensor)}")
    check_shape(name, tensor, like.shape, like_name, like.device)


def check_shape(name: str, tensor: torch.Tensor, shape: torch.Size, of: str, device: torch.device) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must be {tuple(shape)} as {of} is, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} as {of} is, got {tensor.device}")


def check_number(name: str, value: float, least: float = -math.inf, below: float = math.inf) -> None:
    """A finite number of at least `least` and less than `below`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value) or not least <= value < below:
        low, high = ("" if math.isinf(bound) else f"{bound:g}" for bound in (least, below))
        wanted = f"in [{low}, {high})" if low and high else f"at least {low}" if low else "finite"
        raise ValueError(f"{name} must be {wanted}, got {value}")


def check_positive(name: str, value: float) -> None:
    check_number(name, value)
    if value <= 0:
        raise ValueError(f"{name} must be positive, got {value}")


def check_smoothing(loss_type: str, label_smoothing: float, choices: Collection[str]) -> None:
    """In [0, 0.5): at one half the labels say nothing. Other losses than `choices` have none."""
    check_number("label_smoothing", label_smoothing, 0.0, 0.5)
    if label_smoothing and loss_type not in choices:
        raise ValueError(f"label_smoothing must be 0 with loss_type {loss_type!r}, got {label_smoothing}")


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__
