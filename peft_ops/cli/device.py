"""Where to compute, and in what."""

import torch

from .errors import UserError


def pick_device(name: str | None) -> torch.device:
    """The device asked for, or a GPU where there is one."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device {name}: expected cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs")
    return device


def pick_dtype(name: str | None, device: str | None) -> torch.dtype:
    """bf16 where the hardware multiplies it, else fp32, if nothing is asked for."""
    if name:
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
    on_gpu = pick_device(device).type == "cuda"
    fast = torch.cuda.is_bf16_supported(False) if on_gpu else torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.bfloat16 if fast else torch.float32
