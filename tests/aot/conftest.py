"""Ahead-of-time compilation needs a process of its own: where the interpreter is on, kernels cannot be compiled."""

import os
import sys
from pathlib import Path

if os.environ.get("TRITON_INTERPRET") == "1":
    raise RuntimeError("tests/aot compiles kernels: run it without TRITON_INTERPRET")

sys.path.insert(0, str(Path(__file__).parent))


def pytest_terminal_summary(terminalreporter):
    """The cost of every kernel that was compiled, so that a change shows what it did."""
    from resources import MARK

    reports = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, []) if r.when == "call"]
    lines = {line.removeprefix(MARK) for r in reports for line in r.capstdout.splitlines() if line.startswith(MARK)}
    if lines:
        terminalreporter.section("what each kernel costs")
        for line in sorted(lines):
            terminalreporter.line(line)
