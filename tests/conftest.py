"""Fixtures of every test: where it runs, and poisoned memory.

The same op tests run three ways: on the reference (`pytest tests`), on the Triton kernels in the interpreter
(`TRITON_INTERPRET=1 PEFT_OPS_BACKEND=peft_ops.kernels`), and on a GPU where there is one (`-m gpu`).
"""

import os
from importlib.util import find_spec

import pytest
import torch
from torch.utils._device import _device_constructors

if find_spec("peft_ops.kernels") is None:  # the bare tree of `make gpu`, in a worker process of its own
    from benchmarks.tree import map_kernels

    map_kernels()

_device_constructors()  # `with torch.device` keeps the list that this makes: of the real ones, not the poisoned

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRET:
    import interpreter_bf16

    interpreter_bf16.install()


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(skip)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return torch.device(request.param)


@pytest.fixture(params=["avx512bf16", "avx512", "avx2", "portable"])
def isa(request):
    """Each instruction set of the native library in turn; a machine without it skips."""
    native = pytest.importorskip(
        "peft_ops.kernels.cpu.native", reason="the native library is not built", exc_type=ImportError
    )
    if request.param not in native.runs():
        pytest.skip(f"this machine does not run {request.param}")
    chosen = native.ISA
    native.use(request.param)
    yield request.param
    native.use(chosen)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned(request, monkeypatch):
    """Memory from torch.empty holds NaN (integers: 0xA5), so that what a kernel leaves unwritten is seen."""
    if request.node.get_closest_marker("unpoisoned"):
        return

    def poison(make):
        def poisoned_make(*args, **kwargs):
            t = make(*args, **kwargs)
            if t.device.type == "meta":
                return t
            with torch.no_grad():
                return t.fill_(float("nan") if t.is_floating_point() else 0xA5 if t.dtype == torch.uint8 else 1)

        return poisoned_make

    for owner, name in (
        (torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"),
        (torch.Tensor, "new_empty"), (torch.Tensor, "new_empty_strided"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
