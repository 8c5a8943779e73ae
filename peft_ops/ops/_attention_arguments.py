"""What ops of attention ask of query, key, value and what is added to their scores."""

import torch

from ._arguments import check_device


def check_floating(**tensors: torch.Tensor) -> None:
    """Raises:
    TypeError: one that is no floating-point tensor, named.
    """
    for name, t in tensors.items():
        if not isinstance(t, torch.Tensor) or not t.dtype.is_floating_point:
            raise TypeError(f"{name} must be a floating-point tensor, got {getattr(t, 'dtype', type(t).__name__)}")


def check_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """query [B, H, T, D], key [B, Hkv, S, D] and value [B, Hkv, S, Dv] of one dtype on one device, H a multiple of Hkv.

    Raises:
        TypeError: another dtype than that of query, a DTensor.
        ValueError: shapes that do not fit, tensors on different devices.
    """
    if query.dim() != 4 or query.shape[-1] < 1:
        raise ValueError(f"query must be [B, H, T, D] with D >= 1, got {tuple(query.shape)}")
    B, H, _, D = query.shape
    if key.dim() != 4 or key.shape[0] != B or key.shape[1] < 1 or H % key.shape[1] or key.shape[3] != D:
        raise ValueError(
            f"key must be [{B}, Hkv, S, {D}] with Hkv a divisor of {H} to fit query, got {tuple(key.shape)}"
        )
    heads, S = key.shape[1:3]
    if value.dim() != 4 or value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value must be [{B}, {heads}, {S}, Dv] to fit key, got {tuple(value.shape)}")
    for name, t in (("key", key), ("value", value)):
        if t.dtype != query.dtype:
            raise TypeError(f"{name} must have the dtype of query, {query.dtype}, got {t.dtype}")
    check_device(query, "query", key=key, value=value)


def check_mask(op: str, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, is_causal: bool) -> None:
    """None, or bool or floating point, broadcastable to [B, H, T, S], without a gradient, and not with is_causal.

    Raises:
        TypeError, ValueError: as above.
    """
    if mask is None:
        return
    if is_causal:
        raise ValueError("mask and is_causal cannot be combined: put the causal part into the mask")
    check_constant(op, "mask", mask, also=torch.bool)
    check_device(query, "query", mask=mask)
    shape = (*query.shape[:3], key.shape[2])
    if not broadcasts(mask, shape):
        raise ValueError(f"mask must be broadcastable to {shape}, got {tuple(mask.shape)}")


def check_constant(op: str, name: str, t: torch.Tensor, also: torch.dtype | None = None) -> None:
    """A floating-point tensor, or one of the dtype `also`, for which nobody wants a gradient."""
    if not isinstance(t, torch.Tensor) or not (t.dtype.is_floating_point or t.dtype == also):
        kinds = "a bool or floating-point tensor" if also else "a floating-point tensor"
        raise TypeError(f"{name} must be {kinds}, got {getattr(t, 'dtype', type(t).__name__)}")
    if t.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, which {op} does not give: pass {name}.detach()")


def broadcasts(t: torch.Tensor, shape: tuple[int, ...]) -> bool:
    sizes = tuple(t.shape)
    return len(sizes) <= len(shape) and all(s in (1, of) for s, of in zip(sizes[::-1], shape[::-1], strict=False))
