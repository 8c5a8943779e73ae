"""What every op asks of its arguments: checks that name the argument, and the casts of autocast."""

import functools
from collections.abc import Callable

import torch
from torch.autograd import forward_ad

from ..nf4 import NF4Weight

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def check_linear(
    x: torch.Tensor, weight: torch.Tensor | NF4Weight, bias: torch.Tensor | None, x_name: str = "x"
) -> None:
    """x [..., K], weight [N, K] (dense or NF4), bias [N] or None, on one device, floating point; messages call x by
    x_name.

    Raises:
        TypeError: not tensors, a DTensor, an integer or complex x, a dense weight of another dtype than x.
        ValueError: shapes that do not fit, tensors on different devices.
    """
    if not isinstance(x, torch.Tensor) or not x.dtype.is_floating_point:
        raise TypeError(f"{x_name} must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    check_weight(weight)
    n, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"{x_name} must be [..., {k}] to fit weight {(n, k)}, got {tuple(x.shape)}")
    if isinstance(weight, torch.Tensor) and weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{x_name} must have the dtype of weight, {weight.dtype}, got {x.dtype} (outside autocast)")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias must be [{n}] to fit weight {(n, k)}, got {tuple(bias.shape)}")
    check_device(x, x_name, weight=stored(weight), bias=bias)


def check_weight(weight: torch.Tensor | NF4Weight) -> None:
    """[N, K], dense or NF4 with all the bytes that it needs."""
    if not isinstance(weight, (torch.Tensor, NF4Weight)):
        raise TypeError(f"weight must be a tensor or an NF4Weight, got {type(weight).__name__}")
    if isinstance(weight, NF4Weight):
        _check_bytes(weight)
    if len(weight.shape) != 2:
        raise ValueError(f"weight must be [out_features, in_features], got {tuple(weight.shape)}")


def stored(weight: torch.Tensor | NF4Weight) -> torch.Tensor:
    """The tensor that a weight is, or the bytes that it is packed in."""
    return weight.packed if isinstance(weight, NF4Weight) else weight


def _check_bytes(weight: NF4Weight) -> None:
    """The stored tensors hold what the shape needs: a kernel would read behind the end of shorter ones."""
    n = weight.shape.numel()
    blocks = -(-n // weight.blocksize)
    scales = weight.absmax if weight.absmax is not None else weight.absmax_codes
    if weight.packed.numel() != (n + 1) // 2 or scales is None or scales.numel() != blocks:
        given = tuple(weight.packed.shape), None if scales is None else tuple(scales.shape)
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} needs {(n + 1) // 2} packed bytes and {blocks} scales, "
            f"got packed {given[0]} and absmax {given[1]}"
        )


def check_adapter(x: torch.Tensor, weight: torch.Tensor | NF4Weight, a: torch.Tensor, b: torch.Tensor) -> None:
    """lora_a [r, K] and lora_b [N, r] fit weight [N, K], r >= 1."""
    n, k = weight.shape
    if a.dim() != 2 or a.shape[0] < 1 or a.shape[1] != k:
        raise ValueError(f"lora_a must be [r, {k}] with r >= 1 to fit weight {(n, k)}, got {tuple(a.shape)}")
    if b.shape != (n, a.shape[0]):
        raise ValueError(f"lora_b must be {(n, a.shape[0])} to fit weight and lora_a, got {tuple(b.shape)}")
    for name, t in (("lora_a", a), ("lora_b", b)):
        if not t.dtype.is_floating_point:
            raise TypeError(f"{name} must be a floating-point tensor, got {t.dtype}")
    check_device(x, lora_a=a, lora_b=b)


def check_magnitude(x: torch.Tensor, weight: torch.Tensor | NF4Weight, magnitude: torch.Tensor) -> None:
    """[N], one for each row of weight [N, K]."""
    if not isinstance(magnitude, torch.Tensor) or not magnitude.dtype.is_floating_point:
        given = getattr(magnitude, "dtype", type(magnitude).__name__)
        raise TypeError(f"magnitude must be a floating-point tensor, got {given}")
    if magnitude.shape != weight.shape[:1]:
        raise ValueError(f"magnitude must be [{weight.shape[0]}] to fit weight, got {tuple(magnitude.shape)}")
    check_device(x, magnitude=magnitude)


