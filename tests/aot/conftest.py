"""Ahead-of-time compilation needs a process of its own: where the interpreter is on, kernels cannot be compiled."""

import json
import os
import sys
from pathlib import Path

if os.environ.get("TRITON_INTERPRET") == "1":
    raise RuntimeError("tests/aot compiles kernels: run it without TRITON_INTERPRET")

sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser):
    parser.addoption("--costs", help="write what each kernel costs into this file, a JSON object a line")


def pytest_configure(config):
    import resources

    resources.disassemble = bool(config.getoption("--costs"))


def pytest_terminal_summary(terminalreporter):
    """The cost of every kernel that was compiled, so that a change shows what it did."""
    from resources import MARK

    reports = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, []) if r.when == "call"]
    lines = {line.removeprefix(MARK) for r in reports for line in r.capstdout.splitlines() if line.startswith(MARK)}
    if path := terminalreporter.config.getoption("--costs"):
        Path(path).write_text("".join(f"{line}\n" for line in sorted(lines)))
    elif lines:
        terminalreporter.section("what each kernel costs")
        for cost in sorted(map(json.loads, lines), key=lambda cost: (cost["arch"], cost["kernel"])):
            terminalreporter.line(described(cost))


def described(cost):
    units = ", ".join(f"{op} {n}" for op, n in cost["instructions"].items())
    flags = " ".join(f"{key}={value}" for key, value in cost["flags"].items())
    return (
        f"{cost['arch']:7} {cost['kernel']:30} {cost['types']:20} {cost['registers']:3} registers "
        f"{cost['shared'] / 1024:5.0f} KiB {cost['spills']} spills  {units}  [{flags}]"
    )
