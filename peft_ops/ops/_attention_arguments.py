"""What attention refuses: query, key, value and masks that do not fit."""

import torch

from ._arguments import check_device


def check_heads(query, key, value, **others) -> None:
    """query [B, H, T, D], key [B, Hkv, S, D], value [B, Hkv, S, Dv] of one dtype; others are floating point, too.

    Raises:
        TypeError, ValueError: they are not.
    """
    named = {"query": query, "key": key, "value": value, **others}
    for name, t in named.items():
        if not isinstance(t, torch.Tensor) or not t.dtype.is_floating_point:
            raise TypeError(f"{name} must be a floating-point tensor, got {getattr(t, 'dtype', type(t).__name__)}")
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
    for name in ("key", "value"):
        if named[name].dtype != query.dtype:
            raise TypeError(f"{name} must have the dtype of query, {query.dtype}, got {named[name].dtype}")


def check_mask(op: str, query, key, mask, is_causal: bool) -> None:
    """mask is bool or to be added, broadcastable to [B, H, T, S], and alone.

    Raises:
        TypeError, ValueError: it is not.
    """
    (B, H, T, _), S = query.shape, key.shape[2]
    if mask is not None and is_causal:
        raise ValueError("mask and is_causal cannot be combined: put the causal part into the mask")
    check_bias(op, "mask", mask, "a bool or floating-point tensor", torch.bool)
    check_device(query, "query", mask=mask)
    if mask is not None and not broadcasts(mask, (B, H, T, S)):
        raise ValueError(f"mask must be broadcastable to {(B, H, T, S)}, got {tuple(mask.shape)}")


def check_bias(op: str, name: str, t, kinds: str, also: torch.dtype | None = None) -> None:
    """
    Raises:
        TypeError: neither floating point nor of the dtype `also`. ValueError: it asks for a gradient.
    """
    if t is None:
        return
    if not isinstance(t, torch.Tensor) or not (t.dtype.is_floating_point or t.dtype == also):
        raise TypeError(f"{name} must be {kinds}, got {getattr(t, 'dtype', type(t).__name__)}")
    if t.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, which {op} does not give: pass {name}.detach()")


def broadcasts(t: torch.Tensor, shape: tuple[int, ...]) -> bool:
    sizes = tuple(t.shape)
    return len(sizes) <= len(shape) and all(s in (1, of) for s, of in zip(sizes[::-1], shape[::-1], strict=False))
