"""The only door to device code: which package implements an op for a tensor.

`PEFT_OPS_BACKEND` (one of `_PACKAGES`, read once at import) forces a package for every device; otherwise device types
in `_BY_DEVICE` go to their kernels where these can be installed, plain tensors on a CPU to the native library where it
was built, and everything else to the plain-PyTorch reference.
"""

import functools
import os
from collections.abc import Callable
from importlib.util import find_spec
from types import FunctionType, ModuleType

import torch


def _reference() -> ModuleType:
    from . import reference

    return reference


def _triton() -> ModuleType:
    from .kernels import launchers  # at first use, and as a statement, which torch.compile can trace

    return launchers


REFERENCE, TRITON = "peft_ops.reference", "peft_ops.kernels"
_PACKAGES = {REFERENCE: _reference, TRITON: _triton}
_BY_DEVICE = {"cuda": TRITON} if find_spec("triton") else {}
_KERNEL_DTYPES = {torch.float16, torch.bfloat16, torch.float32}
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_FORCED = os.environ.get("PEFT_OPS_BACKEND")
if _FORCED and _FORCED not in _PACKAGES:
    raise ImportError(f"PEFT_OPS_BACKEND must be one of {', '.join(_PACKAGES)}, got {_FORCED}")


def implementation(op: str, tensor: torch.Tensor) -> ModuleType:
    """The module that implements `op` for the device and dtype of `tensor`; kernels take 16- and 32-bit floats, and
    an op that has no kernel runs on the reference."""
    if not _FORCED and tensor.dtype in _KERNEL_DTYPES and is_plain(tensor):
        return _native(op)
    return getattr(_PACKAGES[_package(tensor)](), op, None) or getattr(_reference(), op)


def is_reference(tensor: torch.Tensor) -> bool:
    """Whether torch.compile would see an op on the device and dtype of `tensor` as plain PyTorch; native code, which
    cannot be traced, gives way to it there."""
    return _package(tensor) == REFERENCE


def _package(tensor: torch.Tensor) -> str:
    package = _FORCED or _BY_DEVICE.get(tensor.device.type, REFERENCE)
    return package if tensor.dtype in _KERNEL_DTYPES else REFERENCE


def is_plain(*tensors: torch.Tensor) -> bool:
    """Whether code that takes addresses may be called: plain memory on a CPU, and nothing that watches or traces."""
    return (
        not torch.compiler.is_compiling()
        and all(t.is_cpu and type(t) in _PLAIN for t in tensors)
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
    )


@functools.cache
def _native(op: str) -> ModuleType:
    """The functions of `op`, the library's where it has them, the reference's for the rest or without a library."""
    reference = getattr(_reference(), op)
    try:
        from .kernels import cpu
    except ImportError:
        return reference
    native = getattr(cpu, op, None)
    if native is None:
        return reference
    merged = ModuleType(native.__name__)
    plain, fast = _functions(reference), _functions(native)
    taken = {name: _unless_float64(f, plain[name]) if name in plain else f for name, f in fast.items()}
    merged.__dict__.update(plain | taken)
    return merged


def _unless_float64(native: FunctionType, reference: FunctionType) -> Callable:
    """`native`, and `reference` where an operand is float64, as an adapter may be on a 16-bit x: sums are too then."""

    @functools.wraps(native)
    def chosen(*args):
        for a in args:
            if isinstance(a, torch.Tensor) and a.dtype == torch.float64:
                return reference(*args)
        return native(*args)

    return chosen


def _functions(module: ModuleType) -> dict[str, FunctionType]:
    return {name: f for name, f in vars(module).items() if isinstance(f, FunctionType) and not name.startswith("_")}
