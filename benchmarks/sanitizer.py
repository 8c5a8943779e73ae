"""compute-sanitizer's memcheck over every op, where the tool is found and knows the device."""

import os
import shutil
import site
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from benchmarks.steps import Step

TOOL, FOUND_ERRORS = "compute-sanitizer", 66


def step(limit_s: float) -> Step:
    """PyTorch allocates every tensor by itself, so that its neighbours do not hide an access beyond it."""
    tool = next(candidates(), None)
    return Step(
        "memcheck", ["benchmarks.memcheck"], limit_s,
        prefix=(str(tool), "--tool", "memcheck", "--error-exitcode", str(FOUND_ERRORS)),
        variables={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        missing=None if tool else f"not available: {TOOL} is not on this machine",
        unsupported=("Device not supported", f"not available: {TOOL} does not support this device"),
    )  # fmt: skip


def candidates() -> Iterator[Path]:
    """On PATH, in the CUDA toolkit, in the packages of nvidia and triton."""
    if found := shutil.which(TOOL):
        yield Path(found)
    toolkits = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(toolkit) / part for toolkit in toolkits if toolkit for part in ("bin", "compute-sanitizer")]
    triton = find_spec("triton")
    if triton and triton.origin:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    for folder in folders:
        if (folder / TOOL).is_file():
            yield folder / TOOL
    for packages in site.getsitepackages():
        yield from (path for path in Path(packages).glob(f"nvidia/**/{TOOL}") if path.is_file())
