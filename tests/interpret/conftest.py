"""Kernels on CPU tensors: the interpreter must be on before a kernel is decorated, so these run in their own job."""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("tests/interpret runs kernels on CPU tensors: set TRITON_INTERPRET=1")
