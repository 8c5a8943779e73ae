"""The only door to device code: which package implements an op for a tensor.

`PEFT_OPS_BACKEND` (a package name, read once at import) forces one for every device; otherwise device types listed in
`_BY_DEVICE` go to their kernels where these can be installed, and everything else to the plain-PyTorch reference.
"""

import os
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

REFERENCE, TRITON = "peft_ops.reference", "peft_ops.kernels"
_FORCED = os.environ.get("PEFT_OPS_BACKEND")
_BY_DEVICE = {"cuda": TRITON} if find_spec("triton") else {}
_KERNEL_DTYPES = {torch.float16, torch.bfloat16, torch.float32}
_loaded: dict[tuple[str, str], ModuleType] = {}


def implementation(op: str, tensor: torch.Tensor) -> ModuleType:
    """The module that implements `op` for the device and dtype of `tensor`; kernels take 16- and 32-bit floats."""
    package = _FORCED or _BY_DEVICE.get(tensor.device.type, REFERENCE)
    if tensor.dtype not in _KERNEL_DTYPES:
        package = REFERENCE
    module = _loaded.get((package, op))
    if module is None:
        module = _loaded[package, op] = import_module(f"{package}.{op}")
    return module