def check_bottleneck(
    x: torch.Tensor, down_weight: torch.Tensor, down_bias: torch.Tensor | None, up_weight: torch.Tensor,
    up_bias: torch.Tensor | None, residual: torch.Tensor | None,
) -> None:  # fmt: skip
    """x [..., K], down_weight [m, K], down_bias [m], up_weight [N, m], up_bias [N], residual [..., N] fit, m >= 1."""
    others = {"down_weight": down_weight, "down_bias": down_bias, "up_weight": up_weight, "up_bias": up_bias,
              "residual": residual}  # fmt: skip
    for name, t in {"x": x, **others}.items():
        if t is None and name in ("down_bias", "up_bias", "residual"):
            continue
        if not isinstance(t, torch.Tensor) or not t.dtype.is_floating_point:
            raise TypeError(f"{name} must be a floating-point tensor, got {getattr(t, 'dtype', type(t).__name__)}")
    if down_weight.dim() != 2 or down_weight.shape[0] < 1:
        raise ValueError(f"down_weight must be [m, in_features] with m >= 1, got {tuple(down_weight.shape)}")
    m, k = down_weight.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x must be [..., {k}] to fit down_weight {(m, k)}, got {tuple(x.shape)}")
    if up_weight.dim() != 2 or up_weight.shape[1] != m:
        raise ValueError(f"up_weight must be [out_features, {m}] to fit down_weight, got {tuple(up_weight.shape)}")
    n = up_weight.shape[0]
    for name, bias, width in (("down_bias", down_bias, m), ("up_bias", up_bias, n)):
        if bias is not None and bias.shape != (width,):
            raise ValueError(f"{name} must be [{width}] to fit its weight, got {tuple(bias.shape)}")
    if residual is not None and residual.shape != (*x.shape[:-1], n):
        raise ValueError(f"residual must be {(*x.shape[:-1], n)} to fit x and up_weight, got {tuple(residual.shape)}")
    check_device(x, **others)


def check_device(x: torch.Tensor, x_name: str = "x", /, **others: torch.Tensor | None) -> None:
    """Every tensor is a plain one (no DTensor) on the device of x, which messages call by x_name."""
    _check_local(x_name, x)
    device = x.device
    for name, t in others.items():
        if t is None:
            continue
        _check_local(name, t)
        if t.device != device:
            raise ValueError(f"{name} is on {t.device}, {x_name} on {device}: all must be on one device")


def _check_local(name: str, t: torch.Tensor) -> None:
    if type(t) not in _PLAIN and hasattr(t, "to_local"):
        raise TypeError(
            f"{name} is a {type(t).__name__}; kernels take local tensors: call through "
            "torch.distributed.tensor.experimental.local_map, or pass to_local()"
        )


def check_probability(name: str, p: float) -> float:
    """p as a float in [0, 1]."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {p}")
    return float(p)


def check_positive(name: str, value: float) -> float:
    """value as a float above 0 and finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return float(value)


def mask_seed(seed: int | torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """int64 []: on the device and drawn by its generator, so that checkpointing replays it and CUDA graphs renew it."""
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, torch.Tensor):
        return seed
    return torch.full((), seed, dtype=torch.int64, device=device)


def autocast_input(x: torch.Tensor) -> torch.Tensor:
    """x in autocast's dtype where autocast is on for its device, as nn.Linear takes it; float64 stays."""
    if not torch._C._is_any_autocast_enabled():
        return x
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):  # as on meta
        return x
    return x.to(torch.get_autocast_dtype(device)) if x.is_floating_point() and x.dtype != torch.float64 else x


def without_autocast(function: Callable) -> Callable:
    """For what an op computes, a Function's forward or backward: its own matmuls keep the dtypes that it chose."""

    @functools.wraps(function)
    def wrapped(*args):
        if not torch._C._is_any_autocast_enabled():
            return function(*args)
        device = next((t.device.type for t in args if isinstance(t, torch.Tensor)), None)
        if device is None or not torch.is_autocast_enabled(device):
            return function(*args)
        with torch.autocast(device, enabled=False):
            return function(*args)

    return wrapped


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., K] as [M, K]."""
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def shaped_as(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """y [M, N], which was computed of as_rows(x), as [..., N]."""
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def recorded(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd, in either direction, or a trace is to know what becomes of these: then it takes a Function,
    which costs as much as a small op does; otherwise what its forward computes is called."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return forward_ad._current_level >= 0 or torch.jit.is_tracing()


def functorch_active() -> bool:
    """Inside torch.vmap, torch.func.grad and the like, which a Function with saved intermediates cannot enter."""
    return torch._C._are_functorch_transforms_active()
