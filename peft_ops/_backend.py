"""The only door to device code: which package implements an op for a tensor.

`PEFT_OPS_BACKEND` (one of `_PACKAGES`, read once at import) forces a package for every device; otherwise device types
in `_BY_DEVICE` go to their kernels where these can be installed, and everything else to the plain-PyTorch reference.
"""

import os
from importlib.util import find_spec
from types import ModuleType

import torch


def _reference() -> ModuleType:
    from . import reference

    return reference


def _triton() -> ModuleType:
    from . import kernels  # at first use, and as a statement, which torch.compile can trace

    return kernels


REFERENCE, TRITON = "peft_ops.reference", "peft_ops.kernels"
_PACKAGES = {REFERENCE: _reference, TRITON: _triton}
_BY_DEVICE = {"cuda": TRITON} if find_spec("triton") else {}
_KERNEL_DTYPES = {torch.float16, torch.bfloat16, torch.float32}
_FORCED = os.environ.get("PEFT_OPS_BACKEND")
if _FORCED and _FORCED not in _PACKAGES:
    raise ImportError(f"PEFT_OPS_BACKEND must be one of {', '.join(_PACKAGES)}, got {_FORCED}")


def implementation(op: str, tensor: torch.Tensor) -> ModuleType:
    """The module that implements `op` for the device and dtype of `tensor`; kernels take 16- and 32-bit floats."""
    return getattr(_PACKAGES[_package(tensor)](), op)


def is_reference(tensor: torch.Tensor) -> bool:
    """Whether ops run in plain PyTorch on the device and dtype of `tensor`."""
    return _package(tensor) == REFERENCE


def _package(tensor: torch.Tensor) -> str:
    package = _FORCED or _BY_DEVICE.get(tensor.device.type, REFERENCE)
    return package if tensor.dtype in _KERNEL_DTYPES else REFERENCE
