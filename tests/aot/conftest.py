"""Ahead-of-time compilation needs a process of its own: where the interpreter is on, kernels cannot be compiled."""

import os
import sys
from pathlib import Path

if os.environ.get("TRITON_INTERPRET") == "1":
    raise RuntimeError("tests/aot compiles kernels: run it without TRITON_INTERPRET")

sys.path.insert(0, str(Path(__file__).parent))
