"""What a result depends on besides the code: the device, its clocks, and the versions of everything timed."""

import os
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = (
    "torch", "triton", "peft", "bitsandbytes", "transformers", "trl", "liger-kernel",
    "cut-cross-entropy", "pytest-benchmark",
)  # fmt: skip
_NVIDIA_SMI = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,driver_version"


def description() -> dict:
    """device, threads or GPU properties, and versions; None for a package that is not installed."""
    return {"device": device_name(), **_gpu(), "threads": torch.get_num_threads(), "versions": versions()}


def versions() -> dict[str, str | None]:
    return {name: _version(name) for name in PACKAGES}


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{_cpu_name()}, {len(os.sched_getaffinity(0))} cores"


def _cpu_name() -> str:
    with open("/proc/cpuinfo") as lines:
        return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gpu() -> dict:
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    described = {
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda or torch.version.hip,
    }
    try:
        query = ["nvidia-smi", f"--query-gpu={_NVIDIA_SMI}", "--format=csv,noheader", "-i", "0"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return described
    return described | dict(zip(_NVIDIA_SMI.split(","), map(str.strip, answer.split(",")), strict=False))
